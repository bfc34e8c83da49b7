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
