"""The engine when something goes wrong: errors of one are not those of others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft_dst.delta import DeltaError, SparseDelta
from peft_dst.server.cohorts import Cohort, Continuation
from peft_dst.server.engine import Classify, Engine, Generate, Stopped, companies, plans, rounds
from peft_dst.server.sampling import Sampling
from tests.models import bert
from tests.server.engines import (
    SECONDS,
    Always,
    Asked,
    Gate,
    ask,
    check_answers,
    expected,
    failing,
    generating,
    mixed_now,
    noisy,
    pooled,
    together,
)


def test_errors_are_told_to_whom_they_concern(causal):
    engine = Engine(causal)
    causal.add("broken", SparseDelta({"no.such": noisy(nn.Linear(20, 20).double(), 0)["weight"]}))
    broken = generating("broken", [5], 3)
    unknown = generating("unknown", [5], 3)
    good = generating("task0", [5], 3)
    for one in (broken, unknown, good):
        engine.submit(one.request)
    assert isinstance(broken.wait(), DeltaError)
    assert isinstance(unknown.wait(), KeyError)
    assert good.wait() is None
    engine.stop(SECONDS)


@pytest.mark.parametrize("at", [1, 3])
def test_a_model_that_cannot_be_mixed(causal, at, monkeypatch):
    """Found out when reading, or in a later step: nobody notices but the log, and it is not tried for ever."""
    monkeypatch.setattr(plans, "Planner", lambda: Always(True))
    calls = []

    def refuses(module, args, kwargs):
        if causal.shown is None and any("forward" in vars(m) or m._forward_hooks for m in causal.model.modules()):
            calls.append(0)
            if len(calls) >= at:
                raise NotImplementedError("it has its samples elsewhere")

    causal.model.model.register_forward_pre_hook(refuses, with_kwargs=True)
    cases = [(delta, [5, 6, number + 7], 9) for number, delta in enumerate(["task0", "task1", None, "task2"])]
    want = [expected(causal, *case) for case in cases]
    engine = Engine(causal)
    asked = [generating(delta, prompt, limit) for delta, prompt, limit in cases]
    together(engine, asked)
    check_answers(asked, want)
    tried = len(calls)
    assert tried >= at
    again = [generating(delta, prompt, limit) for delta, prompt, limit in cases]
    together(engine, again)
    check_answers(again, want)
    assert engine.stop(SECONDS)
    assert len(calls) == tried


@pytest.mark.parametrize("sampling", [Sampling(1e-320), Sampling(1e-320, 0.5, 7)])
def test_next_to_no_temperature(mixing, sampling):
    members = {None: Continuation([5, 6, 7], 8), "task0": Continuation([5, 6, 7], 8, sampling)}
    asked = [Asked(Generate, delta, continuation=member) for delta, member in members.items()]
    together(mixing, asked)
    for one in asked:
        assert one.wait() is None
    for delta, member in members.items():
        assert member.tokens == expected(mixing.pool, delta, [5, 6, 7], 8)
    assert mixed_now(mixing, None, "task0")


def test_a_delta_that_gives_no_numbers(mixing):
    base = {name: p.detach() for name, p in mixing.pool.model.named_parameters()}
    tuned = {name: p.clone() for name, p in base.items()}
    tuned["model.layers.0.mlp.down_proj.weight"][:, :9] = 1e300
    tuned["model.layers.1.self_attn.v_proj.weight"][3, 4] = 1e300
    tuned["model.norm.weight"][2] = 1e300
    mixing.pool.add("spoilt", SparseDelta.between(base, tuned))
    asked = [generating(delta, [5, 6, 7], 8) for delta in ("task0", "spoilt", None)]
    together(mixing, asked)
    assert isinstance(asked[1].wait(), ArithmeticError)
    for one in (asked[0], asked[2]):
        assert one.wait() is None
        assert one.request.continuation.tokens == expected(mixing.pool, one.request.delta, [5, 6, 7], 8)
    assert mixed_now(mixing, None, "task0")


@pytest.mark.parametrize("alone", [True, False])
def test_a_delta_that_cannot_be_mixed_does_not_keep_others_from_it(mixing, alone, caplog):
    failing(mixing.pool, "task1", alone=alone)
    asked = [generating(delta, [5, 6, 7], 8) for delta in ("task0", "task1", "task2", None)]
    together(mixing, asked)
    for one in asked:
        error = one.wait()
        if alone and one.request.delta == "task1":
            assert isinstance(error, RuntimeError)
        else:
            assert error is None
            assert one.request.continuation.tokens == expected(mixing.pool, one.request.delta, [5, 6, 7], 8)
    apart = {record.args[0] for record in caplog.records}
    # Of two that do not go together nobody knows whose fault it is.
    assert apart == ({"task1"} if alone else {"task0", "task1"})
    message = "is computed alone for 60 seconds, after RuntimeError: the shapes do not fit"
    assert caplog.records[0].getMessage().endswith(message)
    assert mixed_now(mixing, "task2", None)
    # It is not tried again, and others do not have to be read twice for it.
    caplog.clear()
    batches = mixing.computed["batches"]
    asked = [generating(delta, [5, 6, 7], 2) for delta in ("task2", "task1", None)]
    together(mixing, asked)
    for one in asked:
        one.wait()
    assert mixing.computed["batches"] - batches == (2 if alone else 4)
    assert not caplog.records


def test_a_delta_that_failed_once_is_tried_with_others_again(mixing, monkeypatch, caplog):
    """Too many open files, say, are no property of a delta. Should it fail again, it is left alone for twice as long."""
    now = [1e6]
    monkeypatch.setattr(companies, "time", SimpleNamespace(monotonic=lambda: now[0]))
    mix = mixing.pool.mix
    failing(mixing.pool, "task1", alone=False)
    for after in (0, 59, 2, 119):
        now[0] += after
        assert mixed_now(mixing, "task1", None) is False
    assert [record.args[:2] for record in caplog.records] == [("task1", 60), ("task1", 120)]
    monkeypatch.setattr(mixing.pool, "mix", mix)
    now[0] += 2
    assert mixed_now(mixing, "task1", None) is True
    assert len(caplog.records) == 2


def test_an_error_of_a_large_batch_is_nobody_s(mixing, caplog):
    """As when memory runs out: halves go together, and later the whole again."""
    mix, failed = mixing.pool.mix, []

    def full(names, copies=1):
        if len(names) > 2 and not failed:
            failed.append(names)
            raise RuntimeError("out of memory")
        return mix(names, copies)

    mixing.pool.mix = full
    assert mixed_now(mixing, "task0", "task1", "task2", None)
    assert failed
    assert mixed_now(mixing, "task0", "task1", "task2", None)
    assert not caplog.records


@pytest.mark.parametrize("at", ["reading", "a step"])
@pytest.mark.parametrize("delta", [None, "task0"])
def test_a_batch_of_one_delta_that_is_too_large_is_computed_in_halves(causal, delta, at):
    shapes = []

    def full(module, args, kwargs):
        rows, width = kwargs["input_ids"].shape
        shapes.append((rows, width))
        if rows > 2 and (width > 1 or at == "a step"):
            raise RuntimeError("out of memory")

    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16, 17]]
    want = [expected(causal, delta, prompt, 6) for prompt in prompts]
    causal.model.register_forward_pre_hook(full, with_kwargs=True)
    engine = Engine(causal)
    asked = [generating(delta, prompt, 6) for prompt in prompts]
    together(engine, asked)
    check_answers(asked, want)
    assert engine.stop(SECONDS)
    assert max(rows for rows, _ in shapes) == 5


def test_of_a_batch_of_one_delta_only_the_request_that_fails_ends(causal):
    def refuses(module, args, kwargs):
        if (kwargs["input_ids"] == 9).any():
            raise RuntimeError("token 9 is none")

    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    want = [expected(causal, "task0", prompt, 1) for prompt in prompts]
    causal.model.register_forward_pre_hook(refuses, with_kwargs=True)
    engine = Engine(causal)
    asked = [generating("task0", prompt, 1) for prompt in prompts]
    together(engine, asked)
    for one, prompt, tokens in zip(asked, prompts, want, strict=True):
        assert isinstance(one.wait(), RuntimeError) == (9 in prompt)
        assert one.request.continuation.tokens == ([] if 9 in prompt else tokens)
    assert engine.stop(SECONDS)


def test_a_delta_that_cannot_be_read_is_tried_once_for_all_of_its_requests(causal, monkeypatch):
    causal.add("broken", SparseDelta({"no.such": noisy(nn.Linear(20, 20).double(), 0)["weight"]}))
    tried, ready = [], causal._shelf.ready
    monkeypatch.setattr(causal._shelf, "ready", lambda name, held=None: (tried.append(name), ready(name, held))[1])
    engine = Engine(causal)
    asked = [generating("broken", [5, 6], 3) for _ in range(4)]
    engine.submit(*(one.request for one in asked))
    for one in asked:
        assert isinstance(one.wait(), DeltaError)
    assert engine.stop(SECONDS)
    assert tried == ["broken"]


def test_heads_of_different_sizes(monkeypatch, caplog):
    """Each goes with those of its own size, once it is known."""
    monkeypatch.setattr(plans, "Planner", lambda: Always(True))
    torch.manual_seed(0)
    base = bert().double().eval()
    pool = pooled(base, 2)
    for name, size in (("five", 5), ("other five", 5), ("one", 1)):
        head = {"weight": torch.randn(size, 16).double(), "bias": torch.randn(size).double()}
        dense = {f"base_model.model.classifier.{of}": tensor for of, tensor in head.items()}
        pool.add(name, SparseDelta({}, dense=dense))
    names = [None, "task0", "five", "task1", "one", "other five"]
    want = {}
    for name in names:
        with pool.use(name) as model, torch.no_grad():
            want[name] = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0]
    assert [len(want[name]) for name in names] == [3, 3, 5, 3, 1, 5]
    engine = Engine(pool)
    for _ in range(3):
        before = dict(engine.computed)
        asked = [Asked(Classify, name, tokens=[5, 6, 7]) for name in names]
        together(engine, asked)
        for one in asked:
            assert one.wait() is None
            torch.testing.assert_close(one.request.logits, want[one.request.delta])
    assert engine.stop(SECONDS)
    # Threes, fives, and the one.
    assert engine.computed["batches"] - before["batches"] == 3
    assert engine.computed["mixed_batches"] - before["mixed_batches"] == 2
    assert not caplog.records


def test_whoever_cannot_be_told_hurts_nobody(causal, caplog):
    engine = Engine(causal)

    def gone(error):
        raise RuntimeError("Event loop is closed")

    engine.submit(Generate(None, gone, Continuation([5], 2)))
    engine.submit(Generate(None, gone, Continuation([5], 2, on_token=gone)))
    good = generating(None, [5], 3)
    engine.submit(good.request)
    assert good.wait() is None
    assert engine.alive
    assert engine.stop(SECONDS)
    assert [record.getMessage() for record in caplog.records] == ["the end of a request could not be told"] * 2


@pytest.mark.parametrize("mixes", [True, False])
def test_batches_that_cannot_be_put_together_or_parted_go_on(causal, mixes, monkeypatch, caplog):
    """As when memory runs out; later it is tried again."""
    failed = []

    class Changing(Always):
        def mixes(self, sizes):
            # The other way is the better one after some tokens.
            self.answer = mixes if self.turn > 3 else not mixes
            return super().mixes(sizes)

    planner = Changing(None)
    monkeypatch.setattr(plans, "Planner", lambda: planner)
    monkeypatch.setattr(rounds, "STEPS", 1)
    name = "join" if mixes else "divide"
    real = getattr(Cohort, name)

    def fails(cohort, argument):
        # Nothing is to be parted where everybody has the same key.
        if len(failed) < 2 and (mixes or len(set(argument)) > 1):
            failed.append(cohort)
            raise RuntimeError("out of memory")
        return real(cohort, argument)

    monkeypatch.setattr(Cohort, name, fails)
    engine = Engine(causal)
    check_answers(*ask(engine, None, "task0", "task1", limit=12))
    assert len(failed) == 2
    # Nobody is to blame.
    assert not [record for record in caplog.records if "computed alone" in record.getMessage()]
    assert mixed_now(engine, "task0", "task1") == mixes
    assert engine.stop(SECONDS)
    assert "a round failed" not in caplog.text


def test_one_that_cannot_leave_its_batch_ends_no_other(causal, monkeypatch, caplog):
    """The keys and values of those that stay are copied for that, for which there may be no memory."""
    failed, leave = [], Cohort.leave

    def fails(cohort):
        if not failed and any(member.finished == "cancelled" for member in cohort.members):
            failed.append(cohort)
            cohort.members = [member for member in cohort.members if member.finished is None]
            cohort.mask = cohort.mask[:0]
            raise RuntimeError("out of memory")
        leave(cohort)

    monkeypatch.setattr(Cohort, "leave", fails)
    engine = Engine(causal)
    (goes, *others), (_, *want) = ask(engine, None, None, "task0", limit=40)
    goes.request.continuation.on_token = lambda token: setattr(goes.request.continuation, "cancelled", True)
    check_answers(others, want)
    assert goes.wait() is None
    assert failed
    assert engine.stop(SECONDS)
    assert "a round failed" not in caplog.text


def test_an_error_where_none_is_expected(causal, monkeypatch, caplog):
    """Those in computation are told; others come after them."""
    engine = Engine(causal)
    monkeypatch.setattr(engine._rounds, "_arrange", lambda new: 1 / 0)
    bad = generating(None, [5], 9)
    engine.submit(bad.request)
    assert isinstance(bad.wait(), ZeroDivisionError)
    monkeypatch.undo()
    assert engine.running == 0
    good = generating(None, [5], 3)
    engine.submit(good.request)
    assert good.wait() is None
    assert engine.stop(SECONDS)
    assert "a round failed" in caplog.text


def test_should_the_thread_die_everybody_is_told(causal, caplog):
    class End(BaseException):
        pass

    gate = Gate(causal.model)

    def end(module, args):
        raise End

    engine = Engine(causal, capacity=1)
    asked = [generating(None, [5], 9) for _ in range(3)]
    for one in asked:
        engine.submit(one.request)
    assert gate.reached.wait(SECONDS)
    assert engine.alive
    causal.model.model.register_forward_pre_hook(end)
    gate.open.set()
    for one in asked:
        assert isinstance(one.wait(), Stopped)
    engine._thread.join(SECONDS)
    assert not engine.alive
    with pytest.raises(Stopped):
        engine.submit(generating(None, [5], 9).request)
    assert not engine.stop(SECONDS)
    assert "the engine broke down" in caplog.text
