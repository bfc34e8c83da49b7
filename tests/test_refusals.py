"""Refusals on loading: each names the thing and the remedy, and leaves the model as it was."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_dst import DSTConfig
from peft_dst.delta import DeltaError, read_metadata
from tests.models import assert_same, bert, logits, train, weights


def assert_refused(base, folder, match):
    seed, output = weights(base), logits(base, "bert")
    model = get_peft_model(base, DSTConfig(epsilon=0.01), "mine")
    train(model, "bert", first=40)
    tuned = weights(base)
    with pytest.raises(DeltaError, match=match):
        model.load_adapter(folder, "theirs")
    assert_same(weights(base), tuned)
    with model.disable_adapter():
        assert_same(weights(base), seed)
        assert torch.equal(logits(base, "bert"), output)


def test_another_base_is_refused(saved):
    folder, _, _ = saved()
    torch.manual_seed(99)
    assert_refused(
        bert(), folder, "'bert.embeddings.word_embeddings.weight': the base model's values differ.*Load it onto"
    )


@pytest.mark.parametrize("kind", ["safetensors", "stripped", "bin"])
def test_another_base_is_refused_also_where_an_adapter_is_loaded_over(kind, build, saved):
    """Whatever the file is: what does not stand in its metadata stands in the config beside it."""
    folder, output, model = saved()
    if kind == "stripped":
        path = folder / "adapter_model.safetensors"
        save_file(load_file(path), path)
    elif kind == "bin":
        model.save_pretrained(folder, safe_serialization=False)
    torch.manual_seed(99)
    other = get_peft_model(bert(), DSTConfig(epsilon=0.02))
    train(other, "bert")
    before = weights(other)
    with pytest.raises(DeltaError, match="the base model's values differ"):
        other.load_adapter(folder, "default")
    assert_same(weights(other), before)
    same = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    same.load_adapter(folder, "default")
    assert torch.equal(logits(same, "bert"), output)
    assert same.peft_config["default"].records is None


def test_tensors_without_a_config_are_loaded_over_an_adapter(build, saved):
    folder, output, model = saved()
    model.save_pretrained(folder, safe_serialization=False)
    (folder / "adapter_config.json").unlink()
    same = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    same.load_adapter(folder, "default")
    assert torch.equal(logits(same, "bert"), output)


def test_a_base_that_was_tuned_or_merged_is_refused(build, saved):
    folder, _, _ = saved()
    base = build("bert")
    with torch.no_grad():
        base.bert.pooler.dense.weight.add_(1e-6)
    assert_refused(base, folder, "'bert.pooler.dense.weight': the base model's values differ")


def test_another_shape_is_refused(build, saved):
    folder, _, _ = saved()
    narrow, state = bert(intermediate_size=2), build("bert").state_dict()
    narrow.load_state_dict(
        {n: state[n] for n, t in narrow.state_dict().items() if t.shape == state[n].shape}, strict=False
    )
    assert_refused(narrow, folder, r"output.dense.weight.*for a tensor of shape \(16, 32\)")


def test_an_architecture_without_the_tensor_is_refused(build, saved):
    folder, _, _ = saved()
    with pytest.raises(DeltaError, match=r"'bert.embeddings.LayerNorm.weight', which the model does not have"):
        PeftModel.from_pretrained(build("llama"), folder)


def edit(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("query.dst_indices.weight") or "query._sparse.dst_indices.weight" in k)
    change(tensors, key, key.replace("indices", "values"))
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, i, v: t[i].__setitem__(-1, 10**6), "position 1000000, outside a tensor of 256 components"),
        (lambda t, i, v: t[i].__setitem__(0, -5), "entry 0 has position -5"),
        (lambda t, i, v: t[i].__setitem__(1, int(t[i][0])), "not strictly ascending at entry 1"),
        (lambda t, i, v: t.__setitem__(i, t[i].flip(0).contiguous()), "not strictly ascending"),
        (lambda t, i, v: t.__setitem__(v, t[v][:-1].clone()), "expected two vectors of one length"),
        (lambda t, i, v: t.__setitem__(i, t[i].float()), "indices are torch.float32"),
        (lambda t, i, v: t[v].__setitem__(2, float("nan")), "entry 2 has the value nan"),
        (lambda t, i, v: t[v].__setitem__(2, float("inf")), "entry 2 has the value inf"),
        (lambda t, i, v: t.pop(v), "has no dst_values"),
        (lambda t, i, v: t[i].add_(1), "not those that adapter_config.json describes|outside a tensor"),
        (lambda t, i, v: t.__setitem__(i.replace("query", "quarry"), t[i].clone()), "quarry"),
    ],
)
def test_damaged_files_are_refused(change, match, build, saved):
    folder, _, _ = saved(epsilon=0.05)
    edit(folder, change)
    assert_refused(build("bert"), folder, match)


@pytest.mark.parametrize(
    ("records", "match"),
    [
        (
            {"bert.pooler.dense.weight": [10**12, "00000000", {"float32": "00000000"}, [10**12, 16], "float32"]},
            "1,000,000,000,000 entries",
        ),
        ({"bert.pooler.dense.weight": "many"}, "malformed entry for 'bert.pooler.dense.weight'"),
        ({"bert.pooler.dense.weight": [-1, "0", {}]}, "malformed entry"),
        (
            {"no.such.weight": [1, "00000000", {"float32": "00000000"}, [1], "float32"]},
            "'no.such.weight', which the model does not have",
        ),
    ],
)
@pytest.mark.parametrize("where", ["config", "metadata"])
def test_damaged_descriptions_are_refused_before_memory_is_taken(where, records, match, build, saved):
    folder, _, _ = saved()
    path, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if where == "config":
        path.write_text(json.dumps({**json.loads(path.read_text()), "records": records}))
        save_file(load_file(tensors), tensors)
    else:
        save_file(load_file(tensors), tensors, metadata={"dst_format_version": "1", "dst_records": json.dumps(records)})
    assert_refused(build("bert"), folder, match)


def test_files_of_two_saves(build, saved, tmp_path):
    """As a save leaves them that was cut short: what the tensors' file says itself counts; without it, refused."""
    folder, _, model = saved()
    train(model, "bert", first=60)
    model.save_pretrained(tmp_path / "later")
    shutil.copy(tmp_path / "later" / "adapter_model.safetensors", folder)
    loaded = PeftModel.from_pretrained(build("bert"), folder)
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    assert_refused(build("bert"), folder, "different saves")


def test_a_file_may_not_overwrite_the_base(build, saved):
    folder, _, _ = saved(epsilon=0.05)
    edit(folder, lambda t, i, v: t.__setitem__("base_model.model.bert.pooler.dense.weight", torch.zeros(16, 16)))
    assert_refused(build("bert"), folder, r"dense tensor '.*pooler.dense.weight', which would overwrite the base")


def test_more_entries_than_the_config_allows_are_refused(build, saved):
    folder, _, _ = saved(epsilon=0.5)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "epsilon": 0.001}))
    assert_refused(build("bert"), folder, r"entries, but the config of 'theirs' allows 6 free parameters")


def test_values_that_overflow_in_the_base_s_dtype_are_refused(build, saved):
    folder, _, _ = saved(epsilon=0.05)
    edit(folder, lambda t, i, v: t.__setitem__(v, t[v].double().fill_(1e300)))
    assert_refused(build("bert"), folder, r"value 1e\+300, which is not finite in torch.float32")


def test_saving_the_config_again_keeps_what_it_says_of_the_tensors(build, saved):
    folder, output, model = saved()
    before = json.loads((folder / "adapter_config.json").read_text())["records"]
    model.peft_config["default"].save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["records"] == before
    assert read_metadata(folder / "adapter_model.safetensors")["records"] == before
    assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), folder), "bert"), output)


def test_a_refused_adapter_leaves_the_base_as_it_was(build, saved):
    folder, _, _ = saved(epsilon=0.05)
    edit(folder, lambda t, i, v: t[i].__setitem__(0, -5))
    base = build("bert")
    with pytest.raises(DeltaError):
        PeftModel.from_pretrained(base, folder)
    assert all(p.requires_grad for p in base.parameters())
    assert [n for n, _ in base.named_modules()] == [n for n, _ in build("bert").named_modules()]


def test_a_newer_format_is_refused(build, saved):
    folder, _, _ = saved()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(ValueError, match=r"format version 2; this peft_dst reads version 1"):
        PeftModel.from_pretrained(build("bert"), folder)


def test_a_failed_stamp_leaves_the_file(saved, monkeypatch):
    from peft_dst.delta import files

    folder, _, model = saved()
    before = (folder / "adapter_model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.peft_config["default"].save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert {f.name for f in folder.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("packed", [False, True])
def test_a_config_does_not_describe_newer_tensors_than_those_beside_it(packed, build, saved):
    folder, output, model = saved(packed=packed)
    before = json.loads((folder / "adapter_config.json").read_text())["records"]
    train(model, "bert", first=20)
    get_peft_model_state_dict(model)
    config = model.peft_config["default"]
    config.base_model_name_or_path = "org/base"
    config.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert json.loads((folder / "adapter_config.json").read_text())["records"] == before
    assert read_metadata(folder / "adapter_model.safetensors")["records"] == before
    assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), folder), "bert"), output)
    model.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["records"] != before
    assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), folder), "bert"), logits(model, "bert"))
