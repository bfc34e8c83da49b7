"""Files from strangers."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_dst.delta import DeltaError, SparseDelta
from tests.delta import fuzzing
from tests.models import assert_same, weights


@pytest.mark.parametrize(("arguments", "outcomes"), [(["--count", "1000"], 11), (["--count", "150", "--peft"], 8)])
def test_damaged_adapters(arguments, outcomes, tmp_path, apart):
    """A small part of what was run by hand (docs/LOG.md)."""
    # In a process of its own, for its limits of memory and time.
    found = apart(fuzzing.main, [*arguments, "--keep", str(tmp_path)])
    # Each way to damage was taken, and more than one thing came of most.
    assert len({how for how, _ in found}) == 6
    assert len(found) >= outcomes


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_run_no_code(build, saved, tmp_path):
    folder, _, _ = saved()
    mark = tmp_path / "ran"
    evil = pickle.dumps({"0.weight": Evil(mark)}, protocol=2)
    pickle.loads(evil)
    assert mark.exists()
    mark.unlink()
    # In the tensors' place, and beside the config alone, where PEFT looks for it.
    (folder / "adapter_model.safetensors").write_bytes(evil)
    with pytest.raises(DeltaError, match="cannot be read"):
        SparseDelta.load(folder)

    def refused(error, match=None):
        base = build("bert")
        before = weights(base)
        with pytest.raises(error, match=match):
            PeftModel.from_pretrained(base, folder)
        assert_same(weights(base), before)

    refused(DeltaError, "cannot be read")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(evil)
    with pytest.raises(DeltaError, match=r"no adapter_model.safetensors"):
        SparseDelta.load(folder)
    refused(pickle.UnpicklingError)
    torch.save({"0.weight": Evil(mark)}, folder / "adapter_model.bin")
    refused(pickle.UnpicklingError, "weights_only")
    assert not mark.exists()
