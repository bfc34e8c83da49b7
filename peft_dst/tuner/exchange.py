"""Between the markers and PEFT's adapter state dicts: what is saved, and what is checked before anything is loaded.

A saved adapter names its tensors without the adapter (`base_model.model.<host>._sparse.dst_indices.<parameter>`), holds
only records with entries, and describes each in its config (`records`, which a config holds from reading to loading and
from collecting to writing, and not otherwise). PEFT's own loader hands us the whole state dict, which is
checked as one; what transformers' loader has left is checked by `settling`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft.config import PeftConfig
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config import COLLECTED
from ..core import SparseWeight, gather
from ..core.shards import together
from ..delta import (
    MARKER,
    PEFT_PREFIX,
    DeltaError,
    Record,
    Summary,
    check_dense_values,
    check_record,
    find_records,
    is_wrapper_s_copy,
    pack,
    pair,
    parse_summaries,
    plain_name,
    seed_checksums,
    summarize,
)
from .constraints import constraints, processes_of
from .layer import SparseLayer, markers
from .overlay import OverlayWeight
from .records import no_entries
from .settling import check_loaded_record, not_loaded, remember_seeds
from .states import EXTRA_STATE, SEED, expanded, record_keys, seed_note


# Stands in a state dict where all processes that hold a model together collect from it: what it lacks is asked of all.
TOGETHER = "dst_together"


def collect(
    model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The adapter's records with any entries, as found in a model's state dict; their summaries go into the config.

    Raises:
        RuntimeError: if weights were changed that the constraint never saw, or the adapter's tensors were never loaded.
        ValueError: if the state dict holds the model, but not the adapter's records; or has entries of a quantised weight
            whose seed nobody has named.
    """
    kept: dict[str, Tensor] = {}
    records: dict[str, Record] = {}
    summaries: dict[str, Summary] = {}
    _check_complete(model, adapter_name)
    if any(adapter_name in m.awaited and not m.has_arrived(adapter_name) for _, m in markers(model)):
        raise not_loaded(model, adapter_name)
    # torch's own functions leave out what wrappers put into names, and modules do not.
    state_dict = {plain_name(key): tensor for key, tensor in state_dict.items()}
    asks = state_dict.pop(TOGETHER, None) is not None
    if not state_dict and (processes := processes_of(model)) is not None and not processes.is_first:
        # Gathered for another one.
        return {}
    hosted = [(plain_name(name), marker) for name, marker in markers(model)]
    state_dict |= {k: t for name, _ in hosted for k, t in expanded(state_dict, f"{name}.").items()}
    _check_seen(hosted, state_dict, asks)
    for name, marker in hosted:
        for parameter in marker.tuned.get(adapter_name, ()):
            weight = marker.weights[parameter]
            keys = record_keys(f"{name}.", adapter_name, parameter)
            if keys[0] not in state_dict and adapter_name in weight.adapters and weight.indices.numel():
                raise _incomplete(keys[0])
            if keys[0] in state_dict and state_dict[keys[0]].numel():
                weight.check_memory()
                record = Record(*(state_dict[key] for key in keys))
                if isinstance(weight, OverlayWeight):
                    record, summaries[weight.name] = weight.original(adapter_name, record)
                else:
                    seeds = _seeds(weight, name, record, state_dict, asks)
                    summaries[weight.name] = summarize(record, seed_checksums(seeds), weight.shape)
                kept |= dict(zip(keys, record, strict=True))
                records[weight.name] = record
    config.__dict__[COLLECTED] = {name: list(summary) for name, summary in summaries.items()}
    return pack(records, summaries) if config.packed else kept


def collect_divided(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The adapter's records as a checkpoint of a model gets them that several processes hold together: one value for each
    marker, whatever is in it, because torch.distributed.checkpoint loads into what is there.
    """
    kept: dict[str, Any] = {}
    for name, marker in markers(model):
        if adapter_name in marker.tuned:
            name = name if f"{name}.{EXTRA_STATE}" in state_dict else plain_name(name)
            found = expanded(state_dict, f"{name}.")
            own = {key: tensor for key, tensor in found.items() if key.split(".")[-2] == adapter_name}
            names = {key: ".".join([*key.removeprefix(f"{name}.").split(".")[:-2], key.split(".")[-1]]) for key in own}
            kept[f"{name}.{EXTRA_STATE}"] = save({names[key]: t for key, t in own.items() if ".sizes." not in key})
    return kept


def check_and_name(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    state_dict: dict[str, Tensor],
    ignore_mismatched_sizes: bool = False,
) -> dict[str, Tensor]:
    """Check every tensor of an adapter's state dict against the model, and give records' keys the adapter's name.

    Records of an adapter that has others get the new ones' sizes: PEFT's option `ignore_mismatched_sizes` would leave out
    those that have another. It is for dense tensors alone.

    Raises:
        DeltaError: if a tensor is malformed or the base is another one; nothing has been changed by then.
    """
    divided = [key for key in state_dict if key.endswith(f".{MARKER}.{EXTRA_STATE}")]
    found = [expanded(state_dict, key.removesuffix(EXTRA_STATE)) for key in divided]
    rest = {key: tensor for key, tensor in state_dict.items() if key not in divided}
    loaded, others = find_records({**rest, **{k: t for one in found for k, t in one.items() if t.numel()}})
    named = _check_dense(model, adapter_name, others)
    if not ignore_mismatched_sizes:
        _check_shapes(model, named)
    dense = {key.removeprefix(PEFT_PREFIX) for key in named}
    summaries = parse_summaries(config.records)
    # An adapter that is loaded again (Trainer: resume, best checkpoint) was not announced by a config.
    announced = config.records is not None
    records: dict[SparseLayer, dict[str, Record]] = {}
    for name, marker in markers(model):
        for parameter in marker.tuned.get(adapter_name, ()):
            weight = marker.weights[parameter]
            parts = loaded.pop(weight.name, None)
            record = no_entries(weight) if parts is None else pair(weight.name, parts)
            # An embedding that PEFT saved whole brings its seed along.
            comparable = announced and weight.name not in dense
            check_loaded_record(weight, record, summaries.get(weight.name) if comparable else None)
            if announced and record.indices.numel() and weight.name not in summaries:
                raise DeltaError(
                    f"{weight.name!r} has entries in adapter_model.safetensors but none according to "
                    "adapter_config.json. The two files come from different saves; copy or download both again."
                )
            records.setdefault(marker, {})[parameter] = record
            named |= zip(record_keys(f"{name}.", adapter_name, parameter), record, strict=True)
    if loaded:
        raise DeltaError(
            f"the adapter has entries for {next(iter(loaded))!r} ({len(loaded)} such tensors), which the model does not "
            "have or the adapter's config does not tune. Load it onto the base named in adapter_config.json."
        )
    constraint = constraints(model)[adapter_name]
    budget, entries = constraint.budget, sum(r.indices.numel() for found in records.values() for r in found.values())
    # A tracked threshold may keep more.
    if entries > budget and not constraint.tracking:
        raise DeltaError(
            f"the adapter file has {entries:,} entries, but the config of {adapter_name!r} allows {budget:,} free "
            "parameters. It was saved with another epsilon, or for a base of another size (a resized vocabulary); load it "
            "under a name of its own, with its own config, onto its own base."
        )
    for _, marker in markers(model):
        remember_seeds(marker, adapter_name, summaries)
    if all(marker.has_memory(adapter_name) for _, marker in markers(model) if adapter_name in marker.tuned):
        # Otherwise the base is still to be loaded, and is compared when it is there.
        config.records = None
    for marker, own in records.items():
        if adapter_name not in marker.awaited and marker.has_memory(adapter_name):
            marker.make_room(adapter_name, own)
    # What is loaded was trained already.
    constraint.begun = False
    return named


def _check_dense(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Besides records a file may hold the adapter's dense copies, and embeddings that PEFT saves when they were resized.

    PEFT saves everything below such an embedding; of a marker's own notes the seed is of use, and sizes are not.
    """
    ends: list[Any] = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    embeddings = {name: module for name, module in model.named_modules() if any(module is end for end in ends)}
    kept = {}
    for key, tensor in tensors.items():
        host, _, note = key.partition(f".{MARKER}.")
        if host in embeddings and note in ("sizes", f"sizes.{adapter_name}"):
            continue
        if is_wrapper_s_copy(key, tensors, adapter_name):
            continue
        part, _, parameter = note.partition(".")
        if host in embeddings and part in SEED:
            parts = [tensors.get(f"{host}.{MARKER}.{p}.{parameter}") for p in SEED]
            if any(p is None for p in parts) or f"{host}.{parameter}" not in tensors:
                raise DeltaError(f"{key!r} stands in the adapter file without what belongs to it. It is damaged.")
            whole = tensors[f"{host}.{parameter}"]
            check_record(key, whole.numel(), whole.dtype, Record(*(p for p in parts if p is not None)))
        elif f".modules_to_save.{adapter_name}." not in key and key.rpartition(".")[0] not in embeddings:
            raise DeltaError(
                f"the adapter file holds a dense tensor {key!r}, which would overwrite the base model's own. A DST "
                "adapter holds positions and values, and dense tensors of its modules_to_save only."
            )
        check_dense_values(key, tensor)
        kept[key] = tensor
    return kept


def _check_shapes(model: nn.Module, dense: Mapping[str, Tensor]) -> None:
    everything = *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
    for key, own in everything if dense else ():
        if key in dense:
            check_shape(key, own, dense[key])


def check_shape(key: str, own: Tensor, loaded: Tensor | None) -> None:
    """Check a dense tensor of an adapter, or None if there is none, against that of the model which it is loaded over.

    Raises:
        DeltaError: if it has another shape.
    """
    if loaded is None or loaded.shape != own.shape:
        shape = "none" if loaded is None else str(tuple(loaded.shape))
        raise DeltaError(
            f"{key!r} has shape {tuple(own.shape)} in the model, and {shape} in the adapter file. Load it onto "
            "a base with the num_labels (or the vocabulary) that it was trained with. Adapters that replace one another "
            "need the widest head of them all."
        )


def _check_complete(model: nn.Module, adapter_name: str) -> None:
    """A module that is replaced takes its marker along, and leaves the adapter without what it tuned there."""
    present = {id(weight) for _, marker in markers(model) for weight in marker.weights.values()}
    for weight in constraints(model)[adapter_name].weights:
        if id(weight) not in present:
            raise RuntimeError(
                f"the module of {weight.name!r} was replaced since the adapter {adapter_name!r} was added, so what was "
                "trained there cannot be saved. Change the base model (resize_token_embeddings replaces an output head) "
                "before get_peft_model."
            )


def _check_seen(hosted: Sequence[tuple[str, SparseLayer]], state_dict: Mapping[str, Tensor], asks: bool) -> None:
    weights = {(name, w.attribute): w for name, marker in hosted for w in marker.weights.values()}
    gathered = {key: _whole(weight, key[0], state_dict) for key, weight in weights.items() if weight.is_divided}
    asked = [weights[key] for key, whole in gathered.items() if whole is None] if asks else []
    processes = together(weight.box for weight in asked)
    changed = None
    with processes.all_or_none("saving") if processes is not None else nullcontext():
        for number, ((marker, _), weight) in enumerate(weights.items()):
            weight.recover()
            weight.seed_checksum.check_shape()
            whole = gathered.get((marker, weight.attribute))
            intact = weight.seed_checksum.is_intact()
            if intact and whole is not None:
                positions, seeds = _subset(weight, marker, whole, state_dict)
                intact = weight.seed_checksum.whole_is_intact(whole, seeds, gather(whole, positions))
            if changed is None and not intact:
                changed = number
    if processes is not None:
        # Whoever finds a change in its part, none may go on and wait for the others.
        first = torch.tensor(len(weights) if changed is None else changed, device=asked[0].data.device)
        found = int(processes.reduce(first, torch.distributed.ReduceOp.MIN))
        changed = found if found < len(weights) else None
    if changed is not None:
        culprit = list(weights.values())[changed]
        if culprit.seed_checksum.was_narrowed():
            raise RuntimeError(
                f"{culprit.name!r} was cast to a narrower dtype behind the adapter's back (`.data` of a parameter was "
                "replaced, or a module that only shares it was cast), so nobody can tell whether it is still the seed "
                "outside the subset, and it cannot be saved as a delta. Cast the whole model, with model.to(dtype)."
            )
        raise RuntimeError(
            f"{culprit.name!r} differs from the seed outside the subset: its weights were changed "
            "without the constraint being enforced, so they cannot be saved as a delta. Train with a torch.optim "
            "optimizer, whose step the constraint hooks (what steps copies of the weights, or is no torch.optim.Optimizer, "
            "is not reached), and do not edit the weights otherwise."
        )


def _subset(
    weight: SparseWeight, marker: str, whole: Tensor, state_dict: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of a weight that a state dict has gathered: flat positions of its subset, int64 (k,), and the seed's values there."""
    note = seed_note(state_dict, f"{marker}.", weight.attribute)
    if note is None and weight.indices.numel():
        raise _incomplete(f"{marker}.{SEED[0]}.{weight.attribute}")
    indices, seeds = note or (whole.new_empty(0, dtype=torch.int64), whole.new_empty(0))
    return indices.to(whole.device), seeds.to(whole)


def _incomplete(key: str) -> ValueError:
    return ValueError(
        f"the state dict that is to be saved lacks {key!r}, without which the adapter cannot be. Give it as the model's "
        "state_dict() returns it, or torch.distributed's get_model_state_dict, with nothing left out; or give none."
    )


def _whole(weight: SparseWeight, marker: str, state_dict: Mapping[str, Tensor]) -> Tensor | None:
    """All of a weight that several processes hold together, if a state dict has it: gathered for one process, which then
    saves by itself (Accelerate, Trainer).
    """
    found = state_dict.get(f"{marker.removesuffix(MARKER)}{weight.attribute}")
    return None if isinstance(found, DTensor) else found


def _seeds(weight: SparseWeight, marker: str, record: Record, state_dict: Mapping[str, Tensor], asks: bool) -> Tensor:
    """Seed values at the positions of a record that is saved."""
    positions = record.indices.to(weight.data.device, torch.int64)
    whole = _whole(weight, marker, state_dict) if weight.is_divided else None
    if whole is None and weight.is_divided and not asks:
        raise _incomplete(marker.removesuffix(MARKER) + weight.attribute)
    if whole is None:
        return weight.whole_seeds_at(positions)
    positions = positions.to(whole.device)
    seeds = gather(whole, positions)
    indices, values = _subset(weight, marker, whole, state_dict)
    if indices.numel():
        slot = torch.searchsorted(indices, positions).clamp_max_(indices.numel() - 1)
        seeds = torch.where(indices[slot] == positions, values[slot], seeds)
    return seeds
