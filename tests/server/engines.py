"""What the tests of the engine start from: pools, requests whose end is waited for, planners and models to be held up."""

from __future__ import annotations

import copy
import threading

import torch
from torch import nn

from peft_dst.delta import SparseDelta
from peft_dst.server.cohorts import Cohort, Continuation
from peft_dst.server.engine import Generate
from peft_dst.serving import DeltaPool


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


def generating(delta, prompt, limit, **options):
    """A request to continue a text by so many tokens."""
    return Asked(Generate, delta, continuation=Continuation(prompt, limit, **options))


def check_answers(asked, want):
    """Wait for these, which are to have such tokens."""
    for one, tokens in zip(asked, want, strict=True):
        assert one.wait() is None
        assert one.request.continuation.tokens == tokens


def together(engine, asked):
    """Submit these so that they are taken in one round: none waits for its delta to be read."""
    for delta in {one.request.delta for one in asked} - {None}:
        engine.pool.ready(delta)
    with engine._desk._changed:
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


def ask(engine, *deltas, limit=8, **options):
    """Continuations of one text with several deltas, from one round on, and what they should be."""
    asked = [generating(delta, [5, 6, 7], limit, **options) for delta in deltas]
    want = [expected(engine.pool, delta, [5, 6, 7], limit) for delta in deltas]
    together(engine, asked)
    return asked, want


def mixed_now(engine, *deltas) -> bool:
    """Whether these go together, with right answers."""
    before = engine.computed["mixed_batches"]
    check_answers(*ask(engine, *deltas))
    return engine.computed["mixed_batches"] > before


def failing(pool, name, alone):
    """Have the forward pass fail for a delta: also when it is alone, or only beside others."""
    mix = pool.mix

    def watched(names, copies=1):
        if name in names and (alone or len(set(names)) > 1):
            raise RuntimeError("the shapes do not fit")
        return mix(names, copies)

    pool.mix = watched
