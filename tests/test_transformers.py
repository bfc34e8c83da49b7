"""transformers' own integration: add_adapter, load_adapter and from_pretrained of an adapter's folder."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from peft_dst import DSTConfig
from peft_dst.core import Constraint
from peft_dst.delta import DeltaError
from tests.models import assert_same, bert, logits, native, train, weights


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "t5"])
def test_transformers_load_adapter_and_from_pretrained(name, tmp_path):
    load = native(tmp_path, name)
    model = get_peft_model(load(), DSTConfig(epsilon=0.02))
    train(model, name)
    model.save_pretrained(tmp_path / "adapter")
    output, seed = logits(model, name), weights(load())

    base = load()
    base.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(base, name), output)
    base.disable_adapters()
    assert_same(weights(base), seed)
    base.enable_adapters()
    assert torch.equal(logits(base, name), output)

    auto = {"bert": AutoModelForSequenceClassification, "t5": AutoModelForSeq2SeqLM}.get(name, AutoModelForCausalLM)
    direct = auto.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(direct, name), output)


def test_transformers_add_train_save_load_switch_delete(tmp_path):
    load = native(tmp_path)
    base = load()
    seed = weights(base)
    base.add_adapter(DSTConfig(epsilon=0.02), "one")
    train(base, "bert")
    one = logits(base, "bert")
    assert 0 < sum(int((p != seed[n]).sum()) for n, p in weights(base).items()) <= base.dst_constraints["one"].budget
    base.save_pretrained(tmp_path / "one")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        # transformers makes a tuner anew for every adapter, and PEFT remarks on it, whatever the method.
        base.add_adapter(DSTConfig(epsilon=0.02), "two")
    train(base, "bert", first=9)
    two = logits(base, "bert")
    base.set_adapter("one")
    assert torch.equal(logits(base, "bert"), one)
    base.set_adapter("two")
    assert torch.equal(logits(base, "bert"), two)
    for loaded in (PeftModel.from_pretrained(load(), tmp_path / "one"), type(base).from_pretrained(tmp_path / "one")):
        assert torch.equal(logits(loaded, "bert"), one)
    base.set_adapter("one")
    base.delete_adapter("two")
    assert torch.equal(logits(base, "bert"), one)


def test_transformers_load_is_complete_before_any_part_is_used(tmp_path, capfd):
    """T5's generate calls the encoder before the model; a tuned decoder must not meet a seed encoder."""
    load = native(tmp_path, "t5")
    model = get_peft_model(load(), DSTConfig(epsilon=0.05))
    train(model, "t5", lr=0.3)
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(2, 9)[None]
    capfd.readouterr()
    direct = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    assert "MISSING" not in capfd.readouterr().err
    direct.encoder(tokens)
    assert_same(weights(direct), weights(model.get_base_model()))
    direct = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(direct.generate(tokens, **options), model.generate(input_ids=tokens, **options))


def test_transformers_load_with_a_dense_head(tmp_path):
    load = native(tmp_path)
    model = get_peft_model(load(), DSTConfig(epsilon=0.02, modules_to_save=["classifier"]))
    train(model, "bert")
    model.save_pretrained(tmp_path / "adapter")
    base = load()
    base.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(base, "bert"), logits(model, "bert"))


def test_transformers_load_onto_another_base_is_refused(tmp_path):
    load = native(tmp_path)
    model = get_peft_model(load(), DSTConfig(epsilon=0.02))
    train(model, "bert")
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(99)
    other = bert()
    seed = weights(other)
    other.load_adapter(tmp_path / "adapter")
    other.set_adapter("default")
    with pytest.raises(DeltaError, match="belongs to another base"):
        logits(other, "bert")
    assert_same(weights(other), seed)


def saved_in_float32(tmp_path):
    """A loader of the base of a saved adapter, and its tuned weights in bfloat16."""
    load = native(tmp_path, "bert")
    model = get_peft_model(load(), DSTConfig(epsilon=0.02))
    train(model, "bert")
    model.save_pretrained(tmp_path / "adapter")
    return load, {n: p.bfloat16() for n, p in weights(model.get_base_model()).items()}


@pytest.mark.parametrize("when", ["before", "between", "at once"])
def test_transformers_loads_a_float32_adapter_onto_a_bfloat16_base(when, tmp_path):
    load, tuned = saved_in_float32(tmp_path)
    if when == "at once":
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    else:
        base = load().bfloat16() if when == "before" else load()
        base.load_adapter(tmp_path / "adapter")
        base.bfloat16()
    logits(base, "bert")
    assert_same(weights(base), tuned)
    assert {p.dtype for n, p in base.named_parameters()} == {torch.bfloat16}
    base.disable_adapters()
    assert_same(weights(base), weights(load().bfloat16()))


def test_a_deleted_adapter_no_longer_constrains(tmp_path):
    """Transformers deletes it from the layers, and knows no tuner."""
    base = native(tmp_path)()
    live = set(Constraint.live)
    base.add_adapter(DSTConfig(epsilon=0.02), "a")
    train(base, "bert")
    assert len(set(Constraint.live) - live) == 1
    base.delete_adapter("a")
    assert set(Constraint.live) == live
    assert not base.dst_constraints
    base.requires_grad_(True)
    before = weights(base)
    train(base, "bert")
    changed = sum(int((p != before[n]).sum()) for n, p in weights(base).items())
    assert changed > sum(p.numel() for p in before.values()) // 2
    # What was trained meanwhile is the seed of the next one.
    seed = weights(base)
    base.add_adapter(DSTConfig(epsilon=0.02), "b")
    train(base, "bert")
    base.save_pretrained(tmp_path / "b")
    base.disable_adapters()
    assert_same(weights(base), seed)
