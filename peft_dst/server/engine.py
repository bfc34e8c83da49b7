"""The one thread that computes: takes in requests for many deltas, and batches those that can go together."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from ..delta import DeltaError
from ..serving import DeltaPool, Planner, UnknownDelta
from .classifier import classify
from .cohorts import Cohort, Continuation


LOG = logging.getLogger(__name__)
# A delta's name and version.
Key = tuple[str | None, int | None]
# Steps after which it is decided anew whether deltas go together; when requests come, it is decided at once.
STEPS = 16
# Tokens of several texts that are read in one batch at most, with their padding: one long text makes short ones as long.
TOKENS = 8192
# Texts of fewer tokens are continued together, and longer ones with those that are less than twice as long: what a batch
# keeps of each of its texts, and goes through for the next token, is as much as of the longest.
SHORT = 512
# Tokens of new texts that are read before everybody gets another token, or a single text.
READ = 8192
# Seconds that a delta is computed alone after an error; twice as long after each further one.
APART = 60.0


@dataclass(eq=False)
class Request:
    """Something to compute with a delta.

    Attributes:
        delta: its name; None for the base.
        on_end: called once: with None when it is done, or with what went wrong.
        version: of the delta, when it was submitted; None for the base, and if there was none.
        group: what was submitted together has the same.
    """

    delta: str | None
    on_end: Callable[[BaseException | None], None]
    version: int | None = field(default=None, init=False)
    group: object = field(default=None, init=False)

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Tokens that are to be read."""
        raise NotImplementedError

    @property
    def key(self) -> Key:
        """What it is computed with."""
        return self.delta, self.version


@dataclass(eq=False)
class Generate(Request):
    """Continue a text; its tokens come to the continuation's own `on_token`."""

    continuation: Continuation

    @property
    def cancelled(self) -> bool:
        return self.continuation.cancelled

    @property
    def size(self) -> int:
        return len(self.continuation.prompt) + len(self.continuation.tokens)


@dataclass(eq=False)
class Classify(Request):
    """Read a text, as tokens; at the end `logits` is there, floating on the CPU, of the model's shape without the batch."""

    tokens: Sequence[int]
    logits: Tensor | None = None
    cancelled: bool = False

    @property
    def size(self) -> int:
        return len(self.tokens)


R = TypeVar("R", bound=Request)


class Unavailable(Exception):
    """A request that is not computed now, through no fault of its own."""


class Full(Unavailable):
    """There are more requests than may wait."""


class Stopped(Unavailable):
    """The engine was stopped, or broke down."""


class Engine:
    """Computes requests, many at a time, in a thread of its own.

    Continuations make batches, into which new ones come between two tokens: one batch of all deltas, or a batch for each,
    which then take turns token by token. Whatever took less time so far is done (`Planner`), for reading prompts, for
    continuing them and for classifying, each by itself.

    Errors: what goes wrong with one sequence alone, as in sampling, ends that one. After an error of a batch of several
    deltas each half of them is computed by itself, and so on, down to single deltas, and of those down to single requests,
    as memory may be enough for fewer. A request that fails alone ends with its error, and its delta is computed alone for
    a while; if it is the delta that cannot be used, all that want it end. So are two deltas that fail together and not
    alone, as at least one of them changes what cannot be mixed; but if their outputs have different shapes (heads of
    different sizes), each goes on with those of its own shape. Others are mixed as before. Batches that cannot be put
    together or parted, as when memory runs out, go on as they are, and it is tried again later.

    A request is for the delta that had its name when it was submitted: if that is removed, it ends with an UnknownDelta,
    also when another one has come in its place.

    Args:
        pool: of the model that computes, which is in evaluation mode.
        capacity: sequences in computation at most.
        queue: requests that may wait beside them.
    """

    def __init__(self, pool: DeltaPool, *, capacity: int = 32, queue: int = 256) -> None:
        self.pool, self.capacity, self.queue = pool, capacity, queue
        self._waiting: deque[Request] = deque()
        # Those that were submitted and have not ended.
        self._open: set[Request] = set()
        self._changed = threading.Condition()
        self._stopping = False
        self._lost = False
        self._cohorts: list[Cohort] = []
        self._owners: dict[Continuation, Generate] = {}
        # With which others a delta may be in a batch: those of the same value. It is its outputs' shape.
        self._companies: dict[Key, Hashable] = {}
        # Until when a delta is computed alone, and how long it was to be.
        self._apart: dict[Key, tuple[float, float]] = {}
        # Steps until it is asked again whether deltas go together.
        self._settled = 0
        self.planners = {"read": Planner(), "step": Planner(), "classify": Planner()}
        self.computed = {"tokens": 0, "batches": 0, "rows": 0, "mixed_batches": 0}
        self._thread = threading.Thread(target=self._work, name="peft-dst-engine", daemon=True)
        self._thread.start()

    def submit(self, *requests: Request) -> None:
        """Have requests computed. Those that are submitted together count as one of those that wait.

        Raises:
            Full: if too many wait.
            Stopped: if the engine does not run any more.
        """
        group = object()
        with self._changed:
            if self._stopping:
                raise Stopped("the engine was stopped.")
            if (waiting := self.waiting) >= self.queue:
                raise Full(f"{waiting} requests are waiting already; try again later.")
            for request in requests:
                request.version, request.group = self._version(request.delta), group
            self._waiting.extend(requests)
            self._open.update(requests)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Requests that nothing is computed for yet; without those that went away."""
        with self._changed:
            return len({request.group for request in self._waiting if not request.cancelled})

    @property
    def running(self) -> int:
        """Sequences in computation."""
        return len(self._owners)

    @property
    def alive(self) -> bool:
        """Whether it computes; not when it was stopped, or its thread broke down."""
        return self._thread.is_alive()

    def stop(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those that are there. It may be called several times.

        Args:
            timeout: seconds to wait; then what is left ends with `Stopped`.

        Returns:
            Whether all were computed.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._give_up("the server was stopped before this was computed.")
        return not self._lost

    def _give_up(self, why: str) -> None:
        """Take nothing more, and end all that is there."""
        with self._changed:
            self._stopping = True
            self._waiting.clear()
            left = list(self._open)
            self._lost = self._lost or bool(left)
        for request in left:
            self._end(request, Stopped(why))

    def _end(self, request: Request, error: BaseException | None) -> None:
        """Tell a request's end, once."""
        with self._changed:
            if request not in self._open:
                return
            self._open.remove(request)
        try:
            request.on_end(error)
        except Exception:
            # Whoever asked is gone, which is nobody else's concern.
            LOG.warning("the end of a request could not be told", exc_info=True)

    # In the thread

    def _work(self) -> None:
        try:
            while (new := self._take()) is not None:
                try:
                    self._round(new)
                except Exception as error:
                    LOG.exception("a round failed, and with it all that was in computation")
                    self._cohorts.clear()
                    for request in (*new, *self._owners.values()):
                        self._end(request, error)
                    self._owners.clear()
        except BaseException:
            LOG.critical("the engine broke down", exc_info=True)
            self._give_up("the engine broke down; the server's log has more.")

    def _take(self) -> list[Request] | None:
        """New requests, as many as there is room and time for; None when the engine has stopped and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._owners or self._stopping)
            if self._stopping and not self._waiting and not self._owners:
                return None
            gone = [request for request in self._waiting if request.cancelled]
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
            new: list[Request] = []
            left = READ
            while self._waiting and self.running + len(new) < self.capacity:
                left -= self._waiting[0].size
                if new and left < 0:
                    break
                new.append(self._waiting.popleft())
        self._present(gone)
        return new

    def _round(self, new: list[Request]) -> None:
        """Begin what is new, and have everybody's next token made."""
        begun = [request for request in new if isinstance(request, Generate)]
        self._owners |= {request.continuation: request for request in begun}
        for prompts in self._plan("read", begun):
            self._compute(self._begin, prompts)
        asked = [request for request in new if isinstance(request, Classify)]
        for texts in self._plan("classify", asked):
            self._compute(self._classify, texts)
        self._arrange(bool(new))
        for cohort in list(self._cohorts):
            self._step(cohort)

    def _present(self, requests: Sequence[R]) -> list[R]:
        """Those that are still wanted, and whose delta is still there; for others it is the end."""
        staying = []
        for request in requests:
            if request.cancelled or request not in self._open:
                self._drop(request, None)
            elif error := self._removed(request):
                self._drop(request, error)
            else:
                staying.append(request)
        return staying

    def _drop(self, request: Request, error: BaseException | None) -> None:
        """The end of a request that is not done."""
        if isinstance(request, Generate):
            request.continuation.finished = "cancelled" if error is None else "error"
            self._owners.pop(request.continuation, None)
        self._end(request, error)

    def _removed(self, request: Request) -> UnknownDelta | None:
        """What to tell it if its delta has gone, or is another one now."""
        if request.delta is None:
            return None
        if request.version is not None and self._version(request.delta) == request.version:
            return None
        return UnknownDelta(f"the delta {request.delta!r} was removed.")

    def _version(self, delta: str | None) -> int | None:
        """Of a delta now; None for the base, and for one that there is not."""
        try:
            return None if delta is None else self.pool.version(delta)
        except UnknownDelta:
            return None

    @contextmanager
    def _model(self, kind: str, requests: Sequence[Request], sizes: Sequence[int]) -> Iterator[nn.Module]:
        """The model with the deltas of these, in their order; what is done with it is measured.

        Raises:
            UnknownDelta: if one was removed; while one has the model, none is.
        """
        deltas = [request.delta for request in requests]
        with self._measured(kind, deltas, sizes), self.pool.mix(deltas) as model:
            for request in requests:
                if error := self._removed(request):
                    raise error
            yield model

    def _begin(self, requests: list[Generate]) -> None:
        """Read what these have so far, and have them continued."""
        with self._model("read", requests, [request.size for request in requests]) as model:
            cohort = Cohort(model, [request.continuation for request in requests])
        self._learn(requests, cohort.width)
        self._cohorts.append(cohort)
        self._tell(requests)

    def _classify(self, requests: list[Classify]) -> None:
        longest = max(len(request.tokens) for request in requests)
        with self._model("classify", requests, [longest] * len(requests)) as model:
            logits = classify(model, [request.tokens for request in requests])
        self._learn(requests, logits.shape[1:])
        for request, of_one in zip(requests, logits, strict=True):
            request.logits = of_one
            self._end(request, None)

    def _step(self, cohort: Cohort) -> None:
        """The next token of a batch."""
        requests = self._present([self._owners[member] for member in cohort.members])
        try:
            cohort.leave()
            if requests:
                with self._model("step", requests, [1] * len(requests)):
                    cohort.step()
        except Exception as error:
            self._cohorts.remove(cohort)
            self._divide(self._begin, requests, error)
            return
        self._tell(requests)

    def _compute(self, compute: Callable[[list[R]], None], requests: list[R]) -> bool:
        """Have requests computed, in one batch if that is possible; those that went away are not.

        Returns:
            Whether none ended with an error.
        """
        fine = True
        for batch in _batches(self._present(requests)):
            try:
                compute(batch)
            except Exception as error:
                fine = self._divide(compute, batch, error) and fine
        return fine

    def _divide(self, compute: Callable[[list[R]], None], requests: list[R], error: Exception) -> bool:
        """After an error of a batch: compute it in two, so that it is known whose it was; as `_compute`."""
        # Those that ended in the very step have their answers.
        self._tell(requests)
        requests = [request for request in requests if request in self._open]
        about_a_delta = isinstance(error, UnknownDelta | DeltaError)
        parts = _by_delta(requests)
        if len(parts) < 2 and not about_a_delta:
            # They may have been too many, or it is one request's fault.
            parts = [[request] for request in requests]
        if len(parts) < 2:
            for request in requests:
                if not isinstance(error, UnknownDelta):
                    self._keep_apart(request, error)
                self._drop(request, error)
            return False
        half = len(parts) // 2
        fine = [self._compute(compute, [r for part in some for r in part]) for some in (parts[:half], parts[half:])]
        one, other = parts[0][0], parts[-1][0]
        # What is about a delta is so when it is alone; and memory may be enough for either of one delta's requests.
        together = len(parts) == 2 and all(fine) and not about_a_delta and one.key != other.key
        if together and self._company(one) == self._company(other):
            self._keep_apart(one, error)
            self._keep_apart(other, error)
        return all(fine)

    def _company(self, request: Request) -> Hashable:
        """With whom it may be in a batch; what was never computed is taken to go with the base."""
        if self._is_apart(request.key):
            return request.key
        return self._companies.get(request.key, self._companies.get((None, None)))

    def _learn(self, requests: Sequence[Request], shape: Hashable) -> None:
        for request in requests:
            self._companies.setdefault(request.key, shape)
        if len(self._companies) + len(self._apart) > 2 * len(self.pool) + 2:
            # Most are of deltas that are gone.
            gone = {key for key in (*self._companies, *self._apart) if self._version(key[0]) != key[1]}
            self._companies = {key: of_one for key, of_one in self._companies.items() if key not in gone}
            self._apart = {key: of_one for key, of_one in self._apart.items() if key not in gone}

    def _keep_apart(self, request: Request, error: Exception) -> None:
        """Compute a delta alone for a while, after an error, which may have been another's or pass."""
        if request.delta is None or self._is_apart(request.key):
            return
        _, before = self._apart.get(request.key, (0.0, APART / 2))
        self._apart[request.key] = time.monotonic() + 2 * before, 2 * before
        LOG.warning(
            "%r is computed alone for %g seconds, after %s: %s", request.delta, 2 * before, type(error).__name__, error
        )

    def _is_apart(self, key: Key) -> bool:
        return time.monotonic() < self._apart.get(key, (0.0, 0.0))[0]

    def _tell(self, requests: Sequence[Request]) -> None:
        """Let those know that are finished; batches without members go."""
        self._cohorts = [cohort for cohort in self._cohorts if cohort.members]
        for request in requests:
            if isinstance(request, Generate) and request.continuation.finished is not None:
                self._owners.pop(request.continuation, None)
                self._end(request, request.continuation.error)

    def _arrange(self, new: bool) -> None:
        """Put batches together, or part them, as it is best now."""
        self._settled -= 1
        if not self._cohorts or (self._settled > 0 and not new):
            return
        self._settled = STEPS
        requests = [self._owners[member] for cohort in self._cohorts for member in cohort.members]
        place = {
            request.continuation: (number, (request.size // SHORT).bit_length())
            for number, together in enumerate(self._plan("step", requests, lambda request: 1))
            for request in together
        }
        found: dict[Hashable, Cohort] = {}
        for key, part in [one for cohort in self._cohorts for one in self._parts(cohort, place)]:
            try:
                if found.setdefault(key, part) is not part:
                    found[key].join(part)
            except Exception as error:
                LOG.warning("batches are not put together for now, after %s: %s", type(error).__name__, error)
                found[part] = part
        self._cohorts = list(found.values())

    def _parts(self, cohort: Cohort, place: Mapping[Continuation, Hashable]) -> list[tuple[Hashable, Cohort]]:
        """A batch parted by places, and the place of each part; its own if it cannot be parted."""
        try:
            parts = cohort.divide([place[member] for member in cohort.members])
        except Exception as error:
            LOG.warning("a batch is not parted for now, after %s: %s", type(error).__name__, error)
            return [(cohort, cohort)]
        return [(place[part.members[0]], part) for part in parts]

    def _plan(
        self, kind: str, requests: Sequence[R], size: Callable[[R], int] = lambda request: request.size
    ) -> list[list[R]]:
        """What goes together: of a company as much as the pool has room for, or those of one delta."""
        plan: list[list[R]] = []
        for company in _grouped(requests, self._company):
            parts = _by_delta(company)
            if self.planners[kind].mixes([sum(map(size, part)) for part in parts]):
                fitting, parts = self._fitting(parts)
                plan += [[request for part in fitting for request in part]] if fitting else []
            plan += parts
        return plan

    def _fitting(self, parts: Sequence[list[R]]) -> tuple[list[list[R]], list[list[R]]]:
        """Those of which the pool holds all deltas at once, and others, which would be arranged anew for each token."""
        fitting: list[list[R]] = []
        others: list[list[R]] = []
        room = self.pool.budget
        for part in parts:
            size = self.pool.mixed_nbytes(part[0].delta)
            if size > room:
                others.append(part)
            else:
                room -= size
                fitting.append(part)
        return fitting, others

    @contextmanager
    def _measured(self, kind: str, deltas: Sequence[str | None], sizes: Sequence[int]) -> Iterator[None]:
        """Count a batch and remember what it took, if it comes to its end."""
        begin = time.perf_counter()
        yield
        taken = time.perf_counter() - begin
        by_delta: Counter[str | None] = Counter()
        for delta, size in zip(deltas, sizes, strict=True):
            by_delta[delta] += size
        self.planners[kind].note(list(by_delta.values()), taken)
        self.computed["batches"] += 1
        self.computed["mixed_batches"] += len(by_delta) > 1
        self.computed["rows"] += len(deltas)
        self.computed["tokens"] += 0 if kind == "classify" else len(deltas)


def _batches(requests: Sequence[R]) -> list[list[R]]:
    """Those of like sizes together, no more than `TOKENS` with their padding, or a single one."""
    found: list[list[R]] = []
    for request in sorted(requests, key=lambda request: request.size):
        if found and (len(found[-1]) + 1) * request.size <= TOKENS:
            found[-1].append(request)
        else:
            found.append([request])
    return found


def _by_delta(requests: Sequence[R]) -> list[list[R]]:
    return _grouped(requests, lambda request: request.key)


def _grouped(requests: Sequence[R], key: Callable[[R], Hashable]) -> list[list[R]]:
    found: dict[Hashable, list[R]] = {}
    for request in requests:
        found.setdefault(key(request), []).append(request)
    return list(found.values())
