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
from peft_dst.server.engine import Classify, Engine, Full, Generate, Stopped
from peft_dst.server.sampling import Sampling
from peft_dst.serving import DeltaPool
from tests.models import BUILDERS, bert
from tests.server.test_classifier import MODELS


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


def together(engine, asked):
    """Submit these so that they are taken in one round."""
    with engine._changed:
        for one in asked:
            engine.submit(one.request)


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
        assert isinstance(one.wait(), Stopped)
        assert one.ends == 1
    with pytest.raises(Stopped, match="the engine was stopped"):
        engine.submit(more[2].request)
    # Whoever asks again how it ended is told the same.
    assert not engine.stop(SECONDS)
    assert not engine.alive


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
    assert engine.stop(SECONDS)


@pytest.mark.parametrize("at", [1, 3])
def test_a_model_that_cannot_be_mixed(causal, at, monkeypatch):
    """Found out when reading, or in a later step: nobody notices but the log, and it is not tried for ever."""
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
    together(engine, asked)
    for one, tokens in zip(asked, want, strict=True):
        assert one.wait() is None
        assert one.request.continuation.tokens == tokens
    tried = len(calls)
    assert tried >= at
    again = [Asked(Generate, delta, continuation=Continuation(prompt, limit)) for delta, prompt, limit in cases]
    together(engine, again)
    for one, tokens in zip(again, want, strict=True):
        assert one.wait() is None
        assert one.request.continuation.tokens == tokens
    assert engine.stop(SECONDS)
    assert len(calls) == tried


# Errors of one that are not those of others


def ask(engine, *deltas, limit=8, **options):
    """Continuations of one text with several deltas, from one round on, and what they should be."""
    asked = [Asked(Generate, delta, continuation=Continuation([5, 6, 7], limit, **options)) for delta in deltas]
    want = [expected(engine.pool, delta, [5, 6, 7], limit) for delta in deltas]
    together(engine, asked)
    return list(zip(asked, want, strict=True))


def mixed_now(engine, *deltas) -> bool:
    """Whether these go together, with right answers."""
    before = engine.computed["mixed_batches"]
    for one, want in ask(engine, *deltas):
        assert one.wait() is None
        assert one.request.continuation.tokens == want
    return engine.computed["mixed_batches"] > before


@pytest.fixture
def mixing(causal, monkeypatch):
    """An engine that always mixes what can be."""
    monkeypatch.setattr(engine_module, "Planner", lambda: Always(True))
    engine = Engine(causal)
    yield engine
    engine.stop(SECONDS)


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
    asked = [Asked(Generate, delta, continuation=Continuation([5, 6, 7], 8)) for delta in ("task0", "spoilt", None)]
    together(mixing, asked)
    assert isinstance(asked[1].wait(), ArithmeticError)
    for one in (asked[0], asked[2]):
        assert one.wait() is None
        assert one.request.continuation.tokens == expected(mixing.pool, one.request.delta, [5, 6, 7], 8)
    assert mixed_now(mixing, None, "task0")


def failing(pool, name, alone):
    """Have the forward pass fail for a delta: also when it is alone, or only beside others."""
    mix = pool.mix

    def watched(names, copies=1):
        if name in names and (alone or len(set(names)) > 1):
            raise RuntimeError("the shapes do not fit")
        return mix(names, copies)

    pool.mix = watched


@pytest.mark.parametrize("alone", [True, False])
def test_a_delta_that_cannot_be_mixed_does_not_keep_others_from_it(mixing, alone, caplog):
    failing(mixing.pool, "task1", alone=alone)
    asked = [
        Asked(Generate, delta, continuation=Continuation([5, 6, 7], 8)) for delta in ("task0", "task1", "task2", None)
    ]
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
    assert caplog.records[0].getMessage().endswith("is computed alone now, after RuntimeError: the shapes do not fit")
    assert mixed_now(mixing, "task2", None)
    # It is not tried again, and others do not have to be read twice for it.
    caplog.clear()
    batches = mixing.computed["batches"]
    asked = [Asked(Generate, delta, continuation=Continuation([5, 6, 7], 2)) for delta in ("task2", "task1", None)]
    together(mixing, asked)
    for one in asked:
        one.wait()
    assert mixing.computed["batches"] - batches == (2 if alone else 4)
    assert not caplog.records


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


def test_heads_of_different_sizes(monkeypatch, caplog):
    """Each goes with those of its own size, once it is known."""
    monkeypatch.setattr(engine_module, "Planner", lambda: Always(True))
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


# Those that went away, and those that are many


class Gate:
    """A model that waits before each pass until it may go on."""

    def __init__(self, model):
        self.reached, self.open = threading.Event(), threading.Event()
        self.shapes = []
        model.register_forward_pre_hook(self._wait, with_kwargs=True)

    def _wait(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))
        self.reached.set()
        assert self.open.wait(SECONDS)


def test_those_that_went_away_leave_the_queue(causal):
    gate = Gate(causal.model)
    engine = Engine(causal, capacity=1, queue=2)
    first = Asked(Generate, None, continuation=Continuation([5], 2))
    engine.submit(first.request)
    assert gate.reached.wait(SECONDS)
    waiting = [Asked(Generate, "task0", continuation=Continuation([6, 7], 2)) for _ in range(2)]
    for one in waiting:
        engine.submit(one.request)
    third = Asked(Generate, "task1", continuation=Continuation([5, 6, 7], 2))
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
    monkeypatch.setattr(engine_module, "Planner", lambda: Always(False))
    gate = Gate(causal.model)
    engine = Engine(causal)
    asked = [Asked(Generate, f"task{i}", continuation=Continuation([5, 6], 9)) for i in range(2)]
    together(engine, asked)
    assert gate.reached.wait(SECONDS)
    for one in asked:
        one.request.continuation.cancelled = True
    gate.open.set()
    for one in asked:
        assert one.wait() is None
    assert engine.stop(SECONDS)
    assert gate.shapes == [(1, 2)]


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


# The thread


def test_whoever_cannot_be_told_hurts_nobody(causal, caplog):
    engine = Engine(causal)

    def gone(error):
        raise RuntimeError("Event loop is closed")

    engine.submit(Generate(None, gone, Continuation([5], 2)))
    engine.submit(Generate(None, gone, Continuation([5], 2, on_token=gone)))
    good = Asked(Generate, None, continuation=Continuation([5], 3))
    engine.submit(good.request)
    assert good.wait() is None
    assert engine.alive
    assert engine.stop(SECONDS)
    assert [record.getMessage() for record in caplog.records] == ["the end of a request could not be told"] * 2


def test_an_error_where_none_is_expected(causal, monkeypatch, caplog):
    """Those in computation are told; others come after them."""
    engine = Engine(causal)
    monkeypatch.setattr(engine, "_arrange", lambda new: 1 / 0)
    bad = Asked(Generate, None, continuation=Continuation([5], 9))
    engine.submit(bad.request)
    assert isinstance(bad.wait(), ZeroDivisionError)
    monkeypatch.undo()
    assert engine.running == 0
    good = Asked(Generate, None, continuation=Continuation([5], 3))
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
    asked = [Asked(Generate, None, continuation=Continuation([5], 9)) for _ in range(3)]
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
        engine.submit(Asked(Generate, None, continuation=Continuation([5], 9)).request)
    assert not engine.stop(SECONDS)
    assert "the engine broke down" in caplog.text


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


# Another delta of the same name


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("where", ["between steps", "before a step"])
def test_a_delta_replaced_under_way(causal, where, mixes, monkeypatch):
    """No token of the new one comes into an answer of the old one; others go on."""
    monkeypatch.setattr(engine_module, "STEPS", 1)
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
    monkeypatch.setattr(engine_module, "Planner", lambda: Replacing(mixes))
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
    after = Asked(Generate, "task0", continuation=Continuation([5, 6, 7], 9))
    engine.submit(after.request)
    assert after.wait() is None
    assert after.request.continuation.tokens == expected(causal, "task0", [5, 6, 7], 9)
    assert engine.stop(SECONDS)


def test_nothing_is_remembered_of_deltas_that_are_gone(causal):
    delta = noisy(causal.model, 9)
    engine = Engine(causal)
    for _ in range(20):
        causal.add("new", delta)
        asked = Asked(Generate, "new", Continuation([5, 6], 2))
        engine.submit(asked.request)
        assert asked.wait() is None
        causal.remove("new")
    assert engine.stop(SECONDS)
    assert len(engine._companies) <= 2 * (len(causal) + 1) + 2
