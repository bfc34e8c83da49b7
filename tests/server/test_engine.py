"""The engine: many requests for many deltas at once, each with the answer that it would get alone."""

from __future__ import annotations

import copy
import random
import threading

import pytest
import torch
from torch import nn

from peft_dst.delta import DeltaError, SparseDelta
from peft_dst.server import engine as engine_module
from peft_dst.server.cohorts import Cohort, Continuation
from peft_dst.server.engine import Classify, Engine, Full, Generate
from peft_dst.serving import DeltaPool
from tests.models import BUILDERS, bert


SECONDS = 60


def noisy(base: nn.Module, seed: int) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, p in base.named_parameters():
        change = torch.randn(p.shape, generator=generator, dtype=p.dtype) * (
            torch.rand(p.shape, generator=generator) < 0.1
        )
        tuned[name] = p.detach() + change
    return SparseDelta.between({name: p.detach() for name, p in base.named_parameters()}, tuned)


def pooled(base: nn.Module, count: int = 3) -> DeltaPool:
    deltas = {f"task{i}": noisy(base, i) for i in range(count)}
    pool = DeltaPool(base)
    for name, delta in deltas.items():
        pool.add(name, delta)
    return pool


@pytest.fixture
def causal():
    """A tiny Llama with three deltas; in double precision, so that no rounding of a batch changes a token."""
    torch.manual_seed(0)
    return pooled(BUILDERS["llama"]().double().eval())


def expected(pool: DeltaPool, delta: str | None, prompt: list[int], limit: int) -> list[int]:
    member = Continuation(prompt, limit)
    with pool.use(delta) as model:
        cohort = Cohort(copy.deepcopy(model), [member])
    while cohort.members:
        cohort.step()
    return member.tokens


class Asked:
    """A request, and its end."""

    def __init__(self, make, *arguments, **options):
        self.ended = threading.Event()
        self.error = None
        self.ends = 0
        self.request = make(*arguments[:1], self._end, *arguments[1:], **options)

    def _end(self, error):
        self.error, self.ends = error, self.ends + 1
        self.ended.set()

    def wait(self):
        assert self.ended.wait(SECONDS)
        return self.error


class Always:
    """A planner that has made up its mind; None: it changes it all the time."""

    def __init__(self, mixes: bool | None):
        self.answer, self.turn = mixes, 0

    def mixes(self, sizes) -> bool:
        self.turn += 1
        return len(sizes) > 1 and (self.turn % 3 != 0 if self.answer is None else self.answer)

    def note(self, sizes, seconds) -> None:
        assert seconds > 0


@pytest.mark.parametrize("mixes", [True, False, None])
def test_many_at_once(causal, mixes, monkeypatch):
    """In waves from several threads, mixed, apart, and with that changing: no wrong answer, none lost, none told twice."""
    monkeypatch.setattr(engine_module, "Planner", lambda: Always(mixes))
    monkeypatch.setattr(engine_module, "STEPS", 3)
    rng = random.Random(0)
    cases = []
    for _ in range(40):
        prompt = [rng.randrange(3, 60) for _ in range(rng.randrange(1, 9))]
        cases.append((rng.choice([None, *causal.names()]), prompt, rng.randrange(1, 12)))
    want = [expected(causal, *case) for case in cases]
    assert len({tuple(tokens) for tokens in want}) > 20
    engine = Engine(causal, capacity=6)
    asked = [Asked(Generate, delta, continuation=Continuation(prompt, limit)) for delta, prompt, limit in cases]

    def send(part):
        for one in part:
            engine.submit(one.request)

    threads = [threading.Thread(target=send, args=(asked[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for one, tokens in zip(asked, want, strict=True):
        assert one.wait() is None
        assert one.request.continuation.tokens == tokens
    assert engine.stop(SECONDS)
    assert all(one.ends == 1 for one in asked)
    assert engine.running == engine.waiting == 0
    assert (engine.computed["mixed_batches"] > 0) == (mixes is not False)
    # They went together.
    assert engine.computed["rows"] > 1.5 * engine.computed["batches"]
    assert engine.computed["tokens"] == sum(map(len, want))


def test_nobody_waits_for_another_s_answer_to_end(causal):
    """A short answer of one delta comes while a long one of another is being made."""
    engine = Engine(causal)
    long = Asked(Generate, "task0", continuation=Continuation([5], 10_000))
    engine.submit(long.request)
    short = Asked(Generate, "task1", continuation=Continuation([6, 7], 3))
    beside = Asked(Generate, "task0", continuation=Continuation([8, 9], 3))
    for one in (short, beside):
        engine.submit(one.request)
        assert one.wait() is None
    assert not long.ended.is_set()
    assert short.request.continuation.tokens == expected(causal, "task1", [6, 7], 3)
    long.request.continuation.cancelled = True
    assert long.wait() is None
    assert long.request.continuation.finished == "cancelled"
    engine.stop(SECONDS)


def test_errors_are_told_to_whom_they_concern(causal):
    engine = Engine(causal)
    causal.add("broken", SparseDelta({"no.such": noisy(nn.Linear(20, 20).double(), 0)["weight"]}))
    broken = Asked(Generate, "broken", continuation=Continuation([5], 3))
    unknown = Asked(Generate, "unknown", continuation=Continuation([5], 3))
    good = Asked(Generate, "task0", continuation=Continuation([5], 3))
    for one in (broken, unknown, good):
        engine.submit(one.request)
    assert isinstance(broken.wait(), DeltaError)
    assert isinstance(unknown.wait(), KeyError)
    assert good.wait() is None
    engine.stop(SECONDS)


def test_a_delta_removed_under_way(causal):
    engine = Engine(causal)
    long = Asked(Generate, "task0", continuation=Continuation([5], 10_000))
    engine.submit(long.request)
    while not long.request.continuation.tokens:
        pass
    causal.remove("task0")
    assert isinstance(long.wait(), KeyError)
    other = Asked(Generate, "task1", continuation=Continuation([5], 2))
    engine.submit(other.request)
    assert other.wait() is None
    engine.stop(SECONDS)


def test_limits(causal):
    engine = Engine(causal, capacity=1, queue=2)
    first = Asked(Generate, None, continuation=Continuation([5], 10_000))
    engine.submit(first.request)
    while engine.waiting:
        pass
    more = [Asked(Generate, None, continuation=Continuation([6], 2)) for _ in range(3)]
    engine.submit(more[0].request)
    engine.submit(more[1].request)
    with pytest.raises(Full, match="2 requests are waiting already"):
        engine.submit(more[2].request)
    assert engine.running <= 1
    # Stopped in a hurry, everybody is told.
    assert not engine.stop(0.01)
    for one in (first, *more[:2]):
        assert isinstance(one.wait(), RuntimeError)
    with pytest.raises(RuntimeError, match="the engine was stopped"):
        engine.submit(more[2].request)


def test_nothing_is_computed_for_those_that_went_away_while_they_waited(causal):
    engine = Engine(causal, capacity=1)
    first = Asked(Generate, None, continuation=Continuation([5], 10_000))
    second = Asked(Generate, "task0", continuation=Continuation([6], 2))
    for one in (first, second):
        engine.submit(one.request)
    for one in (second, first):
        one.request.continuation.cancelled = True
    assert second.wait() is first.wait() is None
    assert engine.stop(SECONDS)
    assert (second.request.continuation.tokens, second.request.continuation.finished) == ([], "cancelled")
    assert causal.statistics.loads == 0


def test_classification():
    """Texts of different lengths and deltas; each as it would be alone."""
    torch.manual_seed(0)
    pool = pooled(bert().double().eval())
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


def test_a_delta_that_goes_takes_no_other_with_it(causal, monkeypatch):
    """Of a mixed batch only its own requests fail."""
    monkeypatch.setattr(engine_module, "Planner", lambda: Always(True))
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
    assert engine.mixes
    assert engine.stop(SECONDS)


@pytest.mark.parametrize("at", [1, 3])
def test_a_model_that_cannot_be_mixed(causal, at, monkeypatch):
    """Found out when reading, or in a later step: nobody notices but the log."""
    monkeypatch.setattr(engine_module, "Planner", lambda: Always(True))
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
    asked = [Asked(Generate, delta, continuation=Continuation(prompt, limit)) for delta, prompt, limit in cases]
    for one in asked:
        engine.submit(one.request)
    for one, tokens in zip(asked, want, strict=True):
        assert one.wait() is None
        assert one.request.continuation.tokens == tokens
    assert engine.stop(SECONDS)
    assert len(calls) >= at
    assert not engine.mixes
