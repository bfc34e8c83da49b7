"""The tensors of a checkpoint's safetensors files, mapped into memory: pages are read when touched, and may be dropped.

`safe_open` does not copy: a tensor of it is a private view of the file's pages, which count as the file's cache and not
as the process's own memory. So a list of all tensors of a model costs nothing, and `select` works on it as on any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of a folder that `save_pretrained` wrote, by their names in the file.

    A tensor is mapped at every look-up; it is not to be written to.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the shards that it names.

    Raises:
        ValueError: if it holds neither, or they are damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / SINGLE).is_file():
            file = _open(folder / SINGLE)
            self._files: dict[str, Any] = dict.fromkeys(file.keys(), file)
        elif (folder / INDEX).is_file():
            self._files = _open_shards(folder)
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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). It is damaged or missing; save or download it again."
        ) from error


def _open_shards(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        places = {str(name): str(shard) for name, shard in json.loads(path.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has no readable weight_map. It is damaged; save or download it again.") from error
    for shard in places.values():
        if Path(shard).name != shard:
            raise ValueError(
                f"{path} names a shard {shard!r} outside its folder. Use a checkpoint from a trusted source."
            )
    shards = {shard: _open(folder / shard) for shard in sorted(set(places.values()))}
    found = {shard: set(file.keys()) for shard, file in shards.items()}
    for name, shard in places.items():
        if name not in found[shard]:
            raise ValueError(f"{shard} does not hold {name!r}, which {path} says it does. Save or download both again.")
    return {name: shards[shard] for name, shard in places.items()}
