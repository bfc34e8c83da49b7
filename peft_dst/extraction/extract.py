"""A fully fine-tuned checkpoint made into an adapter: "pruning without re-training" of the second paper (Section 3.2).

The base's tensors are put into the tuned model's modules (`skeleton`), PEFT wraps these as it wraps any model, and every
silo's subset is chosen by the `select` that training uses; its records then stand where training would have left them,
and PEFT saves them. Base tensors are only read: the adapter is never written into them.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import DSTConfig
from ..core import NonFiniteDistanceError, Selection, Silo, select
from ..core.choice import divisors_of
from ..delta import Record, index_dtype, new_folder, plain_name
from ..tuner.layer import SparseLayer, markers
from . import skeleton
from .figures import Extraction, SiloFigures, joined, measure
from .skeleton import Parameters, Source


ADAPTER = "default"


@torch.no_grad()
def extract(
    base: Source,
    tuned: Source,
    output: str | PathLike[str],
    config: DSTConfig,
    *,
    model_class: Callable[[Any], nn.Module] | None = None,
    progress: bool = True,
) -> Extraction:
    """Turn a fully fine-tuned checkpoint into an adapter over its base, and save it.

    In every silo the budget's largest distances between seed and tuned weights keep the tuned value, all else goes back
    to the seed ("pruning without re-training" of the second paper; diff pruning, Guo et al. 2021, is this with
    distance="absolute"). Which parameters, silos and budgets is the config's to say, as for training. Modules in
    modules_to_save are kept whole. Tuned values are rounded to the base's dtype before anything is compared. The
    selection is "dynamic": the others choose before training, or by its first step.

    Args:
        base: the seed: a folder with `model.safetensors` or its shards, which is mapped and never loaded; or a model,
            compiled or not; or a state dict. None of them is changed.
        tuned: the fine-tuned model, likewise.
        output: folder for the adapter. A folder that holds one already is overwritten, as `save_pretrained` does.
        config: the options; its threshold is taken to be "exact".
        model_class: class of the tuned model if config.json does not name it or transformers does not have it; called
            with the config.
        progress: show a bar over the silos.

    Returns:
        What was kept and what was cut off.

    Raises:
        ValueError: if the two models do not belong together, the config does not suit them or has another selection, or
            output is a folder with something else in it. Nothing has been written by then.
    """
    output = Path(output)
    _check_selection(config)
    _check_output(output)
    base, tuned = skeleton.unwrapped(base), skeleton.unwrapped(tuned)
    structure = skeleton.structure_of(base, tuned, model_class)
    seeds = skeleton.read(structure, skeleton.tensors_of(base, "base"), "base")
    updates = skeleton.read(structure, skeleton.tensors_of(tuned, "tuned"), "tuned")
    skeleton.check_complete(structure, updates, own=not isinstance(tuned, Mapping))
    model, dense = _wrap(structure, seeds, updates, config, _name_of(base))
    silos, parameters = _choose(model, updates.found, progress)
    tuned_names = {weight.name for silo in model.base_model.constraint(ADAPTER).silos for weight in silo.weights}
    untuned, not_carried = _account_for_the_rest(seeds, updates, tuned_names, set(dense), config.distance)
    extraction = Extraction(
        output, tuple(silos), untuned, tuple(dense), seeds.unused, updates.unused, tuple(not_carried), tuple(parameters)
    )
    if not extraction.total.changed and not dense:
        raise ValueError(
            "base and tuned have the same weights: there is nothing to extract. Check which two were given."
        )
    _save(model, output)
    return extraction


def _check_selection(config: DSTConfig) -> None:
    if config.selection != "dynamic":
        raise ValueError(
            "what is extracted are the largest distances of a finished training, as selection='dynamic' has them; got "
            f"{config.selection!r}. Leave selection out, and with 'bitfit' give epsilon or num_free_parameters; to train "
            "such a subset wrap the base with get_peft_model."
        )


def _check_output(output: Path) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        path = output / CONFIG_NAME
        try:
            if json.loads(path.read_text()).get("peft_type") == "DST":
                return
        except (OSError, ValueError, AttributeError):
            pass
        raise ValueError(
            f"{output} exists and holds something else than a DST adapter, which would be overwritten. Give a new folder."
        )


def _name_of(base: Source) -> str | None:
    if isinstance(base, nn.Module):
        return base.__dict__.get("name_or_path") or None
    return None if isinstance(base, Mapping) else str(base)


def _wrap(
    structure: nn.Module, seeds: Parameters, updates: Parameters, config: DSTConfig, base_name: str | None
) -> tuple[PeftModel, list[str]]:
    """A PeftModel over the seed, with the dense copies filled, and the names of these.

    Raises:
        ValueError: if the config does not suit the model, or does not keep whole what cannot be compared.
    """
    stand_ins = {}
    for name, tensor in updates.found.items():
        if name not in seeds.found:
            stand_ins[name] = ""
        elif seeds.found[name].shape != tensor.shape:
            stand_ins[name] = (
                f"{tuple(seeds.found[name].shape)} in the base and {tuple(tensor.shape)} in the tuned model"
            )
    own = copy.deepcopy(config)
    # PEFT notes the seed of what is to be trained; nothing is here.
    own.inference_mode, own.init_weights, own.records = True, True, None
    own.base_model_name_or_path = config.base_model_name_or_path or base_name
    tensors = {name: tensor if name in stand_ins else seeds.found[name] for name, tensor in updates.found.items()}
    bare = skeleton.build(structure, tensors, updates.buffers, own.base_model_name_or_path)
    model = get_peft_model(bare, own, ADAPTER, autocast_adapter_dtype=False)
    model.base_model.constraint(ADAPTER).retire()
    dense = _fill_dense(model, structure, updates.found)
    skeleton.check_dense(stand_ins, set(dense), seeds)
    return model, dense


def _fill_dense(model: PeftModel, structure: nn.Module, updates: Mapping[str, Tensor]) -> list[str]:
    """Write the tuned values into the dense copies (modules_to_save), and return their parameters' names."""
    first = {alias: name for name, aliases in skeleton.names_of(structure).items() for alias in aliases}
    filled = []
    for host, wrapper in model.get_base_model().named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            for name, parameter in wrapper.modules_to_save[ADAPTER].named_parameters():
                filled.append(first[plain_name(f"{host}.{name}")])
                parameter.data.copy_(updates[filled[-1]])
    return filled


def _choose(
    model: PeftModel, updates: Mapping[str, Tensor], progress: bool
) -> tuple[list[SiloFigures], list[SiloFigures]]:
    """Choose every silo's subset and write it into the records, not into the weights, which are the base's own.

    Returns:
        The figures of the silos, and of their parameters.
    """
    owners: dict[int, tuple[SparseLayer, str]] = {}
    for _, marker in markers(model):
        marker.enable_adapters(False)
        owners |= {id(weight): (marker, parameter) for parameter, weight in marker.weights.items()}
    constraint = model.base_model.constraint(ADAPTER)
    figures, by_parameter = [], []
    for silo in tqdm(constraint.silos, desc="extract", unit="silo", disable=not progress):
        seeds = [weight.flat() for weight in silo.weights]
        # In the base's dtype from the start: a change that rounds to nothing must not take a place of the budget.
        tuned = [updates[w.name].to(seed).reshape(-1) for w, seed in zip(silo.weights, seeds, strict=True)]
        divisors = divisors_of(silo, constraint)
        selection = _select(silo, seeds, tuned, constraint.distance, divisors)
        parts = []
        each = divisors or [1.0] * len(seeds)
        for weight, seed, new, indices, divisor in zip(
            silo.weights, seeds, tuned, selection.indices, each, strict=True
        ):
            marker, parameter = owners[id(weight)]
            record = Record(indices.to(index_dtype(new.numel())), new.index_select(0, indices))
            marker.write_record(ADAPTER, parameter, record)
            parts.append(measure(weight.name, seed, new, indices, constraint.distance, divisor))
        figures.append(joined(silo.name, parts, silo.budget, float(selection.threshold)))
        by_parameter += parts
    return figures, by_parameter


def _select(silo: Silo, seeds: list[Tensor], tuned: list[Tensor], kind: str, divisors: list[float] | None) -> Selection:
    try:
        return select(seeds, tuned, silo.budget, kind, divisors)
    except NonFiniteDistanceError as error:
        name = silo.weights[error.position].name
        which = "tuned" if torch.isfinite(seeds[error.position]).all() else "base"
        raise ValueError(
            f"{name!r} holds values in the {which} model that are not finite, or too large to be compared in "
            f"{seeds[error.position].dtype}. Leave it out with exclude_modules, or use another checkpoint."
        ) from error


def _account_for_the_rest(
    seeds: Parameters, updates: Parameters, tuned: set[str], dense: set[str], kind: str
) -> tuple[SiloFigures, list[str]]:
    """Figures of the parameters that the config does not tune, and names of what differs and no adapter can hold."""
    parts, not_carried = [], []
    for name, seed in seeds.found.items():
        if name not in tuned and name not in dense:
            new = updates.found[name].to(seed)
            if seed.is_floating_point() and seed.element_size() > 1:
                nothing = torch.empty(0, dtype=torch.int64, device=seed.device)
                parts.append(measure(name, seed.reshape(-1), new.reshape(-1), nothing, kind))
            elif not torch.equal(seed, new):
                not_carried.append(name)
    whole = {name.rpartition(".")[0] for name in dense}
    for name in seeds.buffers.keys() & updates.buffers.keys():
        seed, new = seeds.buffers[name], updates.buffers[name]
        if name.rpartition(".")[0] not in whole and (seed.shape != new.shape or not torch.equal(seed, new.to(seed))):
            not_carried.append(name)
    return joined("not tuned", parts, 0), sorted(not_carried)


def _save(model: PeftModel, output: Path) -> None:
    """Write the adapter: a new folder is there when it is whole, and in one that is there each file is replaced whole."""
    with contextlib.nullcontext(output) if output.exists() else new_folder(output) as folder:
        # Of the embeddings nothing is new but what the records hold.
        model.save_pretrained(str(folder), save_embedding_layers=False)
