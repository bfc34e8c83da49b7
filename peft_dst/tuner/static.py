"""Subsets that are given: by a static selection (second paper), or by another adapter.

A static selection needs the seed only (random, bitfit, magnitude), and is then made when the adapter is added; or scores
from data, which `fix_subset` takes, as it takes the subset of another adapter.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..config import BY_SEED, GIVEN, DSTConfig
from ..core import Constraint, SparseWeight, allocate_budgets, scatter
from ..core.shards import check_held_alone
from ..delta import SparseDelta, check_seed
from ..subsets import choose, is_bias, load_scores, magnitude_scores, random_scores
from .constraints import constraints
from .layer import markers


#: Name of a parameter of the base model → its scores (floating, of its shape) or the positions in it (int64, sorted).
Source = Mapping[str, Tensor]


def budgets(config: DSTConfig, silos: Mapping[str, Mapping[str, int]]) -> list[int]:
    """The budget of each silo.

    Args:
        config: of the adapter.
        silos: silo → its parameters' names → their sizes.

    Raises:
        ValueError: if they would all be zero.
    """
    if config.selection == "bitfit":
        found = [sum(n for name, n in sizes.items() if is_bias(name)) for sizes in silos.values()]
        if not any(found):
            raise ValueError(
                "selection='bitfit' tunes biases, and none of the tuned parameters is one. Choose another selection, e.g. "
                "'random', or widen target_modules."
            )
        return found
    sizes = [sum(members.values()) for members in silos.values()]
    return allocate_budgets(sizes, epsilon=config.epsilon, num_free_parameters=config.num_free_parameters)


def choose_by_seed(config: DSTConfig, constraint: Constraint) -> dict[str, Tensor] | None:
    """The subset of a selection that needs nothing but the seed; None for the others.

    Returns:
        For each parameter of the constraint the positions, int64 (k,), sorted.
    """
    if config.selection not in BY_SEED:
        return None
    if config.selection == "bitfit":
        return {
            weight.name: torch.arange(weight.data.numel() if is_bias(weight.name) else 0, device="cpu")
            for weight in constraint.weights
        }
    return _choose(_SeedScores(config, constraint), constraint)


def check_memory(parameters: Iterable[nn.Parameter]) -> None:
    """Check that a subset can be given to these parameters, which starts from their values.

    Raises:
        ValueError: if one has no memory.
    """
    if any(parameter.is_meta for parameter in parameters):
        raise ValueError(
            "a static selection, or a subset to start from, takes the values of the base model, which has none yet (device "
            "'meta'). Load the base model first."
        )


def check_undivided(parameters: Iterable[nn.Parameter]) -> None:
    """Check that a subset can be chosen in these parameters, or given to them.

    Raises:
        NotImplementedError: if several processes hold one together.
    """
    check_held_alone(
        parameters,
        "choosing or giving a subset (static selections, start_from, init_weights=False)",
        "Give a dynamic run its start before the model is divided; train static selections in one process.",
    )


def choose_at_random(config: DSTConfig, constraint: Constraint) -> dict[str, Tensor]:
    """A random subset of the budget, whatever the config's selection; as `choose_by_seed` returns it."""
    shapes = {weight.name: weight.data.shape for weight in constraint.weights}
    return _choose({n: random_scores(n, shape, config.selection_seed) for n, shape in shapes.items()}, constraint)


def moved_at_random(constraint: Constraint, positions: dict[str, Tensor]) -> dict[str, Tensor]:
    """The seed's values at these positions plus a standard normal (PEFT's tests need a non-trivial adapter)."""
    seeds = {
        weight.name: weight.seeds_at(positions[weight.name].to(weight.data.device)) for weight in constraint.weights
    }
    return {name: values + torch.randn_like(values) for name, values in seeds.items()}


class _SeedScores(Mapping[str, Tensor]):
    """Scores made when they are asked for, a tensor at a time."""

    def __init__(self, config: DSTConfig, constraint: Constraint):
        self.config = config
        self.weights = {weight.name: weight for weight in constraint.weights}

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        if self.config.selection == "random":
            return random_scores(name, weight.data.shape, self.config.selection_seed)
        return magnitude_scores(_seed(weight))

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _seed(weight: SparseWeight) -> Tensor:
    """The seed of a weight, whatever is applied now."""
    if not weight.indices.numel():
        return weight.data
    seed = weight.data.clone()
    scatter(seed, *weight.noted())
    return seed


def _choose(scores: Mapping[str, Tensor], constraint: Constraint) -> dict[str, Tensor]:
    silos = {silo.name: [weight.name for weight in silo.weights] for silo in constraint.silos}
    shapes = {weight.name: weight.data.shape for weight in constraint.weights}
    return choose(scores, silos, {silo.name: silo.budget for silo in constraint.silos}, shapes=shapes)


def place(
    model: nn.Module,
    constraint: Constraint,
    positions: Mapping[str, Tensor],
    values: Mapping[str, Tensor] = MappingProxyType({}),
    fixed: bool = True,
) -> None:
    """Give an adapter a subset, which it keeps (`fixed`) or starts from.

    Args:
        model: the model.
        constraint: the adapter's.
        positions: for each of its parameters sorted positions, int64 (k,).
        values: the values there, (k,); the seed's for parameters that are not in it.
        fixed: whether it keeps that subset.
    """
    check_memory(weight.parameter for weight in constraint.weights)
    for _, marker in markers(model):
        if constraint.adapter in marker.tuned:
            names = {parameter: marker.weights[parameter].name for parameter in marker.tuned[constraint.adapter]}
            own = {parameter: values[name] for parameter, name in names.items() if name in values}
            marker.place(constraint.adapter, {p: positions[name] for p, name in names.items()}, own, fixed)


def make_room(model: nn.Module, constraint: Constraint, adapter_name: str, fixed: bool) -> None:
    """Give a new adapter the positions that another one has by now, with the seed's values.

    Args:
        model: the model.
        constraint: of the new adapter.
        adapter_name: the other one, which tunes the same parameters.
        fixed: whether the new adapter keeps that subset.
    """
    positions = {weight.name: torch.empty(0, dtype=torch.int64, device="cpu") for weight in constraint.weights}
    for _, marker in markers(model):
        records = marker.records(adapter_name) if adapter_name in marker.tuned else {}
        positions |= {marker.weights[parameter].name: record.indices.long() for parameter, record in records.items()}
    place(model, constraint, positions, fixed=fixed)


def fix_subset(
    model: nn.Module, source: Source | str | os.PathLike[str], adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Choose the subset of an adapter with a static selection, which is then all that is trained. Call it once, before
    the optimizer is made.

    Args:
        model: a model with such an adapter, as `get_peft_model` leaves it.
        source: scores, of which the largest are chosen within each silo: a mapping from names of the base model's
            parameters to tensors of their shapes, or a file of them, as `score_parameters` returns and writes them. For
            selection="transfer" the folder of another adapter, or a mapping to sorted positions, int64 (k,): the budget is
            then theirs.
        adapter_name: the adapter.

    Returns:
        The positions chosen in each parameter, int64 (k,), sorted.

    Raises:
        ValueError: if the adapter's selection takes no source, or has trained values already, or the source does not fit
            the model; nothing has been changed by then.
        NotImplementedError: if several processes hold the model together.
    """
    constraint, config = _adapter(model, adapter_name)
    if config.selection not in GIVEN:
        raise ValueError(
            f"the adapter {adapter_name!r} has selection={config.selection!r}, which takes no subset from outside. Use one "
            f"of {', '.join(map(repr, GIVEN))} in its DSTConfig; for a dynamic run that starts from a subset, see "
            "peft_dst.start_from."
        )
    _check_untrained(model, constraint)
    given = load_source(source)
    if config.selection == "transfer":
        positions = _positions(given, constraint)
    else:
        if any(not tensor.is_floating_point() for tensor in given.values()):
            raise ValueError(
                f"selection={config.selection!r} chooses by scores, but the source holds positions. Give scores "
                "(peft_dst.score_parameters), or set selection='transfer' to take over a subset as it is."
            )
        positions = _choose(given, constraint)
    if not any(at.numel() for at in positions.values()):
        raise ValueError("the source leaves no free parameter: it is empty, or all of its scores are zero.")
    if config.selection == "transfer":
        take_over(constraint, config, positions)
    place(model, constraint, positions)
    return positions


def take_over(constraint: Constraint, config: DSTConfig, positions: Mapping[str, Tensor]) -> None:
    """Make the budgets of an adapter those of a subset that it is given, int64 (k,) for each of its parameters."""
    for silo in constraint.silos:
        silo.budget = sum(positions[weight.name].numel() for weight in silo.weights)
    config.epsilon, config.num_free_parameters = None, constraint.budget


def start_from(
    model: nn.Module,
    source: Source | str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    values: bool = False,
) -> None:
    """Start a dynamic run from the subset of another adapter instead of none. Its first step keeps that subset.

    Args:
        model: a model with an adapter of selection "dynamic", as `get_peft_model` leaves it.
        source: the folder of an adapter of the same base, or (without `values`) a mapping from names of parameters to
            sorted positions, int64 (k,).
        adapter_name: the adapter to train.
        values: take over the values as well, so that their distances count from the first step on.

    Raises:
        ValueError: if the adapter is not dynamic, has trained values already, or the subset does not fit the model or
            exceeds a budget; nothing has been changed by then.
        NotImplementedError: if several processes hold the model together.
    """
    constraint, config = _adapter(model, adapter_name)
    if config.selection != "dynamic":
        raise ValueError(
            f"the adapter {adapter_name!r} has selection={config.selection!r}, which never leaves its subset. Use "
            "fix_subset, or selection='dynamic'."
        )
    _check_untrained(model, constraint)
    delta = SparseDelta.load(source) if values and isinstance(source, str | os.PathLike) else None
    if values and delta is None:
        raise ValueError("values=True takes over an adapter's values: give its folder, not only positions.")
    given = {name: tensor.indices for name, tensor in delta.items()} if delta is not None else load_source(source)
    positions = _positions(given, constraint)
    for silo in constraint.silos:
        count = sum(positions[weight.name].numel() for weight in silo.weights)
        if count > silo.budget:
            raise ValueError(
                f"the subset has {count:,} components in the silo {silo.name!r}, whose budget is {silo.budget:,}. Raise "
                "epsilon or num_free_parameters, or use the siloing that the subset was made with."
            )
    if delta is not None:
        _check_base(delta, constraint)
    taken = {name: tensor.values for name, tensor in delta.items()} if delta is not None else {}
    place(model, constraint, positions, taken, fixed=False)
    constraint.begun = True


def load_source(source: Source | str | os.PathLike[str]) -> Source:
    """Scores or positions, from a file of scores or the folder of an adapter if they are not given themselves."""
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if path.is_dir():
        return {name: tensor.indices for name, tensor in SparseDelta.load(path).items()}
    return load_scores(path)


def _adapter(model: nn.Module, adapter_name: str) -> tuple[Constraint, DSTConfig]:
    found = constraints(model)
    if adapter_name not in found:
        raise ValueError(
            f"the model has no DST adapter {adapter_name!r}; there are {', '.join(found) or 'none'}. Add one with "
            "get_peft_model(model, DSTConfig(...))."
        )
    check_undivided(weight.parameter for weight in found[adapter_name].weights)
    check_memory(weight.parameter for weight in found[adapter_name].weights)
    configs = getattr(model, "peft_config", {})
    return found[adapter_name], configs[adapter_name]


def _check_untrained(model: nn.Module, constraint: Constraint) -> None:
    for _, marker in markers(model):
        records = marker.records(constraint.adapter) if constraint.adapter in marker.tuned else {}
        for parameter, record in records.items():
            weight = marker.weights[parameter]
            if not torch.equal(record.values, weight.seeds_at(record.indices.long())):
                raise ValueError(
                    f"the adapter {constraint.adapter!r} has trained values already (in {weight.name!r}), which another "
                    "subset would lose. Add a new adapter for it: model.add_adapter(name, config)."
                )


def _check_base(delta: SparseDelta, constraint: Constraint) -> None:
    """Check that a delta's values were trained from this base.

    Raises:
        DeltaError: if not.
    """
    for weight in constraint.weights:
        if weight.name in delta and (checksums := delta[weight.name].checksums()):
            seeds = weight.seeds_at(delta[weight.name].indices.long().to(weight.data.device))
            check_seed(weight.name, checksums, seeds)


def _positions(given: Source, constraint: Constraint) -> dict[str, Tensor]:
    """Positions for every parameter of a constraint, checked to be its own."""
    weights = {weight.name: weight for weight in constraint.weights}
    for name, tensor in given.items():
        if tensor.is_floating_point() or tensor.dim() != 1:
            raise ValueError(
                f"the source holds {tensor.dtype} of shape {tuple(tensor.shape)} for {name!r}; a subset is given by sorted "
                "positions, int64 (k,), or by the folder of an adapter."
            )
        if name not in weights:
            raise ValueError(
                f"the subset has components in {name!r}, which the model does not have or this adapter does not tune. Use "
                "the base and the target_modules that it was made with."
            )
        size = weights[name].data.numel()
        if tensor.numel() and (int(tensor.min()) < 0 or int(tensor.max()) >= size or bool((tensor.diff() <= 0).any())):
            raise ValueError(
                f"the positions in {name!r} must ascend and lie within its {size:,} components. The subset was made for "
                "a base of another shape, or is damaged."
            )
    empty = torch.empty(0, dtype=torch.int64, device="cpu")
    return {name: given[name].long() if name in given else empty for name in weights}
