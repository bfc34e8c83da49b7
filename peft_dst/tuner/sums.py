"""What records of adapters come to in one weight: as far as a process holds it, scaled, several added up.

Several active adapters add up, as in PEFT's LoRA: a component that one of them changes takes its value, a component that
several change takes seed + Σ (value − seed).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import SparseWeight
from ..delta import Record


def own_part(weight: SparseWeight, record: Record) -> Record:
    """Of a record what lies in the part of its weight that this process holds, with positions in that, int64."""
    indices = record.indices.to(weight.data.device, torch.int64)
    if not weight.is_divided:
        return Record(indices, record.values)
    inside, own = weight.box.inwards(indices)
    return Record(own, record.values.to(weight.data.device)[inside])


def scaled(weight: SparseWeight, record: Record, scale: float) -> Record:
    """A record, with positions in the live weight, that has seed + scale · (value − seed) for its values."""
    seeds = weight.seeds_at(record.indices)
    values = seeds.double() + scale * (record.values.double() - seeds.double())
    return Record(record.indices, values.to(record.values.dtype))


def add_up(weight: SparseWeight, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """Combine records of one weight: seed + Σ (value − seed), in float64; exact where only one has an entry."""
    indices = torch.cat([record.indices for record in records]).unique()
    seeds = weight.seeds_at(indices)
    total, count, single = seeds.double(), torch.zeros_like(indices), seeds.clone()
    for record in records:
        at = torch.searchsorted(indices, record.indices)
        total[at] += record.values.double() - seeds[at].double()
        count[at] += 1
        single[at] = record.values.to(single)
    return indices, torch.where(count == 1, single, total.to(single))
