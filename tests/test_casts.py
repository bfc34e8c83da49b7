"""Dtypes that change behind the adapter's back: through `.data` of parameters, or with another owner of a shared weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import cast_mixed_precision_params
from safetensors.torch import load_file
from torch import nn

from peft_dst import DSTConfig
from peft_dst.tuner.entries import Entries
from tests.models import assert_same, logits, train, tuned_model, weights


def by_peft(model: nn.Module) -> None:
    cast_mixed_precision_params(model, torch.float16)


def trainable_ones(model: nn.Module) -> None:
    """As the scripts of diffusers do it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def other_owner(model: nn.Module) -> None:
    model.get_base_model().lm_head.float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast", [by_peft, trainable_ones, other_owner])
def test_widened_weights_are_trained_and_saved(cast, dtype, build, tmp_path):
    base = build("gpt2").to(dtype)
    fresh = copy.deepcopy(base)
    targets = ["wte"] if cast is other_owner else None
    model = get_peft_model(base, DSTConfig(epsilon=0.02, target_modules=targets))
    cast(model)
    if cast is other_owner:
        model.float()
    train(model, "gpt2")
    tuned = weights(base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh.float(), tmp_path)
    assert_same(weights(loaded.get_base_model()), tuned)
    with torch.no_grad():
        model.get_base_model().transformer.wte.weight.mul_(1 + 2**-12)
    with pytest.raises(RuntimeError, match="differs from the seed outside the subset"):
        model.save_pretrained(tmp_path)


def test_an_alias_alone_is_cast_and_nothing_trained(build, tmp_path):
    model = get_peft_model(build("gpt2").half(), DSTConfig(epsilon=0.02))
    model.get_base_model().lm_head.float()
    model.save_pretrained(tmp_path)


def test_what_was_rounded_through_data_is_refused(build, tmp_path):
    model, _ = tuned_model(build)
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    with pytest.raises(RuntimeError, match=r"cast to a narrower dtype.*model\.to\(dtype\)"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("copied", [False, True])
def test_records_keep_what_they_hold(copied, build, saved, tmp_path):
    """PEFT's helper casts them, since they are frozen, while the weights stay in float32."""
    folder, output, _ = saved()
    model = PeftModel.from_pretrained(build("bert"), folder, is_trainable=True)
    if copied:
        model = copy.deepcopy(model)
    tuned, seed = weights(model.get_base_model()), weights(build("bert"))
    cast_mixed_precision_params(model, torch.float16)
    with model.disable_adapter():
        assert_same(weights(model.get_base_model()), seed)
    assert_same(weights(model.get_base_model()), tuned)
    assert torch.equal(logits(model, "bert"), output)
    cast_mixed_precision_params(model, torch.float16)
    model.save_pretrained(tmp_path / "again")
    assert_same(
        load_file(tmp_path / "again/adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    )
    for buffer in model.buffers():
        buffer.data = buffer.data.half()
    model.save_pretrained(tmp_path / "again")
    assert_same(
        load_file(tmp_path / "again/adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    )


def test_casting_all_tensors_leaves_positions_whole_numbers(build):
    model, _ = tuned_model(build)
    reference = copy.deepcopy(model).to(torch.bfloat16)
    model.get_base_model().type(torch.bfloat16)
    assert_same(weights(model.get_base_model()), weights(reference.get_base_model()))
    with model.disable_adapter(), reference.disable_adapter():
        assert_same(weights(model.get_base_model()), weights(reference.get_base_model()))
    assert_same(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda entries: pickle.loads(pickle.dumps(entries))])
def test_copies_of_records_keep_what_they_hold_and_hold_it_once(copied):
    entries = Entries()
    entries.put("weight", torch.full((1000,), 1 / 3))
    entries.put("indices", torch.arange(1000))
    other = copied(entries)
    with torch.no_grad():
        other.weight.fill_(2 / 3)
    for one, value in ((entries, 1 / 3), (other, 2 / 3)):
        one.weight.data = one.weight.data.half()
        for found in (copied(one), one):
            assert_same(found.tensors(), {"weight": torch.full((1000,), value), "indices": torch.arange(1000)})
    assert len(pickle.dumps(other)) < 1.5 * 1000 * (4 + 8)
