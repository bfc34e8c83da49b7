"""threshold="iterative" (Alg. 2) in training: its state goes with the optimizer's, and failed steps leave it alone."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback

from peft_dst import DSTConfig, DSTOptimizer
from tests.models import assert_same, logits, loss, train, weights
from tests.training.test_trainer import Rows, arguments


def wrapped(build, name="bert", **options):
    return get_peft_model(build(name), DSTConfig(epsilon=0.02, threshold="iterative", **options))


def tracked(model):
    """(tracked threshold, free components, budget) of every silo."""
    return {silo.name: (silo.tracked, silo.free(), silo.budget) for silo in model.constraint().silos}


def test_the_first_step_is_exact_and_later_ones_are_near(build):
    model = wrapped(build, siloing="none")
    constraint = model.constraint()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    counts = []
    for step in range(30):
        loss(model, "bert", step % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        (silo,) = constraint.silos
        counts.append(silo.free())
        kept = torch.cat([(w.seeds * (w.values() - w.seeds)).abs() for w in silo.weights])
        assert kept.min() > silo.tracked or step == 0
    assert counts[0] == constraint.budget
    assert len(set(counts)) > 1
    assert abs(counts[-1] - constraint.budget) < 0.1 * constraint.budget


def test_more_bisections_come_nearer(build):
    def error(**options):
        model = wrapped(build, siloing="none", **options)
        total = 0
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for step in range(10):
            loss(model, "bert", step).backward()
            optimizer.step()
            optimizer.zero_grad()
            total += abs(model.constraint().silos[0].free() - model.constraint().budget)
        return total

    assert error(threshold_iterations=12) < error() < error(threshold_iterations=1)


@pytest.mark.parametrize("make", [torch.optim.AdamW, DSTOptimizer], ids=["hook", "silo_by_silo"])
def test_interrupted_and_resumed_equals_uninterrupted(make, build, tmp_path):
    def run(folder, resume=None, stop=None):
        counts = []

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                counts.append(model.constraint().silos[0].free())
                control.should_training_stop = state.global_step == stop

        torch.manual_seed(3)
        # Coarse, so that where a threshold started from shows.
        model = wrapped(build, siloing="none", threshold_iterations=1)
        args = arguments(folder, save_strategy="steps", save_steps=5, warmup_steps=3)
        trainer = Trainer(
            model,
            args,
            train_dataset=Rows("bert"),
            callbacks=[Stop()],
            optimizer_cls_and_kwargs=(make, {"lr": 3e-2, "weight_decay": 0.0}),
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, counts

    whole, counts = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=5)
    resumed, later = run(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-5"))
    assert tracked(resumed) == tracked(whole)
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert counts[5:] == later
    assert len(set(later)) > 1


@pytest.mark.parametrize("make", [torch.optim.SGD, lambda p, lr: DSTOptimizer(p, torch.optim.SGD, lr=lr)])
def test_a_failed_step_leaves_the_thresholds(make, build):
    model = wrapped(build)
    base = model.base_model.model
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        loss(model, "bert", step).backward()
        optimizer.step()
        optimizer.zero_grad()
    before, tuned = tracked(model), weights(base)
    loss(model, "bert", 2).backward()
    base.classifier.weight.grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert tracked(model) == before
    assert_same(weights(base), tuned)


def two_models(build):
    """Two of the same names, of which the first has been trained for a step, and their parameters."""
    models = [wrapped(build, siloing="none", threshold_iterations=1, churn_interval=2) for _ in range(2)]
    train(models[0], "bert", 1, lr=1e-2)
    return models, [[p for p in model.parameters() if p.requires_grad] for model in models]


def both_step(models, optimizer, step):
    for turn, model in enumerate(models):
        loss(model, "bert", 3 * step + turn).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("make", [torch.optim.AdamW, DSTOptimizer], ids=["hook", "silo_by_silo"])
def test_two_models_in_one_optimizer(make, build):
    """Each goes on from its own thresholds and steps, also when the optimizer's state was loaded."""
    together, parameters = two_models(build)
    optimizer = make([{"params": own} for own in parameters], lr=1e-2)
    alone, parameters = two_models(build)
    optimizers = [make(own, lr=1e-2) for own in parameters]
    for step in range(6):
        if step == 3:
            loaded = make([{"params": g["params"]} for g in optimizer.param_groups], lr=1e-2)
            loaded.load_state_dict(optimizer.state_dict())
            optimizer = loaded
            for model in together:
                model.constraint().steps = 0
                for silo in model.constraint().silos:
                    silo.tracked = None
        both_step(together, optimizer, step)
        for turn in range(2):
            loss(alone[turn], "bert", 3 * step + turn).backward()
            optimizers[turn].step()
            optimizers[turn].zero_grad()
            assert tracked(together[turn]) == tracked(alone[turn])
            assert_same(weights(together[turn].get_base_model()), weights(alone[turn].get_base_model()))
    assert [model.constraint().steps for model in together] == [7, 6]
    assert tracked(together[0]) != tracked(together[1])


def test_a_model_that_leaves_an_optimizer_takes_its_own_notes(build):
    models, parameters = two_models(build)
    optimizer = torch.optim.AdamW([{"params": own} for own in parameters], lr=1e-2)
    both_step(models, optimizer, 0)
    notes = [{key: group[key] for key in ("dst_thresholds", "dst_steps")} for group in optimizer.param_groups]
    assert [note["dst_steps"] for note in notes] == [{"default": 2}, {"default": 1}]
    models[1].delete_adapter("default")
    assert [note["dst_steps"] for note in notes] == [{"default": 2}, {}]
    assert [list(note["dst_thresholds"]) for note in notes] == [["default"], []]


@pytest.mark.parametrize("make", [torch.optim.AdamW, DSTOptimizer], ids=["hook", "silo_by_silo"])
def test_two_models_of_one_name_in_one_group_are_refused(make, build):
    models, (one, other) = two_models(build)
    optimizer = make([*one, *other], lr=1e-2)
    before = [weights(model.get_base_model()) for model in models]
    with pytest.raises(ValueError, match=r"two models with an adapter 'default'.*parameter group of its own"):
        both_step(models, optimizer, 0)
    for model, tensors in zip(models, before, strict=True):
        assert_same(weights(model.get_base_model()), tensors)
    assert not optimizer.state
    # Nothing is kept of what chooses exactly and at every step.
    exact = [get_peft_model(build("bert"), DSTConfig(epsilon=0.02)) for _ in range(2)]
    both_step(exact, make([p for m in exact for p in m.parameters() if p.requires_grad], lr=1e-2), 0)


def test_saved_with_more_than_the_budget_and_loaded(build, tmp_path):
    # After a pause (a learning rate of 0) the threshold has sunk, and the next step keeps too many.
    model = wrapped(build, siloing="none", threshold_range=8.0)
    train(model, "bert", 2, lr=1e-2)
    train(model, "bert", 3, lr=0.0)
    train(model, "bert", 1, lr=1e-2)
    assert model.constraint().silos[0].free() > model.constraint().budget
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert loaded.peft_config["default"].tracking == (3, 8.0)
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))
