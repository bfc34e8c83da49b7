"""What is computed round by round: new texts are read, and everybody's next token is made."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from ...serving import DeltaPool
from ..classifier import classify
from ..cohorts import Cohort, Continuation
from .companies import Companies
from .desk import Desk
from .halving import Halving
from .plans import Plans
from .requests import Classify, Generate, Request


LOG = logging.getLogger(__name__)
# Steps after which it is decided anew whether deltas go together; when requests come, it is decided at once.
STEPS = 16
# Texts of fewer tokens are continued together, and longer ones with those that are less than twice as long: what a batch
# keeps of each of its texts, and goes through for the next token, is as much as of the longest.
SHORT = 512


class Rounds:
    """Continuations in batches, into which new ones come between two tokens: one batch of all deltas, or a batch for each,
    which then take turns token by token.

    Batches that cannot be put together or parted, as when memory runs out, go on as they are, and it is tried again later.

    Args:
        pool: of the model that computes.
        desk: tells requests their ends.
    """

    def __init__(self, pool: DeltaPool, desk: Desk) -> None:
        self._pool, self._desk = pool, desk
        self._companies = Companies(pool)
        self._halving = Halving(desk, self._companies)
        self.plans = Plans(pool, self._companies)
        self._cohorts: list[Cohort] = []
        # Steps until it is asked again whether deltas go together.
        self._settled = 0

    def compute(self, new: Sequence[Request]) -> None:
        """Begin what is new, and have everybody's next token made."""
        begun = [request for request in new if isinstance(request, Generate)]
        self._desk.begin(begun)
        for prompts in self.plans.plan("read", begun):
            self._halving.compute(self._begin, prompts)
        asked = [request for request in new if isinstance(request, Classify)]
        for texts in self.plans.plan("classify", asked):
            self._halving.compute(self._classify, texts)
        self._arrange(bool(new))
        for cohort in list(self._cohorts):
            self._step(cohort)

    def clear(self) -> None:
        """Go on with none of those that are continued."""
        self._cohorts.clear()

    # Batches

    @contextmanager
    def _model(self, kind: str, requests: Sequence[Request], sizes: Sequence[int]) -> Iterator[nn.Module]:
        """The model with the deltas of these, in their order; what is done with it is measured.

        Raises:
            UnknownDelta: if one was removed; while one has the model, none is.
        """
        deltas = [request.delta for request in requests]
        with self.plans.measured(kind, requests, sizes), self._pool.mix(deltas) as model:
            for request in requests:
                if error := self._desk.removed(request):
                    raise error
            yield model

    def _begin(self, requests: list[Generate]) -> None:
        """Read what these have so far, and have them continued."""
        with self._model("read", requests, [request.size for request in requests]) as model:
            cohort = Cohort(model, [request.continuation for request in requests])
        self._companies.learn(requests, cohort.width)
        self._cohorts.append(cohort)
        self._tell(requests)

    def _classify(self, requests: list[Classify]) -> None:
        longest = max(len(request.tokens) for request in requests)
        with self._model("classify", requests, [longest] * len(requests)) as model:
            logits = classify(model, [request.tokens for request in requests])
        self._companies.learn(requests, logits.shape[1:])
        for request, of_one in zip(requests, logits, strict=True):
            request.logits = of_one
            self._desk.end(request, None)

    def _step(self, cohort: Cohort) -> None:
        """The next token of a batch."""
        requests = self._desk.present(self._desk.of(cohort.members))
        try:
            cohort.leave()
            if requests:
                with self._model("step", requests, [1] * len(requests)):
                    cohort.step()
        except Exception as error:
            self._cohorts.remove(cohort)
            self._halving.after(error, self._begin, requests)
            return
        self._tell(requests)

    def _tell(self, requests: Sequence[Generate]) -> None:
        """Let those know that are finished; batches without members go."""
        self._cohorts = [cohort for cohort in self._cohorts if cohort.members]
        self._desk.tell(requests)

    # Putting them together

    def _arrange(self, new: bool) -> None:
        """Put batches together, or part them, as it is best now."""
        self._settled -= 1
        if not self._cohorts or (self._settled > 0 and not new):
            return
        self._settled = STEPS
        requests = self._desk.of([member for cohort in self._cohorts for member in cohort.members])
        place = {
            request.continuation: (number, (request.size // SHORT).bit_length())
            for number, together in enumerate(self.plans.plan("step", requests, lambda request: 1))
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
