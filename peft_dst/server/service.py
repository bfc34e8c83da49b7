"""What is served: a base and its deltas, asked in the words of clients, answered in time."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..delta import DeltaError
from ..serving import DeltaPool, UnknownDelta
from .cohorts import Continuation
from .engine import Classify, Engine, Generate
from .folder import DeltaFolder
from .labels import verdict
from .limits import Limits, Refused
from .sampling import Sampling
from .texts import Decoding, Prompts, Telling, longest


LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Some of an answer.

    Attributes:
        text: what is new.
        tokens: of the answer so far.
        finished: why it ended here, "stop" or "length"; None if there is more to come.
    """

    text: str
    tokens: int
    finished: str | None


class Service:
    """A base, its deltas, and the engine that computes with them.

    Args:
        model: causal, or a classifier of sequences; in evaluation mode.
        tokenizer: its.
        name: what the base itself is called.
        folder: of deltas, a folder each; None for none, and no uploads.
        limits: of requests.
        budget: bytes of deltas held ready.
        host_budget: bytes of deltas kept as they were read.
        capacity: sequences in computation at most.
        queue: requests that may wait.

    Attributes:
        prompts: reads what is asked.
        deltas: those that may come and go.

    Raises:
        ValueError: if the base's name is also a delta's.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        folder: Path | None = None,
        *,
        limits: Limits | None = None,
        budget: int = 2**30,
        host_budget: int = 0,
        capacity: int = 32,
        queue: int = 256,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.limits = limits or Limits()
        self.generates = hasattr(model, "generate") and model.can_generate()
        self.pool = DeltaPool(model, budget=budget, host_budget=host_budget)
        self.deltas = DeltaFolder(self.pool, folder, name)
        self.engine = Engine(self.pool, capacity=capacity, queue=queue)
        size = model.get_input_embeddings().num_embeddings
        most = longest(model, tokenizer, self.limits.tokens)
        self.prompts = Prompts(tokenizer, size, most, self.limits.characters)
        ends = model.generation_config.eos_token_id if self.generates else None
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or [])
        # When closing began and its grace, in monotonic seconds: for what was begun nobody waits any longer.
        self._end = math.inf

    def names(self) -> list[str]:
        """What clients may name as a model: the base and the deltas."""
        return [self.name, *self.pool.names()]

    def delta(self, model: str) -> str | None:
        """The delta of a model's name; None for the base.

        Raises:
            Refused: if there is none, or the service is closed.
        """
        if model == self.name:
            return None
        self.deltas.check_open()
        if model not in self.pool:
            raise Refused(f"the model {model!r} does not exist.", 404, "model_not_found")
        return model

    def close(self, seconds: float) -> bool:
        """Finish what was begun, for so many seconds at most; then put the base's weights back.

        It may be called again, and waits no longer for that than the first call does.

        Returns:
            Whether all was finished; what was not ends with `Stopped`.
        """
        self._end = min(self._end, time.monotonic() + seconds)
        done = self.engine.stop(max(0.0, self._end - time.monotonic()))
        if done:
            self.pool.close()
        return done

    async def generate(
        self,
        delta: str | None,
        prompt: list[int],
        limit: int,
        sampling: Sampling,
        stops: list[str],
        alone: bool = False,
    ) -> AsyncGenerator[Piece, None]:
        """Continue a prompt.

        Args:
            delta: with what; None for the base.
            prompt: tokens.
            limit: new tokens at most.
            sampling: how they are picked.
            stops: texts that end the answer.
            alone: whether the answer is a text of its own, and not the end of the prompt's.

        Yields:
            The answer, piece by piece; the last one is finished, and may be empty.

        Raises:
            Refused: if there is not enough time, or the delta is gone or damaged.
            Full: if too many wait.
        """
        loop = asyncio.get_running_loop()
        came: asyncio.Queue[BaseException | int | None] = asyncio.Queue()

        def tell(what: BaseException | int | None) -> None:
            _into(loop, came.put_nowait, what)

        continuation = Continuation(prompt, limit, sampling, self.ends, tell)
        telling = Telling(Decoding(self.tokenizer, [] if alone else prompt), stops)
        tokens = 0
        # Not asyncio.timeout around it all: each piece may be asked for by another task.
        end = loop.time() + self.limits.seconds
        try:
            self.engine.submit(Generate(delta, tell, continuation))
            while True:
                with self._in_time():
                    what = await asyncio.wait_for(came.get(), end - loop.time())
                if isinstance(what, BaseException):
                    raise self._as_told(what, delta)
                tokens += what is not None
                text, stopped = telling.tell(what)
                finished = "stop" if stopped else continuation.finished if what is None else None
                if text or finished:
                    yield Piece(text, tokens, finished)
                if finished:
                    return
        finally:
            continuation.cancelled = True

    async def classify(self, delta: str | None, texts: list[str]) -> list[dict[str, Any]]:
        """What is said of each text, as `verdict` has it.

        Raises:
            Refused: if a text is too long, there is not enough time, or the delta is gone or damaged.
            Full: if too many wait.
        """
        loop = asyncio.get_running_loop()
        prompts = await asyncio.to_thread(lambda: [self.prompts.read(text, 0) for text in texts])
        made = []
        try:
            for tokens in prompts:
                future: asyncio.Future[None] = loop.create_future()

                def tell(error: BaseException | None, future: asyncio.Future[None] = future) -> None:
                    told = error and self._as_told(error, delta)
                    _into(loop, _settle, future, told)

                made.append((Classify(delta, tell, tokens), future))
            self.engine.submit(*(request for request, _ in made))
            with self._in_time():
                await asyncio.wait_for(asyncio.gather(*(future for _, future in made)), self.limits.seconds)
        finally:
            for request, _ in made:
                request.cancelled = True
        found = []
        for request, _ in made:
            assert request.logits is not None
            found.append(verdict(request.logits, self.model.config))
        return found

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        try:
            yield
        except asyncio.TimeoutError:  # Python 3.10 has two of them
            raise Refused(f"not finished within {self.limits.seconds:g} seconds.", 504, "timeout") from None

    def _as_told(self, error: BaseException, delta: str | None) -> BaseException:
        """What clients are told of an error of the engine's."""
        if isinstance(error, DeltaError):
            LOG.error("the delta %r cannot be used: %s", delta, error)
            return Refused(f"the delta {delta!r} cannot be used; the server's log says why.", 500, "bad_delta")
        if isinstance(error, UnknownDelta):
            return Refused(f"the delta {delta!r} is not there any more.", 404, "model_not_found")
        return error


def _into(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    """Have a call made in a loop, from the engine's thread. Where the loop has ended, nobody waits for it any more."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if not future.done():
        future.set_exception(error) if error is not None else future.set_result(None)
