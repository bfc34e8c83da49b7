"""How a subset moves while it is trained: its positions at a few steps, and what any two of them have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..analysis import overlap
from ..tuner.constraints import active_constraints


SNAPSHOTS = "snapshots"


class Snapshots(TrainerCallback):
    """Writes the positions of a subset to a file each, `count` times, evenly over training; the last after its last step.

    A snapshot costs a copy of the positions to the CPU and a file of 4 bytes an entry (8 for weights of 2³¹ or more).

    Args:
        folder: where `STEP.safetensors` go, an int32 or int64 vector of sorted flat positions by each weight's name.
        count: how many.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        if state.global_step not in steps(state.max_steps, self.count):
            return
        found = {}
        for constraint in active_constraints(model):
            for weight in constraint.weights:
                small = weight.data.numel() < 2**31
                found[weight.name] = weight.indices.to("cpu", torch.int32 if small else torch.int64).contiguous()
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(found, self.folder / f"{state.global_step}.safetensors")


def steps(total: int, count: int) -> list[int]:
    """Steps after which snapshots are taken: `count` different ones at most, evenly up to the last."""
    return sorted({max(1, round(total * i / count)) for i in range(1, count + 1)})


def shared(folder: Path) -> dict[str, Any]:
    """What snapshots have in common.

    Returns:
        `steps` of the snapshots, and `shared`: a row a snapshot, with the fraction of its positions that each of them
        has.
    """
    files = {int(path.stem): path for path in folder.glob("*.safetensors")}
    taken = [_positions(files[step]) for step in sorted(files)]
    return {"steps": sorted(files), "shared": [[overlap(one, other).total.of_a for other in taken] for one in taken]}


def _positions(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.long() for name, tensor in load_file(path).items()}
