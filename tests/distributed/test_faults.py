"""A process that dies leaves a readable adapter, and the others are told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.distributed.conftest import Processes
from tests.distributed.sharded import make, optimizer_of, step, subsets
from tests.models import BUILDERS


def die(rank, world, folder, when):
    """Save, train on, and lose process 1 in the middle of the next save."""
    model = make(world, "bert", {"epsilon": 0.02})
    optimizer = optimizer_of(model, "hook")
    step(rank, world, model, optimizer, "bert", 0)
    model.save_pretrained(folder)
    step(rank, world, model, optimizer, "bert", 1)
    torch.save(subsets(model), f"{folder}/subsets{rank}.pt")
    if rank == 1:
        weights = list(model.constraint().weights)
        real = type(weights[0]).joined
        calls = []

        def joined(weight, *arguments):
            calls.append(weight)
            if len(calls) > when * len(weights):
                os._exit(1)
            return real(weight, *arguments)

        type(weights[0]).joined = joined
    try:
        model.save_pretrained(folder)
    except RuntimeError as error:
        # The parent learns first that the other is gone.
        Path(folder, "told.txt").write_text(str(error))


@pytest.mark.parametrize("when", [0, 1.5])
def test_an_adapter_that_another_process_dies_over_is_the_old_one(tmp_path, when):
    processes = Processes(2)
    with pytest.raises(RuntimeError, match="it died"):
        processes(die, str(tmp_path), when, patient=True)
    processes.stop()
    assert "Connection" in (tmp_path / "told.txt").read_text()
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
    trained = torch.load(tmp_path / "subsets0.pt")
    found = {weight.name: weight.indices for weight in loaded.constraint().weights}
    assert sum(indices.numel() for indices in found.values()) > 0
    assert any(not torch.equal(indices, trained[name][0]) for name, indices in found.items())
    assert not list(tmp_path.glob(".saving-*"))


def fill_the_disk(rank, world, folder):
    """Process 0 cannot write."""
    model = make(world, "bert", {"epsilon": 0.02})
    step(rank, world, model, optimizer_of(model, "hook"), "bert", 0)
    if rank == 0:
        import peft.peft_model

        def fail(*unused, **also):
            raise OSError(28, "No space left on device")

        peft.peft_model.safe_save_file, kept = fail, peft.peft_model.safe_save_file
        try:
            with pytest.raises(OSError, match="No space left"):
                model.save_pretrained(folder)
        finally:
            peft.peft_model.safe_save_file = kept
    else:
        with pytest.raises(RuntimeError, match="save_pretrained failed in another process"):
            model.save_pretrained(folder)
    model.save_pretrained(folder)


def test_a_full_disk_is_told_to_all(together, tmp_path):
    together(2, fill_the_disk, str(tmp_path))
    torch.manual_seed(0)
    PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
