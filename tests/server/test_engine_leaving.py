"""The engine when clients go away, and deltas."""

from __future__ import annotations

import copy
import threading

import pytest

from peft_dst.server.cohorts import Continuation
from peft_dst.server.engine import Engine, Full, Generate, plans, rounds
from tests.server.engines import SECONDS, Always, Asked, Gate, expected, generating, noisy, together
from tests.serving.helpers import until


def test_a_delta_removed_under_way(causal):
    engine = Engine(causal)
    long = generating("task0", [5], 10_000)
    engine.submit(long.request)
    until(lambda: long.request.continuation.tokens)
    causal.remove("task0")
    assert isinstance(long.wait(), KeyError)
    other = generating("task1", [5], 2)
    engine.submit(other.request)
    assert other.wait() is None
    engine.stop(SECONDS)


def test_a_delta_that_goes_takes_no_other_with_it(causal, monkeypatch):
    """Of a mixed batch only its own requests fail."""
    monkeypatch.setattr(plans, "Planner", lambda: Always(True))
    engine = Engine(causal)
    begun = threading.Event()
    members = {
        delta: Continuation([5, 6, 7], 60, on_token=lambda token: begun.set()) for delta in (None, "task0", "task1")
    }
    asked = {delta: Asked(Generate, delta, continuation=member) for delta, member in members.items()}
    for one in asked.values():
        engine.submit(one.request)
    assert begun.wait(SECONDS)
    causal.remove("task1")
    assert isinstance(asked["task1"].wait(), KeyError) or len(members["task1"].tokens) == 60
    for delta in (None, "task0"):
        assert asked[delta].wait() is None
        assert members[delta].tokens == expected(causal, delta, [5, 6, 7], 60)
    assert engine.stop(SECONDS)


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("where", ["between steps", "before a step"])
def test_a_delta_replaced_under_way(causal, where, mixes, monkeypatch):
    """No token of the new one comes into an answer of the old one; others go on."""
    monkeypatch.setattr(rounds, "STEPS", 1)
    other = noisy(copy.deepcopy(causal.model), 7)
    want = {delta: expected(causal, delta, [5, 6, 7], 9) for delta in ("task0", "task1")}
    members = {delta: Continuation([5, 6, 7], 9) for delta in ("task0", "task1")}
    swapped: list[int] = []

    def swap():
        if not swapped and len(members["task0"].tokens) == 3:
            swapped.append(len(members["task0"].tokens))
            causal.remove("task0")
            causal.add("task0", other)

    class Replacing(Always):
        def mixes(self, sizes):
            if where == "between steps":
                swap()
            return super().mixes(sizes)

    mix = causal.mix

    def mixing(names, copies=1):
        if where == "before a step":
            swap()
        return mix(names, copies)

    monkeypatch.setattr(causal, "mix", mixing)
    monkeypatch.setattr(plans, "Planner", lambda: Replacing(mixes))
    engine = Engine(causal)
    asked = {delta: Asked(Generate, delta, continuation=member) for delta, member in members.items()}
    together(engine, asked.values())
    error = asked["task0"].wait()
    assert isinstance(error, KeyError)
    assert "the delta 'task0' was removed" in error.args[0]
    assert asked["task1"].wait() is None
    assert swapped == [3]
    assert members["task0"].tokens == want["task0"][:3]
    assert members["task1"].tokens == want["task1"]
    # The new one is there for those who come now.
    after = generating("task0", [5, 6, 7], 9)
    engine.submit(after.request)
    assert after.wait() is None
    assert after.request.continuation.tokens == expected(causal, "task0", [5, 6, 7], 9)
    assert engine.stop(SECONDS)


def test_nothing_is_remembered_of_deltas_that_are_gone(causal):
    delta = noisy(causal.model, 9)
    engine = Engine(causal)
    for _ in range(20):
        causal.add("new", delta)
        asked = generating("new", [5, 6], 2)
        engine.submit(asked.request)
        assert asked.wait() is None
        causal.remove("new")
    assert engine.stop(SECONDS)
    assert len(engine._rounds._companies._shapes) <= 2 * (len(causal) + 1) + 2


def test_nothing_is_computed_for_those_that_went_away_while_they_waited(causal):
    engine = Engine(causal, capacity=1)
    first = generating(None, [5], 10_000)
    second = generating("task0", [6], 2)
    for one in (first, second):
        engine.submit(one.request)
    for one in (second, first):
        one.request.continuation.cancelled = True
    assert second.wait() is first.wait() is None
    assert engine.stop(SECONDS)
    assert (second.request.continuation.tokens, second.request.continuation.finished) == ([], "cancelled")
    assert causal.statistics.loads == 0


def test_those_that_went_away_leave_the_queue(causal):
    gate = Gate(causal.model)
    engine = Engine(causal, capacity=1, queue=2)
    first = generating(None, [5], 2)
    engine.submit(first.request)
    assert gate.reached.wait(SECONDS)
    waiting = [generating("task0", [6, 7], 2) for _ in range(2)]
    for one in waiting:
        engine.submit(one.request)
    third = generating("task1", [5, 6, 7], 2)
    with pytest.raises(Full, match="2 requests are waiting already"):
        engine.submit(third.request)
    for one in waiting:
        one.request.continuation.cancelled = True
    assert engine.waiting == 0
    engine.submit(third.request)
    assert engine.waiting == 1
    gate.open.set()
    for one in (first, *waiting, third):
        assert one.wait() is None
    assert engine.stop(SECONDS)
    assert {one.request.continuation.finished for one in waiting} == {"cancelled"}
    # Their prompts of two tokens were never read.
    assert [shape for shape in gate.shapes if shape[1] > 1] == [(1, 3)]


def test_nothing_is_computed_for_those_that_went_away_under_way(causal, monkeypatch):
    """Neither a further token, nor a prompt that was to be read after another delta's."""
    monkeypatch.setattr(plans, "Planner", lambda: Always(False))
    gate = Gate(causal.model)
    engine = Engine(causal)
    asked = [generating(f"task{i}", [5, 6], 9) for i in range(2)]
    together(engine, asked)
    assert gate.reached.wait(SECONDS)
    for one in asked:
        one.request.continuation.cancelled = True
    gate.open.set()
    for one in asked:
        assert one.wait() is None
    assert engine.stop(SECONDS)
    assert gate.shapes == [(1, 2)]
