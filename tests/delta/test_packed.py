"""Packed files: the same adapter in fewer bytes, and what is refused of damaged ones."""

from __future__ import annotations

import json
import zlib

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_dst import DSTConfig
from peft_dst.delta import DeltaError, SparseDelta, SparseTensor, read_metadata
from tests.models import bert, logits, train, weights


NAME = "adapter_model.safetensors"


def test_a_packed_adapter_is_opened_as_a_plain_one(build, saved, tmp_path):
    folder, output, model = saved(modules_to_save=["classifier"], packed=True)
    tensors = load_file(folder / NAME)
    assert {key for key in tensors if "packed" in key} == {
        "dst_packed_records",
        "dst_packed_indices_float32",
        "dst_packed_values_float32",
    }
    assert not any("_sparse" in key for key in tensors)
    assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), folder), "bert"), output)
    # Once more into the same adapter, as Trainer does to resume: nothing announces it.
    model.load_adapter(folder, "default", is_trainable=True)
    assert torch.equal(logits(model, "bert"), output)
    delta = SparseDelta.load(folder)
    for packed in (False, True):
        delta.save(tmp_path / "again", packed=packed)
        assert SparseDelta.load(tmp_path / "again") == delta == SparseDelta.load(tmp_path / "again" / NAME)
        assert SparseDelta.load(tmp_path / "again").dense.keys() == delta.dense.keys()
        assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), tmp_path / "again"), "bert"), output)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert read_metadata(folder / NAME)["records"] == config["records"]


def test_an_untrained_one(build, tmp_path):
    get_peft_model(build("bert"), DSTConfig(epsilon=0.02, packed=True)).save_pretrained(tmp_path)
    assert SparseDelta.load(tmp_path) == SparseDelta({})
    assert torch.equal(
        logits(PeftModel.from_pretrained(build("bert"), tmp_path), "bert"), logits(build("bert"), "bert")
    )


def test_an_interrupted_save_leaves_the_new_one(build, saved):
    folder, output, model = saved(packed=True)
    old = (folder / "adapter_config.json").read_text()
    train(model, "bert", first=70)
    model.save_pretrained(folder)
    (folder / "adapter_config.json").write_text(old)
    loaded = PeftModel.from_pretrained(build("bert"), folder)
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))
    assert not torch.equal(logits(loaded, "bert"), output)


def test_transformers_own_loader_does_not_pass_over_it(build, saved):
    folder, _, _ = saved(packed=True)
    base = build("bert")
    base.load_adapter(str(folder))
    with pytest.raises(RuntimeError, match=r"tensors were not loaded.*A packed file"):
        logits(base, "bert")


def test_bytes_an_entry(tmp_path):
    """As of a small encoder at 1 %: 103 tensors, 22.6 million components, bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(30522, 384), (512, 384), (384,)] + [(384, 384)] * 24 + [(1536, 384), (384, 1536)] * 6 + [(384,)] * 64
    tensors = {}
    for i, shape in enumerate(shapes):
        size = torch.Size(shape).numel()
        chosen = (torch.rand(size, generator=generator) < 0.01).nonzero().view(-1)
        values = torch.randn(len(chosen), generator=generator).bfloat16()
        name = f"encoder.layer.{i % 6}.attention.output.number{i}.weight"
        tensors[name] = SparseTensor(shape, chosen, values, values)
    delta = SparseDelta(tensors)
    delta.save(tmp_path / "a.safetensors", packed=True)
    assert SparseDelta.load(tmp_path / "a.safetensors") == delta
    assert (tmp_path / "a.safetensors").stat().st_size <= 3.2 * delta.num_entries


def described(change):
    def damage(tensors):
        found = json.loads(zlib.decompress(tensors["dst_packed_records"].numpy().tobytes()))
        change(found)
        code = zlib.compress(json.dumps(found).encode())
        tensors["dst_packed_records"] = torch.frombuffer(bytearray(code), dtype=torch.uint8)

    return damage


def cut(key, count=1):
    return lambda tensors: tensors.__setitem__(key, tensors[key][:-count].clone())


def bomb(tensors):
    code = zlib.compress(b" " * (1 << 27))
    tensors["dst_packed_records"] = torch.frombuffer(bytearray(code), dtype=torch.uint8)


INDICES, VALUES = "dst_packed_indices_float32", "dst_packed_values_float32"
DAMAGES = {
    "no description": (lambda t: t.pop("dst_packed_records"), "'dst_packed_records' cannot be read|does not describe"),
    "description cut": (cut("dst_packed_records"), "'dst_packed_records' cannot be read"),
    "description dtype": (lambda t: t.update(dst_packed_records=t["dst_packed_records"].float()), "cannot be read"),
    "bomb": (bomb, "does not end where it should"),
    "no map": (
        lambda t: t.update(dst_packed_records=torch.frombuffer(bytearray(zlib.compress(b"[1]")), dtype=torch.uint8)),
        "it is no map",
    ),
    "not announced": (described(lambda found: found.clear()), "which it does not announce"),
    "fewer": (described(lambda found: found.popitem()), "values of float32 in tensors of"),
    "huge": (
        described(lambda found: next(iter(found.values()))[3].append(2**41)),
        r"in tensors of 35,184,372,093,888 components were announced|for a tensor of shape \(16, 2199023255552\)",
    ),
    "no values": (lambda t: t.pop(VALUES), f"no '{VALUES}'"),
    "values cut": (cut(VALUES), "values of float32 in tensors of"),
    "values dtype": (lambda t: t.update({VALUES: t[VALUES].half()}), "float16 of shape"),
    "indices cut": (cut(INDICES), f"'{INDICES}': "),
    "indices dtype": (lambda t: t.update({INDICES: t[INDICES].int()}), f"'{INDICES}': "),
    "indices damaged": (lambda t: t[INDICES].bitwise_not_(), INDICES),
    "plain ones too": (
        lambda t: t.update({"base_model.model.bert.pooler.dense._sparse.dst_values.weight": torch.zeros(1)}),
        "plain and packed",
    ),
}


def test_what_cannot_be_addressed_is_not_packed(tmp_path):
    def large(size):
        return SparseTensor((size,), torch.tensor([0]), torch.tensor([1.0]), torch.tensor([0.0]))

    SparseDelta({"a": large(2**40 - 1), "b": large(1)}).save(tmp_path / "out", packed=True)
    with pytest.raises(
        ValueError, match=r"have 1,099,511,627,777 components, more than a packed file can address\. Save it plain"
    ):
        SparseDelta({"a": large(2**40), "b": large(1)}).save(tmp_path / "other", packed=True)
    assert not list(tmp_path.glob("other/*"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(damage, saved):
    folder, _, _ = saved(packed=True)
    change, message = DAMAGES[damage]
    tensors = load_file(folder / NAME)
    change(tensors)
    save_file(tensors, folder / NAME)
    with pytest.raises(DeltaError, match=message):
        SparseDelta.load(folder)
    base = bert()
    seed = weights(base)
    with pytest.raises(DeltaError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert all(torch.equal(seed[name], tensor) for name, tensor in weights(base).items())
