"""A pass over the data on disk: what was done of it, and for which model."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from .files import COMPLETE, read, save_scores


@dataclass(frozen=True)
class Progress:
    """What a cache holds: sums over `examples`, or their mean if it is `complete`."""

    tensors: dict[str, Tensor]
    examples: int
    complete: bool


class Cache:
    """The file of one pass.

    Args:
        path: the file.
        model: whose weights it is for. All of them count, not only those that are scored.
        shapes: of the scored parameters.
        definition: of the score.
        max_examples: where the pass ends.

    Raises:
        ValueError: if the file's folder does not exist.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        shapes: Mapping[str, torch.Size],
        definition: str,
        max_examples: int | None,
    ):
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise ValueError(f"the folder of the cache {str(path)!r} does not exist. Make it, or name another path.")
        self.shapes = dict(shapes)
        self.identity = {"definition": definition, "max_examples": str(max_examples), "weights": checksum(model)}

    def read(self) -> Progress | None:
        """What is there, if anything.

        Raises:
            ValueError: if it belongs to something else, saying to what.
        """
        if not self.path.exists():
            return None
        tensors, metadata = read(self.path)
        different = [
            f"{name} ({metadata.get(name)} there, {value} asked for)"
            for name, value in self.identity.items()
            if metadata.get(name) != value
        ]
        there = {name: tensor.shape for name, tensor in tensors.items()}
        if names := sorted(there.keys() ^ self.shapes.keys()):
            different.append(f"the parameters scored (for one, {names[0]!r})")
        elif reshaped := [name for name, shape in self.shapes.items() if there[name] != shape]:
            different.append(f"the shape of {reshaped[0]!r}")
        if different or not metadata.get("examples", "").isdecimal():
            raise ValueError(
                f"the cache {str(self.path)!r} belongs to another pass; it differs in {'; '.join(different) or 'form'}. "
                "Use another path, or delete it."
            )
        in_order = {name: tensors[name] for name in self.shapes}
        return Progress(in_order, int(metadata["examples"]), metadata.get(COMPLETE) == "true")

    def write(self, progress: Progress) -> None:
        """Replace the file in one step."""
        done = {"examples": str(progress.examples), COMPLETE: str(progress.complete).lower()}
        save_scores(self.path, progress.tensors, {**self.identity, **done})


def checksum(model: nn.Module) -> str:
    """CRC-32 of a model's parameters and buffers with their names, dtypes and shapes, in hexadecimal."""
    crc = 0
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        crc = zlib.crc32(values.numpy().data, crc)
    return f"{crc:08x}"
