"""Files of format version 1, written once and kept: they are read for ever, and what is written is what they are.

Folders under golden/. A change that cannot read them, or writes others, is a new version of the format.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peft_dst.core.tiles import bits
from peft_dst.delta import SparseDelta, SparseTensor


GOLDEN = Path(__file__).parent / "golden"


def base() -> dict[str, torch.Tensor]:
    return {
        "encoder.layer.0.weight": torch.arange(12.0).view(3, 4),
        "encoder.layer.0.bias": torch.tensor([0.5, -0.0, 2.0]),
        "head.weight": torch.arange(300.0).view(100, 3).to(torch.bfloat16),
        "scale": torch.tensor(1.0, dtype=torch.float16),
    }


def delta() -> SparseDelta:
    """What the files hold, in plain numbers."""
    entries = {
        "encoder.layer.0.weight": ([0, 3, 11], [-1.0, 0.125, 1e-38]),
        "encoder.layer.0.bias": ([1], [0.0]),
        "head.weight": ([*range(0, 300, 7)], [float(number) for number in range(43)]),
        "scale": ([0], [0.333251953125]),
    }
    tensors = {
        name: SparseTensor(
            tuple(tensor.shape), torch.tensor(entries[name][0]), torch.tensor(entries[name][1], dtype=tensor.dtype)
        )
        for name, tensor in base().items()
    }
    dense = {"base_model.model.classifier.bias": torch.tensor([1.0, 2.0])}
    config = {
        "peft_type": "DST",
        "format_version": 1,
        "epsilon": 0.15,
        "siloing": "none",
        "distance": "inverse_relative",
        "base_model_name_or_path": "org/base",
        "revision": "main",
        "modules_to_save": ["classifier"],
    }
    return SparseDelta(tensors, dense, config).with_seeds(base())


def parts(path: Path) -> tuple[dict, bytes]:
    """A safetensors file's header, with JSON in it read, and the bytes after it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header["__metadata__"]
    header["__metadata__"] = {key: value if key == "format" else json.loads(value) for key, value in metadata.items()}
    return header, data[8 + length :]


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_what_was_written_is_read(form):
    found = SparseDelta.load(GOLDEN / form)
    assert found == delta()
    assert found.dense.keys() == delta().dense.keys()
    assert dict(found.config) == dict(delta().config)
    assert SparseDelta.load(GOLDEN / form / "adapter_model.safetensors") == delta()
    weights = base()
    undo = found.apply(weights)
    for name, tensor in delta().items():
        assert torch.equal(weights[name].flatten()[tensor.indices], tensor.values)
    undo.apply(weights, check=False)
    for name, tensor in base().items():
        assert torch.equal(bits(weights[name]), bits(tensor))


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_what_is_written_is_what_was_written(form, tmp_path):
    delta().save(tmp_path, packed=form == "packed")
    for folder in (tmp_path, GOLDEN / form):
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert parts(tmp_path / "adapter_model.safetensors") == parts(GOLDEN / form / "adapter_model.safetensors")
    assert (tmp_path / "adapter_config.json").read_bytes() == (GOLDEN / form / "adapter_config.json").read_bytes()
