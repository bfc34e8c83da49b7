"""A delta put into its base's checkpoint on disk, and taken out as patches, without a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_dst import DSTConfig
from peft_dst.delta import Checkpoint, DeltaError, SparseDelta, SparseTensor, export_patches, merge, merging, place
from peft_dst.extraction import layout_of
from tests.models import BUILDERS, assert_same, train


@pytest.fixture
def trained(tmp_path):
    """Folders of a tiny base and of a trained adapter, the adapter, and what PEFT merges and saves."""

    def make(name="bert", dtype=torch.float32, shards=None, **options):
        torch.manual_seed(0)
        base = BUILDERS[name]().to(dtype)
        saving = {"max_shard_size": shards} if shards else {}
        base.save_pretrained(tmp_path / "base", **saving)
        model = get_peft_model(base, DSTConfig(**{"epsilon": 0.05, **options}))
        train(model, name)
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(
            type(base).from_pretrained(tmp_path / "base", dtype=dtype), tmp_path / "adapter"
        )
        loaded.merge_and_unload().save_pretrained(tmp_path / "expected", **saving)
        return tmp_path / "base", SparseDelta.load(tmp_path / "adapter"), dict(Checkpoint(tmp_path / "expected"))

    return make


def read(folder):
    return dict(Checkpoint(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_equals_what_peft_merges_and_saves(name, dtype, trained, tmp_path):
    options = {"bert": {"modules_to_save": ["classifier"]}, "llama": {"shards": "6KB"}}.get(name, {})
    base, delta, expected = trained(name, dtype, **options)
    before = read(base)
    merged = merge(base, delta, tmp_path / "merged", layout=layout_of(base))
    assert_same(read(tmp_path / "merged"), expected)
    assert merged.entries == delta.num_entries > 0
    assert merged.size == sum(tensor.nbytes for tensor in expected.values())
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {p.name for p in base.iterdir()}
    assert (tmp_path / "merged").stat().st_mode == base.stat().st_mode
    assert_same(read(base), before)
    if name == "llama":
        index, old = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (tmp_path / "merged", base))
        assert index == old
        assert len(set(index["weight_map"].values())) > 1
    if name == "bert":
        assert merged.replaced == ("classifier.bias", "classifier.weight")


def test_a_head_that_the_base_does_not_have(trained, tmp_path):
    """As with a pretrained encoder: its names lack the prefix, and the head is new."""
    base, delta, expected = trained(modules_to_save=["classifier"])
    body = hf.BertForSequenceClassification.from_pretrained(base).bert
    for shards in ("1GB", "6KB"):
        shutil.rmtree(base)
        body.save_pretrained(base, max_shard_size=shards)
        assert not any(name.startswith("bert.") for name in Checkpoint(base))
        merged = merge(base, delta, tmp_path / "merged")
        assert merged.added == ("classifier.bias", "classifier.weight")
        assert_same(read(tmp_path / "merged"), expected)
        if shards == "6KB":
            index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
            assert index["weight_map"].keys() == expected.keys()
            assert index["metadata"]["total_size"] == merged.size
            assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in expected.values())
        shutil.rmtree(tmp_path / "merged")


def test_a_base_with_another_head(trained, tmp_path):
    base, delta, expected = trained("gpt2")
    body = hf.GPT2LMHeadModel.from_pretrained(base).transformer
    inner = SparseDelta({name.removeprefix("transformer."): tensor for name, tensor in delta.items()})
    SparseDelta({**inner}, config=delta.config).with_seeds(dict(body.named_parameters()))
    merge(base, inner, tmp_path / "merged")
    assert_same(read(tmp_path / "merged"), expected)


def test_a_tied_tensor_that_the_checkpoint_holds_twice(trained, tmp_path):
    base, delta, expected = trained("gpt2")
    tensors = load_file(base / "model.safetensors")
    embedding = tensors["transformer.wte.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, base / "model.safetensors", metadata={"format": "pt"})
    assert ["transformer.wte.weight", "lm_head.weight"] in layout_of(base).tied
    merge(base, delta, tmp_path / "merged", layout=layout_of(base))
    found = read(tmp_path / "merged")
    assert torch.equal(found.pop("lm_head.weight"), found["transformer.wte.weight"])
    assert_same(found, expected)
    hf.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    # One with other values is a tensor of its own.
    save_file({**tensors, "lm_head.weight": embedding + 1}, base / "model.safetensors", metadata={"format": "pt"})
    merge(base, delta, tmp_path / "untied", layout=layout_of(base))
    assert torch.equal(read(tmp_path / "untied")["lm_head.weight"], embedding + 1)


def test_only_the_other_name_is_there(trained, tmp_path):
    base, delta, expected = trained("gpt2")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    merge(base, delta, tmp_path / "merged", layout=layout_of(base))
    assert torch.equal(read(tmp_path / "merged")["lm_head.weight"], expected["transformer.wte.weight"])


class Reading:
    """A file that notes how much is read from it at once."""

    largest = 0

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def readinto(self, buffer):
        Reading.largest = max(Reading.largest, len(buffer))
        return self.file.readinto(buffer)


def opened(path, mode):
    file = open(path, mode)  # noqa: SIM115
    return Reading(file) if mode == "rb" else file


@pytest.mark.parametrize("chunk", [8, 24, 1 << 12])
def test_it_never_holds_more_than_a_chunk(chunk, trained, tmp_path, monkeypatch):
    base, delta, expected = trained("bert", torch.bfloat16, modules_to_save=["classifier"])
    delta = delta.to(torch.bfloat16)
    monkeypatch.setattr(merging, "CHUNK", chunk)
    monkeypatch.setattr(merging, "open", opened, raising=False)
    monkeypatch.setattr(Reading, "largest", 0)
    passed = []
    merged = merge(base, delta, tmp_path / "merged", on_bytes=passed.append)
    assert_same(read(tmp_path / "merged"), expected)
    assert Reading.largest <= chunk
    assert sum(passed) == merged.size
    assert chunk < max(tensor.nbytes for tensor in expected.values()) or chunk == 1 << 12


def test_tensors_of_every_width_stay_aligned(tmp_path):
    base = {
        "wide": torch.arange(3.0, dtype=torch.float64),
        "half": torch.arange(3, dtype=torch.bfloat16),
        "marks": torch.tensor([True, False, True]),
        "eight": torch.zeros(5).to(torch.float8_e4m3fn),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    delta = SparseDelta(
        {
            "half": SparseTensor(
                (3,), torch.tensor([1]), torch.tensor([9.0], dtype=torch.bfloat16), torch.ones(1).bfloat16()
            )
        },
        {
            "base_model.model.head.weight": torch.ones(3, 3, dtype=torch.float64),
            "base_model.model.head.steps": torch.tensor(3),
        },
        {"modules_to_save": ["head"]},
    )
    merge(tmp_path / "base", delta, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    base["half"][1] = 9
    assert_same({k: v.float() for k, v in found.items() if "head" not in k}, {k: v.float() for k, v in base.items()})
    assert found["head.weight"].dtype == torch.float64
    assert int(found["head.steps"]) == 3


def test_what_else_is_in_the_folder(trained, tmp_path):
    base, delta, _ = trained()
    (base / "tokenizer.json").write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "onnx").mkdir()
    for name in (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "other.safetensors",
        ".cached",
        "onnx/model.onnx",
    ):
        (base / name).write_text("the base's")
    merge(base, delta, tmp_path / "new" / "merged")
    found = {str(path.relative_to(tmp_path / "new" / "merged")) for path in (tmp_path / "new" / "merged").rglob("*")}
    assert found == {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling", "1_Pooling/config.json"}
    with safe_open(tmp_path / "new" / "merged" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_resized_head_is_said(trained, tmp_path):
    base, delta, _ = trained(modules_to_save=["classifier"])
    dense = {key: torch.cat([tensor, tensor]) for key, tensor in delta.dense.items()}
    merged = merge(base, SparseDelta(delta.tensors, dense, delta.config), tmp_path / "merged")
    assert merged.reshaped == merged.replaced == ("classifier.bias", "classifier.weight")
    assert read(tmp_path / "merged")["classifier.weight"].shape == (6, 16)


def test_nothing_is_left_of_a_merge_that_fails(trained, tmp_path, monkeypatch):
    base, delta, _ = trained()
    there = set(tmp_path.iterdir())

    def stop(*unused):
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_overlay", stop)
    with pytest.raises(KeyboardInterrupt):
        merge(base, delta, tmp_path / "merged")
    assert set(tmp_path.iterdir()) == there


def edited(base, name, change):
    tensors = load_file(base / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file({name: t for name, t in tensors.items() if t is not None}, base / "model.safetensors")


NAME = "bert.pooler.dense.weight"
WRONG_BASES = {
    "values": (lambda base: edited(base, NAME, lambda t: t + 1), f"'{NAME}': the base model's values differ"),
    "shape": (lambda base: edited(base, NAME, lambda t: t[:, :8].clone()), rf"'{NAME}' is of shape \(16, 8\)"),
    "missing": (lambda base: edited(base, NAME, lambda t: None), f"'{NAME}': the checkpoint .* has no such tensor"),
    "cut": (
        lambda base: (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1]),
        "cannot be read",
    ),
    "none": (lambda base: (base / "model.safetensors").unlink(), "holds neither"),
}


@pytest.mark.parametrize("case", WRONG_BASES)
def test_another_base_is_refused_before_anything_is_written(case, trained, tmp_path):
    base, delta, _ = trained()
    change, message = WRONG_BASES[case]
    change(base)
    there = set(tmp_path.iterdir())
    for write in (merge, export_patches):
        arguments = (base, delta, tmp_path / "merged")
        with pytest.raises(ValueError, match=message):
            write(*arguments)
    assert set(tmp_path.iterdir()) == there


def test_dense_tensors_that_would_overwrite_the_base(trained):
    base, delta, _ = trained(modules_to_save=["classifier"])
    for key, message in (
        ("base_model.model.bert.pooler.dense.bias", "belongs to none of the adapter's modules_to_save"),
        ("base_model.model.bert.pooler._sparse.sizes", "belongs to none"),
    ):
        dense = {**delta.dense, key: torch.zeros(16)}
        with pytest.raises(DeltaError, match=message):
            place(SparseDelta(delta.tensors, dense, delta.config), Checkpoint(base))
    config = {**delta.config, "modules_to_save": ["dense"]}
    both = SparseDelta(delta.tensors, {f"base_model.model.{NAME}": torch.zeros(16, 16)}, config)
    with pytest.raises(DeltaError, match="has entries, and a dense tensor in its place"):
        place(both, Checkpoint(base))


def test_an_output_that_exists(trained, tmp_path):
    base, delta, _ = trained()
    (tmp_path / "merged").mkdir()
    merge(base, delta, tmp_path / "merged")
    with pytest.raises(ValueError, match="exists already"):
        merge(base, delta, tmp_path / "merged")
    (tmp_path / "patch.safetensors").write_text("")
    with pytest.raises(ValueError, match="exists already"):
        export_patches(base, delta, tmp_path / "patch.safetensors")


def test_another_layout_than_the_models(trained, tmp_path):
    """Transformers joins a Mixtral's experts while loading; the file has them one by one."""
    base, delta, _ = trained("mixtral")
    assert any(name.endswith("experts.gate_up_proj") for name in delta)
    assert not any(name.endswith("experts.gate_up_proj") for name in Checkpoint(base))
    for write in (merge, export_patches):
        with pytest.raises(DeltaError, match=r"experts.*transformers joins or turns tensors.*merge_and_unload"):
            write(base, delta, tmp_path / "out")
    rest = delta.restrict(lambda name: name in Checkpoint(base))
    merge(base, rest, tmp_path / "out")


def apply_patches(path, weights):
    """What an engine does with a patch file: nothing but names, positions and values."""
    with safe_open(path, framework="pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
        for name, shape in shapes.items():
            values = file.get_tensor(f"{name}.values")
            if f"{name}.indices" in file.keys():  # noqa: SIM118
                indices = file.get_tensor(f"{name}.indices")
                assert indices.dtype == torch.int32
                assert list(weights[name].shape) == shape
                assert weights[name].dtype == values.dtype
                weights[name].view(-1)[indices.long()] = values
            else:
                weights[name] = values.view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_patches_make_the_merged_weights(dtype, trained, tmp_path):
    base, delta, expected = trained("bert", dtype, shards="6KB", modules_to_save=["classifier"])
    count = export_patches(base, delta, tmp_path / "patch.safetensors")
    weights = {name: tensor.clone() for name, tensor in read(base).items()}
    apply_patches(tmp_path / "patch.safetensors", weights)
    assert_same(weights, expected)
    assert count == len(delta) + 2


def test_patches_of_a_float32_delta_for_a_bfloat16_base(trained, tmp_path):
    base, delta, _ = trained("llama")
    hf.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    export_patches(tmp_path / "half", delta, tmp_path / "patch.safetensors")
    merge(tmp_path / "half", delta, tmp_path / "merged")
    weights = {name: tensor.clone() for name, tensor in read(tmp_path / "half").items()}
    apply_patches(tmp_path / "patch.safetensors", weights)
    assert_same(weights, read(tmp_path / "merged"))
