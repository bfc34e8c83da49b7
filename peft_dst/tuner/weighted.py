"""A new adapter from several: the weighted sum of their differences to the seed, or what TIES and DARE make of it.

The arithmetic is PEFT's, on vectors of the entries instead of dense tensors: what no adapter changes stays the seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from peft.utils import merge_utils
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..config import DSTConfig
from ..core import SparseWeight
from ..delta import Record
from .constraints import constraints
from .layer import markers


Combination = Literal["linear", "cat", "union", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
#: How each prunes an adapter's entries before they are added up: by size, or at random.
_PRUNES = {"ties": "magnitude", "magnitude_prune": "magnitude", "dare_linear": "random", "dare_ties": "random"}
_TARGETS = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")


def combine(
    entries: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float],
    combination_type: Combination,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> tuple[Tensor, Tensor]:
    """Combine the differences of several adapters.

    Args:
        entries: for each adapter its positions, int64 (k,), sorted, and the differences to the seed there, float64 (k,).
        weights: what each adapter's are multiplied with.
        combination_type: how.
        density: the share of its entries that each adapter keeps, where it prunes.
        majority_sign_method: how TIES elects a sign.

    Returns:
        The union of all positions, int64 (n,), sorted, and the combined differences there, float64 (n,).
    """
    method: Any = _PRUNES.get(combination_type)
    union = torch.cat([indices for indices, _ in entries]).unique()
    vectors = []
    for indices, differences in entries:
        if method is not None and density is not None and density < 1:
            differences = merge_utils.prune(differences, density, method, rescale=method == "random")
        vector = torch.zeros(union.numel(), dtype=torch.float64)
        vector[torch.searchsorted(union, indices)] = differences
        vectors.append(vector)
    factors = torch.tensor(weights, dtype=torch.float64)
    if combination_type not in ("ties", "dare_ties"):
        return union, merge_utils.task_arithmetic(vectors, factors)
    stacked = torch.stack(vectors)
    mask = merge_utils.calculate_majority_sign_mask(stacked, majority_sign_method)
    return union, merge_utils.disjoint_merge(stacked * factors[:, None], mask)


def combined_records(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: Combination,
    density: float | None,
    majority_sign_method: Literal["total", "frequency"],
) -> dict[str, Record]:
    """The entries of the combined adapter, by the parameters' names; those that come out at the seed are left out.

    All tensors of an adapter are combined as one vector, so a density is a share of all its entries.

    Raises:
        ValueError: if a value is not finite in its weight's dtype.
    """
    found: dict[str, tuple[SparseWeight, dict[str, Record]]] = {}
    for _, marker in markers(model):
        for adapter in [name for name in adapters if name in marker.tuned]:
            for parameter, record in marker.records(adapter).items():
                weight = marker.weights[parameter]
                found.setdefault(weight.name, (weight, {}))[1][adapter] = record
    starts, start = {}, 0
    for name, (weight, _) in found.items():
        starts[name] = start
        start += weight.data.numel()
    entries = []
    for adapter in adapters:
        indices = [torch.empty(0, dtype=torch.int64, device="cpu")]
        differences = [torch.empty(0, dtype=torch.float64, device="cpu")]
        for name, (weight, records) in found.items():
            if adapter in records:
                at = records[adapter].indices.long()
                moved = records[adapter].values.double() - weight.seeds_at(at).double()
                indices.append(at.cpu() + starts[name])
                differences.append(moved.cpu())
        entries.append((torch.cat(indices), torch.cat(differences)))
    # Whatever the default device is: the entries have been gathered on the CPU.
    with torch.device("cpu"):
        union, merged = combine(entries, weights, combination_type, density, majority_sign_method)
        # Sorted, and so in parts, one a tensor.
        ends = torch.searchsorted(union, torch.tensor([*starts.values(), start])).tolist()
    combined = {}
    for (name, (weight, _)), begin, end in zip(found.items(), ends, ends[1:], strict=False):
        inside = slice(begin, end)
        at = (union[inside] - starts[name]).to(weight.data.device)
        seeds = weight.seeds_at(at)
        values = (seeds.double() + merged[inside].to(seeds.device)).to(seeds.dtype)
        moved = values != seeds
        if moved.any():
            combined[name] = Record(at[moved], values[moved])
            _check_finite(name, combined[name])
    return combined


def _check_finite(name: str, record: Record) -> None:
    strange = ~torch.isfinite(record.values)
    if strange.any():
        value, position = float(record.values[strange][0]), int(record.indices[strange][0])
        raise ValueError(
            f"the combination gives {name!r} the value {value} at position {position}, which is not finite in "
            f"{record.values.dtype}. Give smaller weights, or load the base in a wider dtype."
        )


def combined_config(configs: Sequence[DSTConfig], records: Mapping[str, Record]) -> DSTConfig:
    """The config of the combined adapter, which tunes what its sources tune and has as many free parameters as entries."""
    alike = all(getattr(configs[0], name) == getattr(config, name) for config in configs for name in _TARGETS)
    targets: dict[str, Any] = {} if alike else {**dict.fromkeys(_TARGETS), "target_parameters": list(records)}
    config = replace(
        configs[0],
        **targets,
        modules_to_save=[*dict.fromkeys(name for c in configs for name in c.modules_to_save or ())] or None,
        epsilon=None,
        num_free_parameters=sum(record.indices.numel() for record in records.values()),
        selection="transfer",
        distance_normalization=None,
        churn_interval=1,
        churn_stop=None,
        threshold="exact",
        threshold_iterations=None,
        threshold_range=None,
        init_weights=True,
        records=None,
    )
    config.inference_mode = True
    return config


def check(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> None:
    """Check the arguments of `add_weighted_adapter`.

    Raises:
        ValueError: if one of them is none, or the adapters have different dense copies of a module.
    """
    existing = constraints(model)
    if not adapters:
        raise ValueError("no adapters were given to combine. There are " + ", ".join(existing) + ".")
    for name in adapters:
        if name not in existing:
            raise ValueError(f"Adapter {name} does not exist. There are {', '.join(existing)}.")
    if len(set(adapters)) < len(adapters):
        raise ValueError(
            f"adapters names one of {', '.join(adapters)} twice; name it once, with the sum of its weights."
        )
    if adapter_name in existing:
        raise ValueError(f"Adapter {adapter_name} already exists. Choose another name, or delete_adapter it first.")
    if len(weights) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters need as many weights, got {len(weights)}.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite, got {weights}.")
    if combination_type not in get_args(Combination):
        allowed = ", ".join(get_args(Combination))
        raise ValueError(f"Invalid combination_type: {combination_type}. Give one of {allowed}.")
    if combination_type in _PRUNES and (density is None or not 0 < density <= 1):
        raise ValueError(
            f"combination_type={combination_type!r} keeps a share of each adapter's entries: give a density with "
            f"0 < density <= 1, got {density!r}."
        )
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method must be 'total' or 'frequency', got {majority_sign_method!r}.")
    for name, module in model.named_modules():
        copies = [a for a in adapters if isinstance(module, ModulesToSaveWrapper) and a in module.modules_to_save]
        if copies and not _all_equal([module.get_submodule(f"modules_to_save.{a}") for a in copies]):
            raise ValueError(
                f"Cannot add weighted adapters if they target the same module with modules_to_save, but {name!r} has "
                f"different dense copies for {', '.join(copies)}, which are not combined. Combine adapters that share "
                "one (train them with a frozen head), or one of them at a time."
            )


def _all_equal(modules: Sequence[nn.Module]) -> bool:
    first = modules[0].state_dict()
    return all(
        first.keys() == other.keys() and all(torch.equal(first[key], other[key]) for key in first)
        for other in (module.state_dict() for module in modules[1:])
    )


def take_copies(model: nn.Module, adapters: Sequence[str], adapter_name: str) -> None:
    """Give a new adapter the dense copies of modules that its sources have in common."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for source in [a for a in adapters if a in module.modules_to_save][:1]:
                module.modules_to_save[adapter_name].load_state_dict(module.modules_to_save[source].state_dict())
