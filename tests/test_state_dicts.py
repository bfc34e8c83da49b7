"""Whole models in state dicts: as other libraries save them, with what they leave out, and as they are loaded again."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from safetensors.torch import load_model, save_model

from peft_dst import DSTConfig
from tests.models import assert_same, bert, train, tuned_model, weights


def test_accelerate_s_state_right_after_a_step(build, tmp_path):
    """It drops tensors that share their memory with another one."""
    seed = weights(build("bert"))
    accelerator = Accelerator(cpu=True)
    model, _ = tuned_model(build, epsilon=0.1)
    model = accelerator.prepare(model)
    tuned = weights(model.get_base_model())
    accelerator.save_state(tmp_path)
    train(model, "bert", first=20)
    accelerator.load_state(tmp_path)
    assert_same(weights(model.get_base_model()), tuned)
    with model.disable_adapter():
        assert_same(weights(model.get_base_model()), seed)


@pytest.mark.parametrize("missing", ["seed_indices", "seed_values"])
def test_half_of_the_seed_s_notes_is_refused(missing, build):
    """Before anything of the state is loaded, though what is missing belongs to the last module."""
    model, _ = tuned_model(build)
    state = copy.deepcopy(model.state_dict())
    del state[f"base_model.model.classifier._sparse.{missing}.weight"]
    train(model, "bert", first=20)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"'base_model.model.classifier._sparse.{missing}.weight' is missing"):
        model.load_state_dict(state)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
def test_shared_weights_saved_under_another_name_alone(name, build, tmp_path):
    """Of a shared tensor safetensors keeps one name, the alphabetically first."""

    def base():
        made = build(name)
        if name == "llama":
            made.lm_head.weight = made.model.embed_tokens.weight
        return made

    seed = weights(base())
    model = get_peft_model(base(), DSTConfig(epsilon=0.05))
    train(model, name)
    save_model(model, str(tmp_path / "model.safetensors"))
    tuned = weights(model.get_base_model())
    again = get_peft_model(base(), DSTConfig(epsilon=0.05))
    for _ in range(2):
        load_model(again, str(tmp_path / "model.safetensors"))
        assert_same(weights(again.get_base_model()), tuned)
        with again.disable_adapter():
            assert_same(weights(again.get_base_model()), seed)
        again.save_pretrained(tmp_path / "adapter")
        assert_same(weights(PeftModel.from_pretrained(base(), tmp_path / "adapter").get_base_model()), tuned)
        train(again, name, first=20)


def test_a_shared_weight_is_loaded_by_either_name(build):
    """What came under the first name in an earlier call says nothing of what comes under the other one later."""
    model, _ = tuned_model(build, "gpt2")
    seed = weights(build("gpt2"))
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    tuned = state["base_model.model.lm_head.weight"]
    train(model, "gpt2", first=20)
    head = model.get_base_model().lm_head
    head.load_state_dict({"weight": tuned}, strict=False)
    with model.disable_adapter():
        assert torch.equal(head.weight, tuned)
        assert not torch.equal(head.weight, seed["transformer.wte.weight"])


def test_hooks_for_other_names_are_registered_once(build):
    model, _ = tuned_model(build, "gpt2")
    head = model.get_base_model().lm_head
    hooks = len(head._load_state_dict_pre_hooks)
    model.add_adapter("other", DSTConfig(epsilon=0.02))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.delete_adapter("other")
    assert len(head._load_state_dict_pre_hooks) == hooks - 1
    for name in ("default", "default", "another"):
        model.add_adapter(name, DSTConfig(epsilon=0.02))
        assert len(head._load_state_dict_pre_hooks) == hooks
        model.delete_adapter(name)
    # Nor does anything else of an adapter stay.
    notes = model.base_model.model.transformer.wte._sparse.sizes
    assert not {"default", "another", "other"} & notes.__dict__.keys()


@pytest.mark.parametrize("state", ["trained", "fresh", "disabled"])
def test_tuned_weights_without_what_belongs_to_them_are_refused(state, build):
    """Put aside by whoever keeps the best of what is trained, and nothing else."""
    model, _ = tuned_model(build, epsilon=0.05)
    best = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if state == "fresh":
        model = get_peft_model(build("bert"), DSTConfig(epsilon=0.05))
    else:
        train(model, "bert", first=20)
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"differs from the seed in 323 of 6,451 .*get_peft_model_state_dict"):
        model.load_state_dict(best, strict=False)
    assert_same(model.state_dict(), before)


def test_tuned_weights_under_a_tracked_threshold_are_refused_however_many_differ(build):
    """After a leap of the learning rate a step keeps several times the budget: the threshold moves by so much at most."""
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.005, threshold="iterative", siloing="none"))
    train(model, "bert", 2, lr=1e-2)
    train(model, "bert", 1, lr=5e-2)
    constraint = model.base_model.constraint()
    assert constraint.silos[0].free() > constraint.tracking[1] * constraint.budget
    best = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, "bert", first=20)
    with pytest.raises(ValueError, match="has tuned weights and no records"):
        model.load_state_dict(best, strict=False)


@pytest.mark.parametrize("epsilon", [0.05, 1.0])
def test_another_base_is_loaded_under_an_adapter(epsilon, build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=epsilon))
    train(model, "bert")
    torch.manual_seed(99)
    for base in (bert(), build("bert")):
        model.get_base_model().load_state_dict(base.state_dict(), strict=False)
        with model.disable_adapter():
            assert_same(weights(model.get_base_model()), weights(base))
