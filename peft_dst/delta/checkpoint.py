"""The tensors of a checkpoint's safetensors files, mapped into memory: pages are read when touched, and may be dropped.

`safe_open` does not copy: a tensor of it is a private view of the file's pages, which count as the file's cache and not
as the process's own memory. So a list of all tensors of a model costs nothing, and `select` works on it as on any other.

A delta's names are those of a model's parameters; a checkpoint's may lack the prefix of the body (`bert.`), have one more,
be older ones, or name a tied tensor twice. `place` finds where each tensor of a delta stands, and checks everything that
takes a base.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import MARKER, PEFT_PREFIX, check_dense_values
from .records import DeltaError, is_comparable
from .sparse import SparseDelta
from .tensors import SparseTensor


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What checkpoints hold, by its name in their headers.
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of a folder that `save_pretrained` wrote, by their names in the file.

    A tensor is mapped at every look-up; it is not to be written to.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the shards that it names.

    Raises:
        ValueError: if it holds neither, or they are damaged.
    """

    def __init__(self, folder: str | PathLike[str]):
        self.folder = folder = Path(folder)
        if (folder / SINGLE).is_file():
            file = open_file(folder / SINGLE)
            self._files: dict[str, Any] = dict.fromkeys(file.keys(), file)
            #: Name → the file it stands in.
            self.shards: dict[str, str] = dict.fromkeys(self._files, SINGLE)
        elif (folder / INDEX).is_file():
            self._files, self.shards = _open_shards(folder)
        else:
            raise ValueError(
                f"{folder} holds neither {SINGLE} nor {INDEX}. Give the folder of a checkpoint in safetensors (of a Hub "
                "id, what huggingface_hub.snapshot_download returns), or load the model and pass it instead."
            )

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_file(path: Path) -> Any:
    """Open a safetensors file.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). It is damaged or missing; save or download it again."
        ) from error


def _open_shards(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    path = folder / INDEX
    try:
        places = {str(name): str(shard) for name, shard in json.loads(path.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has no readable weight_map. It is damaged; save or download it again.") from error
    for shard in places.values():
        if Path(shard).name != shard:
            raise ValueError(
                f"{path} names a shard {shard!r} outside its folder. Use a checkpoint from a trusted source."
            )
    shards = {shard: open_file(folder / shard) for shard in sorted(set(places.values()))}
    found = {shard: set(file.keys()) for shard, file in shards.items()}
    for name, shard in places.items():
        if name not in found[shard]:
            raise ValueError(f"{shard} does not hold {name!r}, which {path} says it does. Save or download both again.")
    return {name: shards[shard] for name, shard in places.items()}, places


class Layout(NamedTuple):
    """What a model class knows of its checkpoint, and a file does not say. Without it, names are taken as they are.

    Attributes:
        names: checkpoint's name → parameter's name, of the tensors that loading takes as they are; those that it joins,
            splits or turns are not there. Empty if all names are the same.
        tied: names of parameters that are one and the same.
    """

    names: Mapping[str, str] = {}
    tied: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Placement:
    """Where a delta's tensors stand in a checkpoint. All has been checked.

    Attributes:
        entries: name in the checkpoint → its entries, with the values in its dtype and the seeds; a tied tensor that the
            checkpoint holds more than once is there under each name.
        replaced: name in the checkpoint → the dense tensor in its place.
        added: name that the checkpoint does not have → dense tensor.
        not_compared: names of the delta's tensors whose checksums say nothing of the base's dtype.
        prefix: what the delta's names have in front of the checkpoint's ("bert."), or nothing.
    """

    entries: dict[str, SparseTensor]
    replaced: dict[str, Tensor]
    added: dict[str, Tensor]
    prefix: str
    not_compared: tuple[str, ...] = ()


def place(delta: SparseDelta, base: Checkpoint, layout: Layout | None = None) -> Placement:
    """Find a delta's tensors in the checkpoint of its base, and check that it is its base.

    Args:
        delta: the delta.
        base: the checkpoint; only read.
        layout: what the base's model class knows of it.

    Raises:
        DeltaError: naming the tensor, if the checkpoint does not have it, or in another shape, or with other values than
            the delta was made from; or if a dense tensor would overwrite what is not in modules_to_save.
    """
    layout = layout or Layout()
    # As a parameter is called in the base's own class → in the file.
    there = {layout.names[name]: name for name in base if name in layout.names} or {name: name for name in base}
    twins = {name: tuple(group) for group in layout.tied for name in group}
    spelling = _spelling(delta, base, there, twins)
    places = {name: _copies(base, spelling.of(name), there, twins) for name in delta}
    seeded = delta.with_seeds({name: base[copies[0]] for name, copies in places.items()})
    entries = {
        copy: SparseTensor(tuple(base[copy].shape), tensor.indices, tensor.values.to(base[copy].dtype), tensor.seeds)
        for name, tensor in seeded.items()
        for copy in places[name]
    }
    replaced, added = _place_dense(delta, base, there, spelling)
    if both := entries.keys() & replaced.keys():
        raise DeltaError(
            f"{min(both)!r} has entries, and a dense tensor in its place. The file was edited; save it again."
        )
    checksums = {name: tensor.checksums() for name, tensor in delta.items()}
    unknown = [
        name for name, known in checksums.items() if known and not is_comparable(known, base[places[name][0]].dtype)
    ]
    return Placement(entries, replaced, added, spelling.dropped, tuple(unknown))


class _Spelling(NamedTuple):
    """How the base's class calls the delta's parameters: by a prefix less, or one more."""

    dropped: str = ""
    more: str = ""

    def of(self, name: str) -> str:
        return self.more + name.removeprefix(self.dropped)


def _spelling(
    delta: SparseDelta, base: Checkpoint, there: Mapping[str, str], twins: Mapping[str, Sequence[str]]
) -> _Spelling:
    """Find it: the checkpoint of a body lacks the prefix of a model with a head, and the other way round.

    `from_pretrained` knows the prefix from the class; here it is the one that makes all names fit.
    """

    def missing(spelling: _Spelling) -> list[str]:
        names = [(name, spelling.of(name)) for name in delta]
        return [name for name, own in names if not any(twin in there for twin in (own, *twins.get(own, ())))]

    lost = missing(_Spelling())
    if not lost:
        return _Spelling()
    first = lost[0].partition(".")[0] + "."
    candidates = [_Spelling(dropped=first)] if all(name.startswith(first) for name in delta) else []
    candidates += [_Spelling(more=more) for more in sorted({name.partition(".")[0] + "." for name in there})]
    for spelling in candidates:
        if not missing(spelling):
            return spelling
    raise DeltaError(
        f"{lost[0]!r}: the checkpoint {base.folder} has no such tensor ({len(lost)} of the delta's). Either the delta "
        "belongs to another base, or transformers joins or turns tensors when it loads this one, so that the delta's "
        "positions mean nothing in the file. Then merge in memory, and save: PeftModel.from_pretrained(model, "
        "adapter).merge_and_unload().save_pretrained(folder)."
    )


def _copies(base: Checkpoint, name: str, there: Mapping[str, str], twins: Mapping[str, Sequence[str]]) -> list[str]:
    """Where the checkpoint holds a parameter; a twin with other values is a tensor of its own."""
    found = [there[twin] for twin in dict.fromkeys((name, *twins.get(name, ()))) if twin in there]
    first = base[found[0]]
    return [copy for copy in found if copy == found[0] or _same(first, base[copy])]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    check_dense_values(key, cast)
    return cast


def _place_dense(
    delta: SparseDelta, base: Checkpoint, there: Mapping[str, str], spelling: _Spelling
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    kept = tuple(delta.config.get("modules_to_save") or ())
    floating = {base[name].dtype for name in base if base[name].is_floating_point()}
    replaced, added = {}, {}
    for key, tensor in delta.dense.items():
        if not key.startswith(PEFT_PREFIX) or tensor.dtype not in SAFETENSORS_DTYPES:
            raise DeltaError(
                f"{key!r} is dense, of {tensor.dtype}; expected is a key that begins with {PEFT_PREFIX!r}, and a dtype "
                "that checkpoints have. The file was edited; save it again."
            )
        name = key.removeprefix(PEFT_PREFIX)
        parts = name.split(".")
        around = [".".join(parts[:length]) for length in range(1, len(parts))]
        if MARKER in parts or not any(module.endswith(kept) for module in around):
            raise DeltaError(
                f"{key!r} is dense, and belongs to none of the adapter's modules_to_save ({', '.join(kept) or 'none'}): it "
                "would overwrite the base. If it is an embedding that was resized for training, resize the base likewise "
                "and merge in memory: PeftModel.from_pretrained(model, adapter).merge_and_unload()."
            )
        # In the dtype of the model that PEFT would load them into.
        if copy := there.get(spelling.of(name)):
            replaced[copy] = _cast(key, tensor, base[copy].dtype)
        elif len(floating) == 1 and tensor.is_floating_point():
            added[name] = _cast(key, tensor, min(floating, key=str))
        else:
            added[name] = tensor
    return replaced, added
