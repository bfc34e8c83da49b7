"""Files from strangers."""

from __future__ import annotations

import contextlib
import json
import pickle
import tracemalloc
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_dst.delta import DeltaError, Record, SparseDelta, SparseTensor, Summary, encode_indices, pack
from peft_dst.delta.packed import unpack
from tests.delta import fuzzing
from tests.models import assert_same, weights


NAME = "adapter_model.safetensors"


@pytest.mark.parametrize(("arguments", "outcomes"), [(["--count", "1000"], 11), (["--count", "150", "--peft"], 8)])
def test_damaged_adapters(arguments, outcomes, tmp_path, apart):
    """A small part of what was run by hand (docs/LOG.md)."""
    # In a process of its own, for its limits of memory and time.
    found = apart(fuzzing.main, [*arguments, "--keep", str(tmp_path)])
    # Each way to damage was taken, and more than one thing came of most.
    assert len({how for how, _ in found}) == 6
    assert len(found) >= outcomes


@pytest.mark.parametrize("depth", [60, 600])
def test_nested_configs_are_not_loaded(depth, build, saved):
    """PEFT would copy and write them, which is recursive."""
    folder, _, _ = saved()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    nested: list = []
    for _ in range(depth):
        nested = [nested]
    path.write_text(json.dumps({**config, "auto_mapping": nested}))
    with pytest.raises(DeltaError, match=r"adapter_config\.json is nested more than 50 levels deep"):
        PeftModel.from_pretrained(build("bert"), folder)


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


def test_a_description_of_another_shape_is_not_decompressed(tmp_path):
    """Whose length a reader would look at: 1, in front of all its bytes."""
    SparseDelta({"w": SparseTensor((10,), torch.tensor([3]), torch.ones(1), torch.zeros(1))}).save(
        tmp_path, packed=True
    )
    tensors = load_file(tmp_path / NAME)
    tensors["dst_packed_records"] = tensors["dst_packed_records"][None]
    with safe_open(tmp_path / NAME, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / NAME, metadata=metadata)
    with pytest.raises(DeltaError, match=r"'dst_packed_records' cannot be read \(it is torch.uint8 of shape \(1, "):
        SparseDelta.load(tmp_path)


def test_more_positions_than_were_announced_take_no_memory():
    """3 MB of code stand for 25 million positions of one bit each; one was announced."""
    count = 25_000_000
    code = encode_indices(torch.arange(count), count)
    assert code.numel() < 4 * 2**20
    shape, digests = (count,), {"float32": "00000000"}
    packed = pack(
        {"w": Record(torch.tensor([0]), torch.ones(1))}, {"w": Summary(1, "00000000", digests, shape, "float32")}
    )
    packed["dst_packed_indices_float32"] = code
    tracemalloc.start()
    with pytest.raises(
        DeltaError, match=r"'dst_packed_indices_float32': .*25,000,000 positions are announced, where there"
    ):
        unpack(packed)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["a." * 64 + "w", "w" * 1001], ids=["parts", "characters"])
@pytest.mark.parametrize("kind", ["plain", "packed", "dense"])
def test_names_longer_than_any_model_s(name, kind, tmp_path):
    """The modules around a name are its beginnings: of a long one, its length squared."""
    entries = SparseTensor((10,), torch.tensor([3]), torch.ones(1), torch.zeros(1))
    dense = {f"base_model.model.{name}": torch.ones(2)} if kind == "dense" else {}
    SparseDelta({"w" if dense else name: entries}, dense).save(tmp_path, packed=kind == "packed")
    with pytest.raises(DeltaError, match=r"no parameter's name has more than 1,000 in 64"):
        SparseDelta.load(tmp_path)


def test_a_config_beside_tensors_that_were_never_described(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / NAME)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "DST", "format_version": 1}))
    found = SparseDelta.load(tmp_path)
    assert (len(found), list(found.dense)) == (0, ["w"])


def test_values_of_eight_bits(tmp_path):
    """Which of them are finite torch does not know."""
    SparseDelta({"w": SparseTensor((10,), torch.tensor([3]), torch.ones(1), torch.zeros(1))}).save(tmp_path)
    with safe_open(tmp_path / NAME, "pt") as file:
        metadata = file.metadata()
    (values,) = [key for key in load_file(tmp_path / NAME) if "values" in key]
    tensors = load_file(tmp_path / NAME) | {values: torch.ones(1).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / NAME, metadata=metadata)
    with pytest.raises(DeltaError, match=r"values torch\.float8_e4m3fn; expected int32 or int64, and one of float64"):
        SparseDelta.load(tmp_path)
    for value, match in ((1.0, None), (float("nan"), "'head' is not finite at position 1")):
        dense = {"head": torch.tensor([1.0, value]).to(torch.float8_e4m3fn)}
        SparseDelta({"w": SparseTensor((10,), torch.tensor([3]), torch.ones(1), torch.zeros(1))}, dense).save(tmp_path)
        with pytest.raises(DeltaError, match=match) if match else contextlib.nullcontext():
            SparseDelta.load(tmp_path)


def test_a_shape_whose_bytes_cannot_be_counted():
    for numel in (2**60, 2**61):
        with pytest.raises(DeltaError, match="malformed entry for 'w'"):
            Summary.parse("w", [1, "00000000", {"float32": "00000000"}, [numel], "float32"])
