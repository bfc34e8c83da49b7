"""The engine: many requests for many deltas at once, each with the answer that it would get alone."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from peft_dst.server.cohorts import Cohort
from peft_dst.server.engine import Classify, Engine, Full, Stopped, desk, plans, rounds
from peft_dst.serving import DeltaPool
from tests.models import bert
from tests.server.engines import (
    SECONDS,
    Always,
    Asked,
    Gate,
    ask,
    check_answers,
    expected,
    generating,
    pooled,
    together,
)
from tests.server.test_classifier import MODELS
from tests.serving.helpers import until


@pytest.mark.parametrize("mixes", [True, False, None])
def test_many_at_once(causal, mixes, monkeypatch):
    """In waves from several threads, mixed, apart, and with that changing: no wrong answer, none lost, none told twice."""
    monkeypatch.setattr(plans, "Planner", lambda: Always(mixes))
    monkeypatch.setattr(rounds, "STEPS", 3)
    rng = random.Random(0)
    cases = []
    for _ in range(40):
        prompt = [rng.randrange(3, 60) for _ in range(rng.randrange(1, 9))]
        cases.append((rng.choice([None, *causal.names()]), prompt, rng.randrange(1, 12)))
    want = [expected(causal, *case) for case in cases]
    assert len({tuple(tokens) for tokens in want}) > 20
    engine = Engine(causal, capacity=6)
    asked = [generating(delta, prompt, limit) for delta, prompt, limit in cases]

    def send(part):
        for one in part:
            engine.submit(one.request)

    threads = [threading.Thread(target=send, args=(asked[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    check_answers(asked, want)
    assert engine.stop(SECONDS)
    assert all(one.ends == 1 for one in asked)
    assert engine.running == engine.waiting == 0
    assert (engine.computed["mixed_batches"] > 0) == (mixes is not False)
    # They went together.
    assert engine.computed["rows"] > 1.5 * engine.computed["batches"]
    assert engine.computed["tokens"] == sum(map(len, want))


def test_a_long_text_makes_no_batch_of_long_ones(causal, monkeypatch):
    """Short ones would be padded to its length."""
    monkeypatch.setattr(plans, "TOKENS", 24)
    monkeypatch.setattr(plans, "Planner", lambda: Always(True))
    prompts = [[3 + i % 7 for i in range(size)] for size in (2, 30, 3, 9, 1, 12, 12, 2)]
    deltas = [None, *causal.names(), None, *causal.names()]
    want = [expected(causal, delta, prompt, 3) for delta, prompt in zip(deltas, prompts, strict=True)]
    read = []

    class Watched(Cohort):
        def __init__(self, model, members):
            read.append((len(members), max(len(member.prompt) for member in members)))
            super().__init__(model, members)

    monkeypatch.setattr(rounds, "Cohort", Watched)
    engine = Engine(causal)
    shapes = []
    causal.model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    asked = [generating(delta, prompt, 3) for delta, prompt in zip(deltas, prompts, strict=True)]
    together(engine, asked)
    check_answers(asked, want)
    assert engine.stop(SECONDS)
    assert read == [(4, 3), (2, 12), (1, 12), (1, 30)]
    # They are continued together.
    assert shapes[-1] == (8, 1)


def test_short_texts_are_not_continued_beside_long_ones(causal, monkeypatch):
    """Whose keys and values would be as long, and as much to go through for each token. They grow out of their batch."""
    monkeypatch.setattr(rounds, "SHORT", 8)
    monkeypatch.setattr(rounds, "STEPS", 1)
    monkeypatch.setattr(plans, "Planner", lambda: Always(True))
    prompts = [[3 + i % 7 for i in range(size)] for size in (2, 5, 20, 29, 3)]
    deltas = [None, "task0", "task1", None, "task2"]
    want = [expected(causal, delta, prompt, 6) for delta, prompt in zip(deltas, prompts, strict=True)]
    batches, step = [], Cohort.step

    def watched(cohort):
        batches.append(sorted(len(member.prompt) + len(member.tokens) for member in cohort.members))
        step(cohort)

    monkeypatch.setattr(Cohort, "step", watched)
    engine = Engine(causal)
    asked = [generating(delta, prompt, 6) for delta, prompt in zip(deltas, prompts, strict=True)]
    together(engine, asked)
    check_answers(asked, want)
    assert engine.stop(SECONDS)
    assert batches[:4] == [[3, 4, 6], [21, 30], [4, 5, 7], [22, 31]]
    # Then one becomes too long for the first batch, and one for the second.
    assert sorted(batches[4:8]) == [[5, 6], [8], [23], [32]]


def test_no_more_deltas_go_together_than_there_is_room_for(causal, monkeypatch):
    """Once it is known what they take. Others are computed one after the other."""
    monkeypatch.setattr(plans, "Planner", lambda: Always(True))
    names = causal.names()
    with causal.mix(names):
        sizes = [causal.mixed_nbytes(name) for name in names]
    model, deltas = causal.model, {name: causal._shelf._known[name].source for name in names}
    causal.close()
    with DeltaPool(model, budget=sizes[0] + sizes[1]) as pool:
        for name, delta in deltas.items():
            pool.add(name, delta)
        together_with, mix = [], pool.mix
        monkeypatch.setattr(
            pool,
            "mix",
            lambda names, copies=1: (together_with.append(sorted({*names}, key=str)), mix(names, copies))[1],
        )
        engine = Engine(pool)
        for _ in range(2):
            together_with.clear()
            check_answers(*ask(engine, *names, None))
        assert engine.stop(SECONDS)
        # The base takes nothing.
        assert together_with[:2] == [[None, "task0", "task1"], ["task2"]]
        assert pool.statistics.nbytes <= 2 * pool.budget


def test_many_new_prompts_do_not_hold_up_those_that_are_continued(causal, monkeypatch):
    """They are read some at a time, and everybody's next token is made in between."""
    monkeypatch.setattr(desk, "READ", 24)
    prompts = [[3 + i % 7 for i in range(size)] for size in (10, 10, 10, 30, 10, 2)]
    want = [expected(causal, None, prompt, 3) for prompt in prompts]
    gate = Gate(causal.model)
    engine = Engine(causal)
    first = generating(None, [5], 12)
    engine.submit(first.request)
    assert gate.reached.wait(SECONDS)
    asked = [generating(None, prompt, 3) for prompt in prompts]
    together(engine, asked)
    gate.open.set()
    check_answers(asked, want)
    assert first.wait() is None
    assert engine.stop(SECONDS)
    # One that is longer than that is read by itself.
    assert [shape for shape in gate.shapes if shape[1] > 1] == [(2, 10), (1, 10), (1, 30), (2, 10)]
    kinds = "".join("s" if width == 1 else "r" for _, width in gate.shapes)
    assert kinds.lstrip("s").startswith("rsrsrsrs"), kinds


def test_nobody_waits_for_another_s_answer_to_end(causal):
    """A short answer of one delta comes while a long one of another is being made."""
    engine = Engine(causal)
    long = generating("task0", [5], 10_000)
    engine.submit(long.request)
    short = generating("task1", [6, 7], 3)
    beside = generating("task0", [8, 9], 3)
    for one in (short, beside):
        engine.submit(one.request)
        assert one.wait() is None
    assert not long.ended.is_set()
    assert short.request.continuation.tokens == expected(causal, "task1", [6, 7], 3)
    long.request.continuation.cancelled = True
    assert long.wait() is None
    assert long.request.continuation.finished == "cancelled"
    engine.stop(SECONDS)


def test_limits(causal):
    engine = Engine(causal, capacity=1, queue=2)
    first = generating(None, [5], 10_000)
    engine.submit(first.request)
    until(lambda: not engine.waiting)
    more = [generating(None, [6], 2) for _ in range(3)]
    engine.submit(more[0].request)
    engine.submit(more[1].request)
    with pytest.raises(Full, match="2 requests are waiting already"):
        engine.submit(more[2].request)
    assert engine.running <= 1
    # Stopped in a hurry, everybody is told.
    assert not engine.stop(0.01)
    for one in (first, *more[:2]):
        assert isinstance(one.wait(), Stopped)
        assert one.ends == 1
    with pytest.raises(Stopped, match="the engine was stopped"):
        engine.submit(more[2].request)
    # Whoever asks again how it ended is told the same.
    assert not engine.stop(SECONDS)
    assert not engine.alive


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_classification(kind):
    """Texts of different lengths and deltas; each as it would be alone, also where a decoder knows no padding."""
    torch.manual_seed(0)
    pool = pooled((bert() if kind == "bert" else MODELS[kind]()).double().eval())
    engine = Engine(pool)
    rng = random.Random(0)
    cases = []
    for _ in range(20):
        cases.append((rng.choice([None, *pool.names()]), [rng.randrange(3, 60) for _ in range(rng.randrange(1, 9))]))
    asked = [Asked(Classify, delta, tokens=tokens) for delta, tokens in cases]
    for one in asked:
        engine.submit(one.request)
    for one in asked:
        assert one.wait() is None
    engine.stop(SECONDS)
    for (delta, tokens), one in zip(cases, asked, strict=True):
        with pool.use(delta) as model, torch.no_grad():
            want = model(input_ids=torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(one.request.logits, want)


def test_texts_that_come_together_wait_as_one():
    torch.manual_seed(0)
    pool = pooled(bert().double().eval())
    gate = Gate(pool.model)
    engine = Engine(pool, capacity=4, queue=2)
    many = [Asked(Classify, "task0", tokens=[5, 6, 7]) for _ in range(20)]
    engine.submit(*(one.request for one in many))
    assert gate.reached.wait(SECONDS)
    assert engine.waiting == 1
    more = Asked(Classify, None, tokens=[5])
    engine.submit(more.request)
    with pytest.raises(Full):
        engine.submit(Asked(Classify, None, tokens=[5]).request)
    gate.open.set()
    for one in (*many, more):
        assert one.wait() is None
    assert engine.stop(SECONDS)
    assert max(rows for rows, _ in gate.shapes) <= 4


def test_a_text_under_way_is_told_of_a_stop_too():
    torch.manual_seed(0)
    pool = pooled(bert().double().eval())
    gate = Gate(pool.model)
    engine = Engine(pool)
    one = Asked(Classify, None, tokens=[5, 6, 7])
    engine.submit(one.request)
    assert gate.reached.wait(SECONDS)
    assert not engine.stop(0)
    assert isinstance(one.wait(), Stopped)
    gate.open.set()
    assert not engine.stop(SECONDS)
    assert one.ends == 1
