"""What is served: a base with its tokenizer, and deltas in a folder, which may come and go."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..delta import SparseDelta
from ..serving import DeltaPool
from .cohorts import Continuation
from .engine import Classify, Engine, Generate
from .sampling import Sampling


NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
INCOMING = ".incoming-"
# What a tokenizer makes of bytes that are not yet, or never, a character.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        tokens: prompt and answer together.
        seconds: until an answer is whole.
        upload: bytes of an uploaded delta.
    """

    tokens: int = 2048
    seconds: float = 120.0
    upload: int = 64 * 2**20


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


class Refused(Exception):
    """A request that cannot be served; `status` is HTTP's."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Service:
    """A base, its deltas, and the engine that computes with them.

    Args:
        model: causal, or a classifier of sequences; in evaluation mode.
        tokenizer: its.
        name: what the base itself is called.
        folder: of deltas, a folder each; None for none, and no uploads.
        limits: of requests.
        budget: bytes of deltas held ready.
        capacity: sequences in computation at most.
        queue: requests that may wait.

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
        capacity: int = 32,
        queue: int = 256,
    ) -> None:
        self.model, self.tokenizer, self.name, self.folder = model, tokenizer, name, folder
        self.limits = limits or Limits()
        self.generates = hasattr(model, "generate") and model.can_generate()
        self.pool = DeltaPool(model, budget=budget)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"{INCOMING}*"):
                # Of uploads that were killed.
                shutil.rmtree(left)
            self.pool.add_folder(folder)
        if name in self.pool:
            raise ValueError(f"the base is called {name!r}, and so is a delta; rename one of them.")
        self.engine = Engine(self.pool, capacity=capacity, queue=queue)
        longest = getattr(model.config, "max_position_embeddings", None) or self.limits.tokens
        self.longest = min(self.limits.tokens, longest)
        ends = model.generation_config.eos_token_id if self.generates else None
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or [])

    def names(self) -> list[str]:
        """What clients may name as a model: the base and the deltas."""
        return [self.name, *self.pool.names()]

    def delta(self, model: str) -> str | None:
        """The delta of a model's name; None for the base.

        Raises:
            Refused: if there is none.
        """
        if model == self.name:
            return None
        if model not in self.pool:
            raise Refused(f"the model {model!r} does not exist.", 404, "model_not_found")
        return model

    def close(self, seconds: float) -> bool:
        """Finish what was begun, for so many seconds at most; then put the base's weights back. It may be called again.

        Returns:
            Whether all was finished; what was not ends with `Stopped`.
        """
        done = self.engine.stop(seconds)
        if done:
            self.pool.close()
        return done

    # Texts

    def read(self, text: str | list[int], room: int) -> list[int]:
        """A prompt's tokens, with room for so many more behind them.

        Raises:
            Refused: if there is nothing in it, it is too long, or has tokens that there are not.
        """
        tokens = list(self.tokenizer(text)["input_ids"]) if isinstance(text, str) else text
        if not tokens:
            raise Refused("the prompt has no tokens.")
        size = self.model.get_input_embeddings().num_embeddings
        if any(not 0 <= token < size for token in tokens):
            raise Refused(f"the prompt has tokens outside 0 to {size - 1}.")
        if len(tokens) + room > self.longest:
            raise Refused(
                f"{len(tokens)} tokens of the prompt and {room} of the answer are more than the {self.longest} that are "
                "allowed.",
                code="context_length_exceeded",
            )
        return tokens

    async def generate(
        self, delta: str | None, prompt: list[int], limit: int, sampling: Sampling, stops: list[str]
    ) -> AsyncGenerator[Piece, None]:
        """Continue a prompt.

        Yields:
            The answer, piece by piece; the last one is finished, and may be empty.

        Raises:
            Refused: if there is not enough time.
            Full, KeyError, DeltaError: as the engine has them.
        """
        loop = asyncio.get_running_loop()
        came: asyncio.Queue[BaseException | int | None] = asyncio.Queue()

        def tell(what: BaseException | int | None) -> None:
            loop.call_soon_threadsafe(came.put_nowait, what)

        continuation = Continuation(prompt, limit, sampling, self.ends, tell)
        told = ""
        tokens: list[int] = []
        # Not asyncio.timeout around it all: each piece may be asked for by another task.
        end = loop.time() + self.limits.seconds
        try:
            self.engine.submit(Generate(delta, tell, continuation))
            while True:
                what = await asyncio.wait_for(came.get(), end - loop.time())
                if isinstance(what, BaseException):
                    raise what
                if what is not None:
                    tokens.append(what)
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                finished = continuation.finished if what is None else None
                at = min((found for stop in stops if (found := text.find(stop)) >= 0), default=None)
                if at is not None:
                    text, finished = text[:at], "stop"
                elif finished is None:
                    # What may be the beginning of a stop, or of a character, is kept back.
                    text = text[: _safe(text, stops)]
                if len(text) > len(told) or finished:
                    yield Piece(text[len(told) :], len(tokens), finished)
                    told = text
                if finished:
                    return
        except asyncio.TimeoutError:  # Python 3.10 has two of them
            raise Refused(f"not finished within {self.limits.seconds:g} seconds.", 504, "timeout") from None
        finally:
            continuation.cancelled = True

    async def classify(self, delta: str | None, texts: list[str]) -> list[dict[str, float]]:
        """Scores of each text: label → probability.

        Raises:
            Refused: if a text is too long, or there is not enough time.
        """
        loop = asyncio.get_running_loop()
        prompts = [self.read(text, 0) for text in texts]
        made = []
        try:
            for tokens in prompts:
                future: asyncio.Future[None] = loop.create_future()

                def tell(error: BaseException | None, future: asyncio.Future[None] = future) -> None:
                    loop.call_soon_threadsafe(_settle, future, error)

                made.append((Classify(delta, tell, tokens), future))
            self.engine.submit(*(request for request, _ in made))
            await asyncio.wait_for(asyncio.gather(*(future for _, future in made)), self.limits.seconds)
        except asyncio.TimeoutError:  # Python 3.10 has two of them
            raise Refused(f"not finished within {self.limits.seconds:g} seconds.", 504, "timeout") from None
        finally:
            for request, _ in made:
                request.cancelled = True
        names = getattr(self.model.config, "id2label", None) or {}
        found = []
        for request, _ in made:
            assert request.logits is not None
            probabilities = request.logits.double().softmax(-1).tolist()
            # A delta's head may have other classes than the base's config names.
            known = names if len(names) == len(probabilities) else {}
            found.append({str(known.get(i, i)): p for i, p in enumerate(probabilities)})
        return found

    # Deltas that come and go

    def incoming(self) -> Path:
        """A new folder for what is being uploaded, beside the deltas.

        Raises:
            Refused: if the server takes none.
        """
        if self.folder is None:
            raise Refused("this server has no folder for deltas.", 403)
        return Path(tempfile.mkdtemp(prefix=INCOMING, dir=self.folder))

    def take(self, name: str, folder: Path) -> SparseDelta:
        """Check an uploaded delta against the base, and add it; blocking.

        Args:
            name: what it is to be called.
            folder: made by `incoming`, with its two files; it becomes the delta's, or is left where it is.

        Raises:
            Refused: if the name is none or taken.
            DeltaError: if the files are not as they should be, or of another base.
        """
        self.check_name(name)
        delta = SparseDelta.load(folder)
        self.pool.verify(delta)
        assert self.folder is not None
        target = self.folder / name
        try:
            folder.rename(target)
        except OSError:
            raise Refused(f"there is a model {name!r} already.", 409) from None
        self.pool.add(name, target)
        return delta

    def check_name(self, name: str) -> None:
        """Check that a new delta can be called that.

        Raises:
            Refused: if it is no name, or taken.
        """
        if not NAME.fullmatch(name):
            raise Refused(
                f"{name[:80]!r} is no name: letters, digits, '_', '.' and '-', 64 at most, a letter or digit first."
            )
        if name == self.name or name in self.pool:
            raise Refused(f"there is a model {name!r} already.", 409)

    def remove(self, name: str) -> None:
        """Remove a delta, once nobody uses it; blocking.

        Raises:
            Refused: if there is none, or it is the base.
        """
        if name == self.name or name not in self.pool:
            raise Refused(f"there is no delta {name!r}.", 404, "model_not_found")
        try:
            self.pool.remove(name)
        except KeyError:
            raise Refused(f"there is no delta {name!r}.", 404, "model_not_found") from None
        assert self.folder is not None
        # Renamed first: a server killed in the middle does not come up with half of it.
        leaving = Path(tempfile.mkdtemp(prefix=INCOMING, dir=self.folder)) / name
        (self.folder / name).rename(leaving)
        shutil.rmtree(leaving.parent)


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if not future.done():
        future.set_exception(error) if error is not None else future.set_result(None)


def _safe(text: str, stops: list[str]) -> int:
    """How much of a text can be told, when more is to come."""
    end = len(text.rstrip(UNFINISHED)) if text.endswith(UNFINISHED) else len(text)
    for stop in stops:
        for size in range(min(len(stop) - 1, end), 0, -1):
            if text[:end].endswith(stop[:size]):
                end -= size
                break
    return end
