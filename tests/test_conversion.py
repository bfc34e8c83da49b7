"""Adapters of other methods, made by PEFT itself, and dense checkpoints, made into deltas."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, PromptEncoderConfig, ShiraConfig, SupertuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_dst import DSTConfig
from peft_dst.conversion import convert_adapter, convert_checkpoint
from peft_dst.core import select
from peft_dst.delta import SparseDelta, export_patches, merge
from peft_dst.extraction import layout_of
from tests.models import BUILDERS, assert_same, bert, logits, train, weights


TARGETS = {"bert": ["query", "intermediate.dense"], "llama": ["q_proj", "down_proj"]}


@pytest.fixture
def adapter(tmp_path):
    """Save a base and an adapter of another method with weights in it; return how to load the base, and its outputs."""

    def make(config, name="bert", dtype=torch.float32):
        torch.manual_seed(0)
        model = BUILDERS[name]()
        model.to(dtype).save_pretrained(tmp_path / "base")

        def load():
            return type(model).from_pretrained(tmp_path / "base", dtype=dtype)

        tuned = get_peft_model(load(), config)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.05)
        tuned.save_pretrained(tmp_path / "other")
        with torch.sparse.check_sparse_tensor_invariants():
            return load, logits(tuned, name), tuned

    return make


def converted(tmp_path, **options):
    return convert_adapter(tmp_path / "other", tmp_path / "base", tmp_path / "out", progress=False, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("kind", ["shira", "supertuning"])
def test_sparse_methods_come_over_exactly(kind, name, dtype, adapter, tmp_path):
    options = {"target_modules": TARGETS[name], "modules_to_save": ["classifier"] if name == "bert" else None}
    config = ShiraConfig(r=2, **options) if kind == "shira" else SupertuningConfig(sparsity=0.9, **options)
    load, output, tuned = adapter(config, name, dtype)
    report = converted(tmp_path)
    model = PeftModel.from_pretrained(load(), tmp_path / "out")
    with torch.sparse.check_sparse_tensor_invariants():
        merged = tuned.merge_and_unload()
    assert_same(weights(model.merge_and_unload()), weights(merged))
    # The values are the seed plus what PEFT adds to it, in the base's dtype; where that rounds to nothing there is none.
    delta = SparseDelta.load(tmp_path / "out")
    base = weights(load())
    assert {n: t.indices.tolist() for n, t in delta.items()} == {
        n: (merged.get_parameter(n) != base[n]).flatten().nonzero().view(-1).tolist()
        for n in base
        if "classifier" not in n and not torch.equal(merged.get_parameter(n), base[n])
    }
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(), tmp_path / "out"), name), output)
    assert report.total.reset == 0
    assert report.total.error < 1e-6
    assert len(delta.dense) == (2 if name == "bert" else 0)
    assert delta.config["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}, {"bias": "lora_only"}], ids=str)
def test_a_lora_whole(variant, adapter, tmp_path):
    load, output, tuned = adapter(
        LoraConfig(r=2, target_modules=TARGETS["bert"], modules_to_save=["classifier"], **variant)
    )
    report = converted(tmp_path, epsilon=1.0)
    model = PeftModel.from_pretrained(load(), tmp_path / "out")
    torch.testing.assert_close(logits(model, "bert"), output)
    assert_same(weights(model.merge_and_unload()), weights(tuned.merge_and_unload()))
    assert report.total.error < 1e-6


def test_the_nearest_delta_to_a_lora(adapter, tmp_path):
    load, _, tuned = adapter(LoraConfig(r=2, target_modules=TARGETS["bert"]))
    report = converted(tmp_path, epsilon=0.1)
    base, merged = weights(load()), weights(tuned.merge_and_unload())
    changed = {name: (merged[name] - base[name]).double() for name in base if not torch.equal(merged[name], base[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {"query", "dense"}
    size = sum(change.numel() for change in changed.values())
    delta = SparseDelta.load(tmp_path / "out")
    assert delta.num_entries == report.total.free == round(0.1 * size)
    # No other delta of that size is nearer: what was kept are the largest changes of all.
    every = torch.cat([change.flatten().abs() for change in changed.values()])
    cut = every.sort(descending=True).values[delta.num_entries :].norm() / every.norm()
    assert report.total.error == pytest.approx(float(cut), rel=1e-6)
    for figures in report.parameters:
        left = changed[figures.name].flatten().clone()
        if figures.name in delta:
            left[delta[figures.name].indices] = 0
        assert figures.error == pytest.approx(float(left.norm() / changed[figures.name].norm()), rel=1e-6)
    assert {figures.name for figures in report.parameters} == changed.keys()


def test_distance_siloing_and_number_are_the_users(adapter, tmp_path):
    load, _, tuned = adapter(LoraConfig(r=2, target_modules=["query"]))
    converted(tmp_path, num_free_parameters=20, siloing="parameter", distance="relative")
    base, merged = weights(load()), weights(tuned.merge_and_unload())
    for name, tensor in SparseDelta.load(tmp_path / "out").items():
        seeds, new = base[name].flatten(), merged[name].flatten()
        assert torch.equal(tensor.indices, select([seeds], [new], 10, "relative").indices[0])


def test_labels_are_those_of_the_adapters_head(tmp_path):
    bert().bert.save_pretrained(tmp_path / "base")
    model = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    tuned = get_peft_model(model, ShiraConfig(r=1, target_modules=["query"], task_type="SEQ_CLS", init_weights=False))
    tuned.save_pretrained(tmp_path / "other")
    converted(tmp_path)
    delta = SparseDelta.load(tmp_path / "out")
    assert delta.dense["base_model.model.classifier.weight"].shape == (5, 16)
    merge(tmp_path / "base", delta, tmp_path / "merged", layout=layout_of(tmp_path / "base"))
    again = type(model).from_pretrained(tmp_path / "merged", num_labels=5)
    with torch.no_grad(), torch.sparse.check_sparse_tensor_invariants():
        ids = torch.arange(7).view(1, 7)
        torch.testing.assert_close(again(ids).logits, tuned.eval()(ids).logits)


def test_what_cannot_be_converted(adapter, tmp_path):
    adapter(LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match=r"LORA adapter, which changes every component.*epsilon"):
        converted(tmp_path)
    adapter(SupertuningConfig(sparsity=0.9, r=2, lora_alpha=2.0, target_modules=["query"]))
    with pytest.raises(ValueError, match="SUPERTUNING adapter, which changes every component"):
        converted(tmp_path)
    get_peft_model(bert(), ShiraConfig(r=1, target_modules=["query"])).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="changes none of the base's weights"):
        converted(tmp_path)
    get_peft_model(bert(), DSTConfig(epsilon=0.1)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is a DST adapter already"):
        converted(tmp_path)
    (tmp_path / "out").write_text("something")
    with pytest.raises(ValueError, match="exists already"):
        converted(tmp_path)
    assert (tmp_path / "out").read_text() == "something"


def test_positions_that_point_elsewhere(adapter, tmp_path):
    adapter(ShiraConfig(r=1, target_modules=["query"]))
    path = tmp_path / "other" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: t + 1000 if k.endswith("indices") else t for k, t in tensors.items()}, path)
    with pytest.raises(ValueError, match="cannot merge into its base"):
        converted(tmp_path)


def test_what_cannot_be_merged(adapter, tmp_path):
    adapter(PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "llama")
    with pytest.raises(ValueError, match="which PEFT cannot merge into its base"):
        converted(tmp_path, epsilon=0.1)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_a_checkpoint_whole(name, build, tmp_path):
    base = build(name)
    base.save_pretrained(tmp_path / "base")
    train(base, name, steps=1)
    base.save_pretrained(tmp_path / "tuned")
    delta = convert_checkpoint(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert delta.num_entries > 1000
    model = PeftModel.from_pretrained(build(name), tmp_path / "out")
    assert_same(weights(model.merge_and_unload()), weights(base))
    merge(tmp_path / "base", SparseDelta.load(tmp_path / "out"), tmp_path / "back", layout=layout_of(tmp_path / "base"))
    assert_same(weights(type(base).from_pretrained(tmp_path / "back")), weights(base))


def test_a_tied_tensor_that_both_checkpoints_hold_twice(build, tmp_path):
    base = build("gpt2")
    for folder in ("base", "tuned"):
        base.save_pretrained(tmp_path / folder)
        tensors = load_file(tmp_path / folder / "model.safetensors")
        save_file(
            {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()},
            tmp_path / folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        train(base, "gpt2", steps=1)
    delta = convert_checkpoint(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert "transformer.wte.weight" in delta
    assert "lm_head.weight" not in delta
    PeftModel.from_pretrained(build("gpt2"), tmp_path / "out")
    # An engine's patches have both.
    export_patches(tmp_path / "base", delta, tmp_path / "patch", layout=layout_of(tmp_path / "base"))
    patches = load_file(tmp_path / "patch")
    assert torch.equal(patches["lm_head.weight.values"], patches["transformer.wte.weight.values"])
    # It went on with two.
    path = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(path)
    for name in ("lm_head.weight", "transformer.wte.weight"):
        save_file({**tensors, name: tensors[name] + 1}, path, metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"'transformer\.wte\.weight' and 'lm_head\.weight' are one parameter in .*/base"
        ):
            convert_checkpoint(tmp_path / "tuned", tmp_path / "base", tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_checkpoints_that_do_not_fit(build, tmp_path):
    build("bert").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="has the same weights"):
        convert_checkpoint(tmp_path / "base", tmp_path / "base", tmp_path / "out")
    build("gpt2").save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="leads from a base to weights of the same shapes"):
        convert_checkpoint(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    for folder, steps in (("experts", 0), ("tuned_experts", 1)):
        model = build("mixtral")
        train(model, "mixtral", steps)
        model.save_pretrained(tmp_path / folder)
    with pytest.raises(ValueError, match=r"experts.*is joined with others.*peft_dst\.extract"):
        convert_checkpoint(tmp_path / "tuned_experts", tmp_path / "experts", tmp_path / "out")
    assert not (tmp_path / "out").exists()
