"""Bases whose vocabulary is resized: before an adapter is added, after, and on the way to its file."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file

from peft_dst import DSTConfig
from peft_dst.delta import DeltaError
from tests.models import assert_same, logits, native, train, weights


RESIZED = "'model.embed_tokens.weight' has changed its shape since the adapter was added"


def resized(load):
    base = load()
    torch.manual_seed(7)
    base.resize_token_embeddings(70, mean_resizing=False)
    return base


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("save", ["auto", True])
@pytest.mark.parametrize(
    "targets", [None, ["q_proj"], ["embed_tokens", "lm_head"]], ids=["all", "others", "embeddings"]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_vocabulary_resized_before(name, targets, save, tmp_path):
    if name == "gpt2" and targets:
        targets = [{"q_proj": "c_attn", "embed_tokens": "wte"}.get(target, target) for target in targets]
    load = native(tmp_path, name)
    base = resized(load)
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.05, target_modules=targets))
    train(model, name)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=save)
    loaded = PeftModel.from_pretrained(resized(load), tmp_path / "adapter")
    assert torch.equal(logits(loaded, name), logits(model, name))
    with loaded.disable_adapter():
        assert_same(weights(loaded.get_base_model()), seed)
    assert torch.equal(logits(loaded, name), logits(model, name))


def test_a_vocabulary_resized_otherwise(tmp_path):
    """With other new rows: refused, unless PEFT saved the embeddings whole."""
    load = native(tmp_path, "llama")
    model = get_peft_model(resized(load), DSTConfig(epsilon=0.05))
    train(model, "llama")
    model.save_pretrained(tmp_path / "bare", save_embedding_layers=False)
    model.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "whole" / "adapter_model.safetensors")
    other = load()
    torch.manual_seed(8)
    other.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(DeltaError, match=r"'(lm_head|model.embed_tokens).weight': the base model's values differ"):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "bare")
    loaded = PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "whole")
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    with loaded.disable_adapter():
        assert_same(weights(loaded.get_base_model()), weights(resized(load)))
    # Not resized at all.
    with pytest.raises(DeltaError, match="outside a tensor of 976 components"):
        PeftModel.from_pretrained(load(), tmp_path / "bare")
    # transformers' own loader writes whole embeddings first, and knows nothing of their seed.
    other.load_adapter(tmp_path / "whole")
    with pytest.raises(DeltaError, match=r"has the adapter's values already.*PeftModel.from_pretrained"):
        logits(other, "llama")


def test_a_vocabulary_resized_after(build, tmp_path):
    """Refused at the next step and on saving; the other way round nothing is lost."""
    model = get_peft_model(build("llama"), DSTConfig(epsilon=0.05, target_modules=["embed_tokens"]))
    train(model, "llama")
    model.get_base_model().resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(RuntimeError, match=f"{RESIZED}.*Resize the base model .* before get_peft_model"):
        train(model, "llama", first=20)
    model.zero_grad()
    with pytest.raises(RuntimeError, match=RESIZED):
        model.save_pretrained(tmp_path)
    # An output head is replaced by a new module, and what was trained of the old one is gone.
    model = get_peft_model(build("llama"), DSTConfig(epsilon=0.05, target_modules=["lm_head", "q_proj"]))
    train(model, "llama")
    model.get_base_model().resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(RuntimeError, match=r"the module of 'lm_head.weight' was replaced since the adapter 'default'"):
        model.save_pretrained(tmp_path)
