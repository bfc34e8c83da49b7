"""FSDP2: steps with closures, within backward passes, and those that do not come to their end."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint

from peft_dst.core import choice
from peft_dst.core.subset import Silo
from tests.distributed.sharded import STEPS, assert_agree, make, optimizer_of, step, subsets
from tests.models import batch


def blow_up(rank, world, kind, most):
    model = make(world, "bert", {"epsilon": 0.02})
    optimizer = optimizer_of(model, kind)
    step(rank, world, model, optimizer, "bert", 0)
    before = subsets(model)
    rows = {k: v[rank::world] for k, v in batch("bert", 1).items()}
    model(**rows).loss.backward()
    if rank == 1:
        model.base_model.model.bert.pooler.dense.weight.grad._local_tensor[0, 0] = math.nan
    written = []
    write = Silo.write

    def noted(silo, *args):
        written.append(silo)
        write(silo, *args)

    with (
        mock.patch.object(choice, "_MOST_PENDING", most),
        mock.patch.object(Silo, "write", noted),
        pytest.raises(FloatingPointError, match=r"bert.pooler.dense.weight.*NaN or infinite"),
    ):
        optimizer.step()
    after = subsets(model)
    assert all(torch.equal(before[n][0], after[n][0]) and torch.equal(before[n][1], after[n][1]) for n in before)
    return len(written)


@pytest.mark.parametrize("kind", ["hook", "AdamW"])
@pytest.mark.parametrize("most", [1 << 26, 100])
def test_a_nan_in_one_process_is_told_by_all(together, kind, most):
    """Also where silos before it were written already."""
    for written in together(2, blow_up, kind, most):
        assert (written > 0) == (most == 100)


class Sharpness(torch.optim.AdamW):
    """AdamW that evaluates its closure at a moved point, too, as optimizers that look for flat minima do."""

    @torch.no_grad()
    def step(self, closure):
        self.losses = [float(closure())]
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        moves = [0.02 * p.grad.sign() for p in parameters]
        torch._foreach_add_(parameters, moves)
        self.losses.append(float(closure()))
        torch._foreach_sub_(parameters, moves)
        return super().step()


def step_with_closures(rank, world, refers):
    """The first forward pass ever is within a step, as Lightning has it."""
    model = make(world, "llama", {"epsilon": 0.02})
    optimizer = Sharpness([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
    losses = []
    for number in range(STEPS):
        rows = {k: v[rank::world].contiguous() for k, v in batch("llama", number).items()}

        @torch.enable_grad()
        def closure(rows=rows):
            optimizer.zero_grad()
            if refers:
                with torch.no_grad():
                    model(**rows)
            loss = model(**rows).loss
            loss.backward()
            loss = loss.detach()
            if world > 1:
                dist.all_reduce(loss)
            return loss / world

        optimizer.step(closure)
        losses.append(optimizer.losses)
    found = subsets(model)
    with torch.no_grad():
        return found, losses, model(**batch("llama", 9)).logits


@pytest.mark.parametrize("refers", [False, True])
def test_a_closure_sees_what_the_optimizer_has_written(together, refers):
    ((alone, losses, logits),) = together(1, step_with_closures, refers)
    assert all(abs(second - first) > 0.01 for first, second in losses)
    for found, own, served in together(2, step_with_closures, refers):
        assert_agree(alone, found)
        torch.testing.assert_close(own, losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(served, logits, rtol=1e-4, atol=1e-5)


def step_within(rank, world):
    """An optimizer for each parameter, which steps in the backward pass as soon as the gradient is there."""
    model = make(world, "llama", {"epsilon": 0.02, "siloing": "parameter"})
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2, eps=1e-4) for p in model.parameters() if p.requires_grad}
    steps = []

    def at_once(parameter):
        steps.append(torch._C._current_graph_task_id())
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(at_once)
    for number in range(STEPS):
        rows = {k: v[rank::world].contiguous() for k, v in batch("llama", number).items()}
        model(**rows).loss.backward()
    assert len(steps) == STEPS * len(optimizers)
    assert -1 not in steps
    return subsets(model)


def test_steps_within_the_backward_pass(together):
    (alone,) = together(1, step_within)
    for found in together(2, step_within):
        assert_agree(alone, found)


class HalfWay(torch.optim.AdamW):
    """AdamW that can be made to stop half-way."""

    stops = False

    @torch.no_grad()
    def step(self, closure=None):
        if not self.stops:
            return super().step(closure)
        for parameter in self.param_groups[0]["params"][::2]:
            parameter.add_(1)
        raise MemoryError


def interrupt(rank, world):
    """An optimizer stops half-way, and somebody looks before the next step."""
    model = make(world, "bert", {"epsilon": 0.02})
    optimizer = HalfWay([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for number in range(2):
        step(rank, world, model, optimizer, "bert", number)
    before = subsets(model)
    rows = batch("bert", 0)
    with torch.no_grad():
        tuned = model(**rows).logits
    model.reshard()
    model(**{k: v[rank::world].contiguous() for k, v in batch("bert", 2).items()}).loss.backward()
    optimizer.stops = True
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.stops = False
    model.state_dict()
    after = subsets(model)
    with torch.no_grad():
        again = model(**rows).logits
    model.reshard()
    optimizer.zero_grad()
    step(rank, world, model, optimizer, "bert", 3)
    return before, after, tuned, again


def test_a_step_that_stops_half_way_changes_nothing(together):
    for before, after, tuned, again in together(2, interrupt):
        assert_agree(before, after, rtol=0, atol=0)
        assert torch.equal(tuned, again)
