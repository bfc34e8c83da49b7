"""Static subsets: only they are trained, by parameters of their own, as a dense optimizer under a filter would."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback

from peft_dst import (
    DSTCallback,
    DSTConfig,
    DSTOptimizer,
    create_dst_optimizer,
    fix_subset,
    parameter_groups,
    score_parameters,
)
from peft_dst.training.callback import training_advice
from tests.models import Outer, assert_same, batch, logits, loss, trainable, weights
from tests.training.test_trainer import Rows, arguments


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, foreach=False),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "silo_by_silo": lambda p: DSTOptimizer(p, torch.optim.SGD, lr=0.1, momentum=0.9),
}


def fixed(build, name="bert", **options):
    return get_peft_model(build(name), DSTConfig(**{"epsilon": 0.02, "selection": "random", **options}))


def subset(model):
    return {weight.name: weight.indices.clone() for weight in model.constraint().weights}


def filtered(build, name, positions, make, steps):
    """Weights after every step of a dense optimizer whose gradients are zero outside the subset."""
    model = build(name)
    optimizer = make(list(model.parameters()))
    for step in range(steps):
        loss(model, name, step).backward()
        for key, parameter in model.named_parameters():
            inside = torch.zeros(parameter.numel(), dtype=torch.bool)
            inside[positions[key]] = True
            if parameter.grad is not None:
                parameter.grad.mul_(inside.view(parameter.shape))
        optimizer.step()
        optimizer.zero_grad()
        yield weights(model)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equals_a_dense_optimizer_with_filtered_gradients(kind, architecture, build):
    make = OPTIMIZERS[kind]
    model = fixed(build, architecture)
    positions = subset(model)
    optimizer = make(trainable(model))
    dense = OPTIMIZERS["sgd"] if kind == "silo_by_silo" else make
    for step, wanted in enumerate(filtered(build, architecture, positions, dense, 4)):
        loss(model, architecture, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        now = weights(model.get_base_model())
        for key in wanted:
            # torch's vectorised loops round differently at a tensor's end, and a subset has other ends: last bits, which
            # Adam divides by small numbers.
            rtol, atol = (1e-5, 1e-6) if kind.startswith("adam") else (1e-5, 1e-7)
            torch.testing.assert_close(now[key], wanted[key], rtol=rtol, atol=atol)
            outside = torch.ones(now[key].numel(), dtype=torch.bool)
            outside[positions[key]] = False
            assert torch.equal(now[key].flatten()[outside], wanted[key].flatten()[outside])
        assert_same(subset(model), positions)


def test_the_optimizer_sees_the_subset_only(build):
    model = fixed(build)
    budget = model.constraint().budget
    optimizer = torch.optim.AdamW(trainable(model))
    for step in range(2):
        loss(model, "bert", step).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert sum(gradient.numel() for gradient in gradients) == budget
        optimizer.step()
    state = [t for entries in optimizer.state.values() for t in entries.values() if t.dim()]
    assert sum(tensor.numel() for tensor in state) == 2 * budget
    assert model.get_nb_trainable_parameters() == (budget, sum(p.numel() for p in build("bert").parameters()))


def test_weights_without_free_values_get_no_gradient(build):
    model = get_peft_model(build("bert"), DSTConfig(selection="bitfit"))
    for weight in model.constraint().weights:
        assert weight.parameter.requires_grad == weight.name.endswith("bias")
    assert model.constraint().budget == sum(p.numel() for n, p in build("bert").named_parameters() if "bias" in n)


def test_accumulation_and_clipping_act_on_the_subset(build):
    model, other = fixed(build), fixed(build)
    one, two = torch.optim.SGD(trainable(model), lr=0.1), torch.optim.SGD(trainable(other), lr=0.1)
    for step in range(3):
        (loss(model, "bert", step) / 3).backward()
    norm = torch.nn.utils.clip_grad_norm_(trainable(model), 0.01)
    one.step()
    sum(loss(other, "bert", step) / 3 for step in range(3)).backward()
    dense = build("bert")
    sum(loss(dense, "bert", step) / 3 for step in range(3)).backward()
    positions = subset(model)
    gathered = [p.grad.flatten()[positions[n]] for n, p in dense.named_parameters() if p.grad is not None]
    torch.testing.assert_close(norm, torch.cat(gathered).norm(), rtol=1e-5, atol=0)
    torch.nn.utils.clip_grad_norm_(trainable(other), 0.01)
    two.step()
    for key, value in weights(model.get_base_model()).items():
        torch.testing.assert_close(weights(other.get_base_model())[key], value, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [torch.optim.AdamW, DSTOptimizer], ids=["hook", "silo_by_silo"])
def test_interrupted_and_resumed_equals_uninterrupted(make, dtype, build, tmp_path):
    def run(folder, resume=None, stop=None):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == stop

        torch.manual_seed(3)
        model = get_peft_model(
            build("bert").to(dtype), DSTConfig(epsilon=0.02, selection="random", modules_to_save=["classifier"])
        )
        args = arguments(folder, save_strategy="steps", save_steps=5, warmup_steps=3, max_grad_norm=1.0)
        optimizer = create_dst_optimizer(model, make, lr=1e-2, head_lr=1e-3)
        trainer = Trainer(model, args, train_dataset=Rows("bert"), callbacks=[Stop()], optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=5)
    resumed = run(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-5"))
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert all(w.free is not None for w in resumed.constraint().weights if w.indices.numel())


def test_bfloat16_weights_train_with_float32_values(build):
    """Updates far below a bfloat16 weight's last bit add up."""
    model = get_peft_model(build("bert").bfloat16(), DSTConfig(epsilon=0.02, selection="random"))
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    start = {weight: weight.free.detach().clone() for weight in model.constraint().weights if weight.free is not None}
    for _ in range(64):
        for weight in start:
            weight.parameter.grad = torch.full_like(weight.parameter, -(2.0**-16))
        optimizer.step()
        optimizer.zero_grad()
    for weight, values in start.items():
        assert torch.equal(weight.free.detach(), values + 64 * 2.0**-16)
        assert torch.equal(weight.values(), weight.free.detach().bfloat16())


def test_trainer_with_its_own_optimizer(build, tmp_path):
    model = fixed(build, modules_to_save=["classifier"])
    seed, positions = weights(build("bert")), subset(model)
    Trainer(model, arguments(tmp_path), train_dataset=Rows("bert")).train()
    moved = 0
    for weight in model.constraint().weights:
        changed = (weight.data != seed[weight.name]).flatten().nonzero().flatten()
        assert torch.isin(changed, positions[weight.name]).all()
        moved += changed.numel()
    assert moved > 0.5 * model.constraint().budget


def test_saved_loaded_and_trained_further(build, tmp_path):
    model = fixed(build)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    loss(model, "bert").backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    before, positions = logits(model, "bert"), subset(model)
    frozen = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(logits(frozen, "bert"), before)
    assert not trainable(frozen)
    again = PeftModel.from_pretrained(build("bert"), tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW(trainable(again), lr=1e-2)
    loss(again, "bert", 1).backward()
    optimizer.step()
    assert_same(subset(again), positions)
    assert not torch.equal(logits(again, "bert"), before)


def test_switching_disabling_and_deleting(build):
    model = fixed(build)
    seed = weights(build("bert"))
    model.add_adapter("other", DSTConfig(epsilon=0.01, selection="magnitude"))
    results = {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        for step in range(2):
            loss(model, "bert", step).backward()
            with model.disable_adapter():
                assert_same(weights(model.get_base_model()), seed)
            optimizer.step()
            optimizer.zero_grad()
        results[name] = logits(model, "bert")
    model.set_adapter("other")
    assert torch.equal(logits(model, "bert"), results["other"])
    model.delete_adapter("default")
    assert torch.equal(logits(model, "bert"), results["other"])
    model.unload()
    assert_same(weights(model.get_base_model()), seed)


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_what_gathers_gradients_goes_with_the_subset(build):
    """Scoring the model, which wants all of them, is possible again where no fixed subset is trained."""
    model = fixed(build)
    model.add_adapter("dynamic", DSTConfig(epsilon=0.02))
    seed = build("bert")
    wanted = score_parameters(seed, [batch("bert")], progress=False)
    names = {f"base_model.model.{name}": score for name, score in wanted.items()}

    def scores():
        return score_parameters(model, [batch("bert")], names=names, progress=False)

    for switch in (
        lambda: model.set_adapter("dynamic"),
        lambda: model.set_adapter("default", inference_mode=True),
        lambda: (model.set_adapter("default"), model.delete_adapter("default")),
    ):
        model.set_adapter("default")
        with pytest.raises(ValueError, match="has a hook that waits for its gradient"):
            scores()
        switch()
        assert_same(scores(), names)


def test_a_deep_copy_trains_as_the_original(build):
    model = fixed(build)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        optimizer = torch.optim.AdamW(trainable(each), lr=1e-2)
        for step in range(3):
            loss(each, "bert", step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(weights(twin.get_base_model()), weights(model.get_base_model()))


def test_values_keep_their_precision_when_the_model_is_cast(build):
    model = fixed(build)
    model.bfloat16()
    assert {w.free.dtype for w in model.constraint().weights if w.free is not None} == {torch.float32}


def test_parameter_groups_hold_the_values(build):
    model = fixed(build, modules_to_save=["classifier"])
    subset_group, dense_group = parameter_groups(model, lr=1e-2, head_lr=1e-3)
    assert sum(p.numel() for p in subset_group["params"]) == model.constraint().budget
    assert sum(p.numel() for p in dense_group["params"]) == 3 * 16 + 3
    with pytest.raises(ValueError, match=r"2 tensors are trained densely .* head_lr"):
        parameter_groups(model, lr=1e-2)
    assert len(parameter_groups(fixed(build), lr=1e-2)) == 1


def test_the_callback_has_no_advice(build, tmp_path):
    """Weight decay, dropout and half precision are ordinary where only the subset is trained."""
    model = fixed(build)
    optimizer = torch.optim.AdamW(trainable(model), weight_decay=0.1)
    assert training_advice(model, model.constraint(), optimizer) == []
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Rows("bert"), callbacks=[DSTCallback()])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "dst/free_parameters" in entry]
    assert {entry["dst/free_parameters"] for entry in logged} == {float(model.constraint().budget)}
    assert {entry["dst/churn"] for entry in logged} == {0.0}


# What must not happen


def moved_outside(model, seed, positions):
    count = 0
    for key, value in weights(model.get_base_model()).items():
        outside = torch.ones(value.numel(), dtype=torch.bool)
        outside[positions[key]] = False
        count += int((value.flatten() != seed[key].flatten())[outside].sum())
    return count


def test_the_seed_is_out_of_every_optimizers_reach(build):
    """One that changes parameters without a gradient, and weights whose requires_grad was switched on by hand."""
    model = fixed(build)
    seed, positions = weights(build("bert")), subset(model)
    model.requires_grad_(True)
    optimizer = Outer(torch.optim.SGD(trainable(model), lr=0.1))
    for step in range(3):
        loss(model, "bert", step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert moved_outside(model, seed, positions) == 0
    assert len(optimizer.param_groups[0]["params"]) == len(trainable(model))


def test_a_frozen_adapter_loaded_beside_leaves_training_alone(build, tmp_path):
    fixed(build, selection="magnitude", modules_to_save=["classifier"]).save_pretrained(tmp_path)
    model = fixed(build, modules_to_save=["classifier"])
    optimizer = create_dst_optimizer(model, torch.optim.SGD, lr=0.1, head_lr=0.1)
    model.load_adapter(tmp_path, "reference")
    before = weights(model.get_base_model())
    loss(model, "bert").backward()
    optimizer.step()
    after = weights(model.get_base_model())
    assert sum(int((before[key] != after[key]).sum()) for key in before) > 0.5 * model.constraint().budget


def test_a_frozen_adapter_added_beside_leaves_training_alone(build):
    """One that is not loaded: nothing follows that would look at the subsets again."""
    model = fixed(build)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    loss(model, "bert").backward()
    gradients = [parameter.grad.clone() for parameter in trainable(model) if parameter.grad is not None]
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.add_adapter("reference", DSTConfig(epsilon=0.02, inference_mode=True))
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    kept = [parameter.grad for parameter in trainable(model) if parameter.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(gradients, kept, strict=True))
    optimizer.step()
    with model.disable_adapter():
        model.add_adapter("another", DSTConfig(epsilon=0.02, inference_mode=True))
    loss(model, "bert", 1).backward()
    optimizer.step()
    assert sum(int((w.values() != w.seeds).sum()) for w in model.constraint().weights) > 0.5 * model.constraint().budget


def test_a_copy_is_clipped_as_the_original(build):
    model = fixed(build, modules_to_save=["classifier"])
    loss(model, "bert").backward()
    norms = []
    for each in (copy.deepcopy(model), model):
        for parameter in each.parameters():
            parameter.grad = None
        loss(each, "bert", 1).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(each.parameters(), 1.0))
    assert torch.equal(*norms)


def test_gradients_from_before_are_not_gathered(build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02), "dynamic")
    model.add_adapter("static", DSTConfig(epsilon=0.02, selection="random"))
    loss(model, "bert", 5).backward()
    model.set_adapter("static")
    loss(model, "bert", 1).backward()
    dense = build("bert")
    loss(dense, "bert", 1).backward()
    for weight in model.constraint("static").weights:
        if weight.free is not None and dense.get_parameter(weight.name).grad is not None:
            assert torch.equal(weight.free.grad, dense.get_parameter(weight.name).grad.flatten()[weight.indices])


def test_two_optimizers_in_turn_keep_float32_values(build):
    model = get_peft_model(build("bert").bfloat16(), DSTConfig(epsilon=0.02, selection="random"))
    optimizers = [torch.optim.SGD(trainable(model), lr=1.0) for _ in range(2)]
    weight = next(w for w in model.constraint().weights if w.free is not None)
    start = weight.free.detach().clone()
    for i in range(8):
        weight.free.grad = torch.full_like(weight.free, -(2.0**-20))
        optimizers[i % 2].step()
    assert torch.equal(weight.free.detach(), start + 8 * 2.0**-20)


def test_an_outer_optimizer_that_moves_first(build):
    """What it did to the values before the inner step is not taken for a stale copy."""

    class First(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(0.5)
            self.inner.step()

    model = fixed(build)
    values = {w: w.free.detach().clone() for w in model.constraint().weights if w.free is not None}
    inner = torch.optim.SGD(trainable(model), lr=0.0)
    loss(model, "bert").backward()
    First(inner).step()
    for weight, before in values.items():
        assert torch.equal(weight.values(), 0.5 * before)


def test_a_checkpoint_loaded_over_a_subset_that_was_not_chosen(build, tmp_path):
    ones = {name: torch.ones_like(parameter) for name, parameter in build("bert").named_parameters()}
    one = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, selection="fisher"))
    fix_subset(one, ones)
    one.save_pretrained(tmp_path)
    two = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, selection="fisher"))
    two.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same(subset(two), subset(one))
    optimizer = torch.optim.SGD(trainable(two), lr=0.1)
    before = weights(two.get_base_model())
    loss(two, "bert").backward()
    optimizer.step()
    assert any(not torch.equal(before[key], value) for key, value in weights(two.get_base_model()).items())


def test_the_number_trained_is_told_also_after_loading(build, tmp_path):
    model = get_peft_model(build("bert"), DSTConfig(selection="transfer"))
    fix_subset(model, {"classifier.weight": torch.arange(40)})
    assert model.get_nb_trainable_parameters()[0] == 40
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("bert"), tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters()[0] == 40
