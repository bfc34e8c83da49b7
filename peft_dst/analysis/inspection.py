"""What a delta holds, tensor by tensor and by kind of module, from its file alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..core.silos import read_names
from ..delta import SparseDelta, SparseTensor
from ..tables import printable, text_table


@dataclass(frozen=True)
class Contents:
    """Some of a delta's entries.

    Attributes:
        entries: how many.
        size: components of the base's tensors that have any.
        smallest: smallest value; NaN if there are none.
        largest: largest value; NaN if there are none.
        bytes: of positions and values, plain.
    """

    entries: int
    size: int
    smallest: float
    largest: float
    bytes: int

    @property
    def share(self) -> float:
        """Entries of all components; 0 if there are none."""
        return self.entries / self.size if self.size else 0.0


@dataclass(frozen=True)
class Inspection:
    """What a delta holds. `str()` of it is a table.

    Attributes:
        total: of all entries.
        kinds: by kind of module, as silos are read off names.
        tensors: by parameter.
        dense: shapes of dense tensors, by their keys.
        config: what adapter_config.json says.
    """

    total: Contents
    kinds: dict[str, Contents]
    tensors: dict[str, Contents]
    dense: dict[str, tuple[int, ...]]
    config: dict[str, Any]

    def __str__(self) -> str:
        header = ("", "entries", "of", "share", "smallest", "largest", "bytes")
        lines = text_table(
            header,
            [_row("total", self.total)],
            [_row(name, contents) for name, contents in self.kinds.items()],
            [_row(name, contents) for name, contents in self.tensors.items()],
        )
        said = {key: self.config.get(key) for key in ("base_model_name_or_path", "epsilon", "siloing", "distance")}
        lines += [printable(f"{key}: {value}") for key, value in said.items() if value is not None]
        lines += [printable(f"dense: {key} {shape}") for key, shape in self.dense.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same in plain types."""
        return asdict(self)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the share of entries by kind of module.

        Args:
            path: of the picture; its ending says the format.

        Raises:
            ValueError: if matplotlib is not installed, or does not know the format.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ValueError("a plot needs matplotlib: pip install 'peft-dst[plots]'.") from error
        figure = Figure(figsize=(7, 1.2 + 0.35 * max(1, len(self.kinds))), layout="constrained")
        axes = figure.add_subplot()
        kinds = [*self.kinds][::-1]
        bars = axes.barh(kinds, [self.kinds[kind].share for kind in kinds])
        axes.bar_label(bars, [f" {self.kinds[kind].entries:,}" for kind in kinds])
        axes.margins(x=0.15)
        axes.set_xlabel("entries as a share of the components of their tensors")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(Path(path), dpi=150)


def inspect(delta: SparseDelta) -> Inspection:
    """Look into a delta."""
    tensors = {name: _contents([tensor]) for name, tensor in delta.items()}
    members: dict[str, list[SparseTensor]] = {}
    # The file's own silo_pattern is not used: a regular expression from a stranger may run for ever.
    for name, (_, kind) in read_names([*delta], ()).items():
        members.setdefault(kind, []).append(delta[name])
    return Inspection(
        _contents(delta.values()),
        {kind: _contents(members[kind]) for kind in sorted(members)},
        tensors,
        {key: tuple(tensor.shape) for key, tensor in delta.dense.items()},
        dict(delta.config),
    )


def _contents(tensors: Iterable[SparseTensor]) -> Contents:
    tensors = list(tensors)
    records = [tensor.record() for tensor in tensors]
    return Contents(
        sum(len(tensor) for tensor in tensors),
        sum(math.prod(tensor.shape) for tensor in tensors),
        min((float(record.values.min()) for record in records), default=math.nan),
        max((float(record.values.max()) for record in records), default=math.nan),
        sum(part.numel() * part.element_size() for record in records for part in record),
    )


def _row(name: str, contents: Contents) -> tuple[str, ...]:
    return (
        name,
        f"{contents.entries:,}",
        f"{contents.size:,}",
        f"{contents.share:.3%}",
        f"{contents.smallest:.3g}",
        f"{contents.largest:.3g}",
        f"{contents.bytes:,}",
    )
