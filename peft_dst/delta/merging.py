"""A delta put into its base's checkpoint on disk: the full checkpoint that `merge_and_unload` and `save_pretrained` give,
without a model and without the memory for one.

Each file is read once and written once, a few megabytes at a time; the delta's values are written over the base's as they
pass. Tensors keep their dtype, so their bytes are the base's but for those.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .checkpoint import INDEX, SAFETENSORS_DTYPES, SINGLE, Checkpoint, Layout, Placement, place
from .records import DeltaError
from .sparse import SparseDelta
from .tensors import SparseTensor


# Read and written at once; a multiple of every dtype's size.
CHUNK = 1 << 24
# The same weights in other forms, which would be the base's in the folder of the merged model.
_OTHER_FORMS = re.compile(r".*\.(bin|safetensors|pt|pth|ckpt|h5|msgpack|ot|gguf|onnx|tflite)(\.index\.json)?")
_OTHER_FOLDERS = {"onnx", "openvino", "original", "coreml"}


class Merged(NamedTuple):
    """What a merge wrote.

    Attributes:
        tensors: names of the tensors with entries.
        entries: number of values written over the base's, tied tensors counted once for each copy.
        replaced: names of the tensors that a dense one stands in for.
        added: names of the dense tensors that the base does not have.
        reshaped: those of `replaced` that have another shape than in the base, so config.json has to be edited.
        size: bytes of all tensors.
    """

    tensors: tuple[str, ...]
    entries: int
    replaced: tuple[str, ...]
    added: tuple[str, ...]
    reshaped: tuple[str, ...]
    size: int


class _Item(NamedTuple):
    """A tensor to write: a range of bytes of the base's file with values to put over it, or a tensor of its own."""

    dtype: str
    shape: list[int]
    source: tuple[int, int] | Tensor
    entries: SparseTensor | None = None

    @property
    def size(self) -> int:
        if isinstance(self.source, Tensor):
            return self.source.numel() * self.source.element_size()
        return self.source[1] - self.source[0]


def merge(
    base: str | PathLike[str],
    delta: SparseDelta,
    output: str | PathLike[str],
    *,
    layout: Layout | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> Merged:
    """Write the checkpoint of a base with a delta in it. Takes the memory of the delta, whatever the size of the base.

    All of the base's folder is copied but its weights in other forms; dense tensors (modules_to_save) go in under their
    own names. The folder is written beside its place and renamed when it is whole.

    Args:
        base: folder of the base's checkpoint, with `model.safetensors` or its shards; only read.
        delta: what to put into it.
        output: a folder that is not there yet, or is empty.
        layout: what the base's model class knows of the checkpoint.
        on_bytes: called with the number of bytes after each chunk, for a progress bar.

    Raises:
        DeltaError: if the base is not the delta's, or the delta is malformed (`place`).
        ValueError: if output holds something, or base is no checkpoint. Nothing has been written by then.
    """
    output = Path(output)
    check_free(output, beside=Path(base))
    checkpoint = Checkpoint(base)
    placement = place(delta, checkpoint, layout)
    reshaped = tuple(placement.prefix + n for n, t in placement.replaced.items() if t.shape != checkpoint[n].shape)
    with new_folder(output) as folder:
        copy_others(checkpoint.folder, folder)
        size = _write_weights(checkpoint, placement, folder, on_bytes or (lambda count: None))
    return Merged(
        tuple(placement.prefix + name for name in placement.entries),
        sum(len(tensor) for tensor in placement.entries.values()),
        tuple(placement.prefix + name for name in placement.replaced),
        tuple(placement.added),
        reshaped,
        size,
    )


def check_free(output: Path, beside: Path | None = None) -> None:
    """Check that nothing is where something is to be written.

    Args:
        output: where.
        beside: a folder that is read meanwhile, and must not become larger by it.

    Raises:
        ValueError: if there is something, or it is inside the folder that is read.
    """
    if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
        raise ValueError(f"{output} exists already. Give another name, or remove it first.")
    if beside is not None and beside.is_dir() and output.resolve().is_relative_to(beside.resolve()):
        raise ValueError(f"{output} is inside of {beside}, which is read. Give a place outside.")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside a place, to write into; when that is done it is renamed into its place, and else it is removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=output.parent, prefix=f".{output.name}.", ignore_cleanup_errors=True
    ) as around:
        # That one is private.
        folder = Path(around) / output.name
        folder.mkdir()
        yield folder
        os.replace(folder, output)


def copy_others(folder: Path, target: Path) -> None:
    """Copy what stands beside a model's weights: configs, tokenizer, model card, folders of further modules.

    Links are followed to files of the folder itself and of the Hub's cache, which consists of them.

    Raises:
        ValueError: if a link leads elsewhere.
    """
    # The cache has snapshots/<revision>/<file> -> ../../blobs/<hash>.
    roots = (folder.resolve(), folder.absolute().parent.parent / "blobs")
    for path in _files(folder):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
            raise ValueError(f"{path} is a link that leads out of its folder. Remove it, or put the file in its place.")
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)


def _files(folder: Path, inside: bool = False) -> list[Path]:
    """Regular files to copy, and links to such; not below links, which may go round in circles."""
    found = []
    for path in sorted(folder.iterdir()):
        # Folders of further modules have weights of their own.
        weights = not inside and (path.name == INDEX or _OTHER_FORMS.fullmatch(path.name))
        if path.is_file() and not weights and path.name[0] != ".":
            found.append(path)
        elif path.is_dir() and not path.is_symlink() and path.name not in _OTHER_FOLDERS and path.name[0] != ".":
            found += _files(path, inside=True)
    return found


def _write_weights(base: Checkpoint, placement: Placement, folder: Path, on_bytes: Callable[[int], object]) -> int:
    """Write all shards, and their index if there is one; return the bytes of all tensors."""
    shards = sorted(set(base.shards.values()))
    places: dict[str, str] = {}
    total = 0
    for shard in shards:
        items, metadata = _items(base, shard, placement)
        if shard == shards[-1]:
            for name, tensor in placement.added.items():
                items[name] = _Item(SAFETENSORS_DTYPES[tensor.dtype], list(tensor.shape), tensor)
        with open(base.folder / shard, "rb") as source, open(folder / shard, "wb") as target:
            _write_file(source, target, items, metadata, on_bytes)
        places |= dict.fromkeys(items, shard)
        total += sum(item.size for item in items.values())
    if shards != [SINGLE]:
        more = sum(t.numel() for t in placement.added.values())
        more += sum(t.numel() - base[name].numel() for name, t in placement.replaced.items())
        _write_index(base, folder, places, total, more)
    return total


def _items(base: Checkpoint, shard: str, placement: Placement) -> tuple[dict[str, _Item], dict[str, str]]:
    """The tensors of one of the base's files as they are to be written, by their names in the merged one; its metadata."""
    with open(base.folder / shard, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    items = {}
    for name, said in header.items():
        if name in placement.replaced:
            tensor = placement.replaced[name]
            item = _Item(SAFETENSORS_DTYPES[tensor.dtype], list(tensor.shape), tensor)
        else:
            start, end = (8 + length + offset for offset in said["data_offsets"])
            item = _Item(said["dtype"], said["shape"], (start, end), placement.entries.get(name))
        items[placement.prefix + name] = item
    return items, metadata


def _write_file(
    source: BinaryIO,
    target: BinaryIO,
    items: Mapping[str, _Item],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], object],
) -> None:
    """Write a safetensors file. The widest dtypes come first, as in all of them: so every tensor is aligned."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    ordered = sorted(items.items(), key=lambda pair: -_width(pair[1].dtype))
    end = 0
    for name, item in ordered:
        header[name] = {"dtype": item.dtype, "shape": item.shape, "data_offsets": [end, end + item.size]}
        end += item.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.write(len(text).to_bytes(8, "little") + text)
    for _, item in ordered:
        if isinstance(item.source, Tensor):
            tensor = item.source.contiguous().cpu()
            target.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            on_bytes(item.size)
        else:
            _copy(source, target, item.source, item.entries, on_bytes)


def _width(dtype: str) -> int:
    """Bits of a component: "BF16", "F8_E4M3", "BOOL"."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def _copy(
    source: BinaryIO,
    target: BinaryIO,
    place: tuple[int, int],
    entries: SparseTensor | None,
    on_bytes: Callable[[int], object],
) -> None:
    """Copy a tensor's bytes, with the entries' values in the place of the base's."""
    source.seek(place[0])
    buffer = bytearray(min(CHUNK, place[1] - place[0]))
    done, size = 0, place[1] - place[0]
    while done < size:
        count = source.readinto(memoryview(buffer)[: size - done])  # type: ignore[attr-defined]
        if count != min(len(buffer), size - done):
            raise DeltaError(f"{source.name} ends too early. It is damaged; save or download it again.")
        if entries is not None and count:
            _overlay(buffer, done, count, entries)
        target.write(memoryview(buffer)[:count])
        on_bytes(count)
        done += count


def _overlay(buffer: bytearray, start: int, count: int, entries: SparseTensor) -> None:
    """Write those of the entries that fall into a part of the tensor's bytes."""
    width = entries.values.element_size()
    bounds = torch.tensor([start // width, (start + count) // width])
    first, last = torch.searchsorted(entries.indices, bounds).tolist()
    if first < last:
        part = torch.frombuffer(buffer, dtype=entries.values.dtype, count=count // width)
        part[entries.indices[first:last] - bounds[0]] = entries.values[first:last]


def _write_index(base: Checkpoint, folder: Path, places: Mapping[str, str], total: int, more: int) -> None:
    index = json.loads((base.folder / INDEX).read_text())
    metadata = index.get("metadata")
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    if type(metadata.get("total_parameters")) is int:
        metadata["total_parameters"] += more
    index = {**index, "metadata": metadata, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
