"""Adapters at a part of their strength."""

from __future__ import annotations

import peft.helpers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import check_if_peft_model

from peft_dst import rescale_adapter_scale
from tests.models import assert_same, bert, logits, train, tuned_model, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0, 0.3, 1, 2.0, -1.0])
def test_differences_are_scaled_and_come_back_bit_for_bit(build, scale, dtype):
    model, _ = tuned_model(build, adapters=("a", "b"))
    model.to(dtype)
    with model.disable_adapter():
        seed = weights(model)
    for names in (["a"], ["b"], ["a", "b"]):
        model.base_model.set_adapter(names)
        tuned = weights(model)
        with peft.helpers.rescale_adapter_scale(model, scale):
            for name, found in weights(model).items():
                wanted = seed[name].double() + scale * (tuned[name].double() - seed[name].double())
                if len(names) == 1:
                    assert torch.equal(found, wanted.to(dtype))
                else:
                    # Each adapter's values are rounded, and where both have one so is their sum.
                    most = (
                        torch.finfo(dtype).eps * 2 * (1 + abs(scale)) * (seed[name].abs() + tuned[name].abs()).double()
                    )
                    assert ((found.double() - wanted).abs() <= most).all()
            with model.disable_adapter():
                assert_same(weights(model), seed)
        assert_same(weights(model), tuned)


def test_scales_multiply_and_follow_the_active_adapter(build):
    model, _ = tuned_model(build, adapters=("a", "b"))
    with rescale_adapter_scale(model, 0.25):
        quarter = logits(model, "bert")
    with rescale_adapter_scale(model, 0.5):
        with rescale_adapter_scale(model, 0.5):
            assert torch.equal(logits(model, "bert"), quarter)
        model.set_adapter("a")
        half = logits(model, "bert")
    model.set_adapter("a")
    with rescale_adapter_scale(model, 0.5):
        assert torch.equal(logits(model, "bert"), half)


def test_saved_values_stay_as_they_are(build, tmp_path):
    model, outputs = tuned_model(build)
    with rescale_adapter_scale(model, 0.5):
        model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(logits(again, "bert"), outputs["default"])
    assert check_if_peft_model(str(tmp_path))


def test_it_ends_also_when_something_raises_and_training_goes_on(build):
    model, outputs = tuned_model(build)
    reference, _ = tuned_model(build)
    with pytest.raises(RuntimeError, match=r"is stepping .* shows rescaled"), rescale_adapter_scale(model, 0.5):
        train(model, "bert", steps=1)
    model.zero_grad()
    assert torch.equal(logits(model, "bert"), outputs["default"])
    for one in (model, reference):
        train(one, "bert", first=20)
    assert_same(weights(model), weights(reference))


def test_bad_input_and_other_models(build):
    model, _ = tuned_model(build)
    with pytest.raises(TypeError, match="should be of type float"), rescale_adapter_scale(model, "1"):
        pass
    with pytest.raises(ValueError, match="has no DST adapter"), rescale_adapter_scale(bert(), 1):
        pass
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"), rescale_adapter_scale(model, 1):
        pass
    lora = get_peft_model(bert(), LoraConfig(target_modules=["query"], init_lora_weights=False))
    before = logits(lora, "bert")
    with peft.helpers.rescale_adapter_scale(lora, 0.0):
        assert not torch.equal(logits(lora, "bert"), before)
    assert torch.equal(logits(lora, "bert"), before)


def test_what_is_merged_inside_stays_so(build):
    """WiSE-FT for good: merged at half strength, it is not put back to full when the context ends."""
    model, outputs = tuned_model(build)
    with rescale_adapter_scale(model, 0.5):
        half = logits(model, "bert")
        model.merge_adapter()
    assert torch.equal(logits(model, "bert"), half)
    model.unmerge_adapter()
    assert torch.equal(logits(model, "bert"), outputs["default"])
    with rescale_adapter_scale(model, 0.5):
        merged = model.merge_and_unload()
    assert torch.equal(logits(merged, "bert"), half)
