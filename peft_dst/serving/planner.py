"""Whether samples of several deltas go through the model together, or delta by delta: whatever took less before."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch


class Costs:
    """What batches took, as a straight line in their sizes.

    Args:
        last: batches that count; those before are forgotten, as machines and loads change.
    """

    def __init__(self, last: int = 64) -> None:
        self._seen: deque[tuple[tuple[float, ...], float]] = deque(maxlen=last)
        self._line: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, sizes: tuple[float, ...], seconds: float) -> None:
        """A batch of these sizes took so long."""
        self._seen.append((sizes, seconds))
        self._line = None

    def expected(self, sizes: tuple[float, ...]) -> float:
        """Seconds that a batch of these sizes will take, by what was seen."""
        if self._line is None:
            rows = torch.tensor([(1.0, *seen) for seen, _ in self._seen], dtype=torch.float64)
            seconds = torch.tensor([taken for _, taken in self._seen], dtype=torch.float64)
            # Relative errors count: a tenth too much of a short batch is as bad as of a long one. The ridge is for sizes
            # that were all the same.
            weighted = rows / seconds[:, None]
            square = weighted.T @ weighted
            ridge = 1e-9 * square.diagonal().max() * torch.eye(len(square), dtype=torch.float64)
            self._line = torch.linalg.solve(square + ridge, weighted.sum(0))
        return float(self._line @ torch.tensor((1.0, *sizes), dtype=torch.float64))


class Planner:
    """Decides between one mixed batch and a batch for each delta, from measured times.

    At first both are tried in turn; afterwards the other one is tried again now and then.

    Args:
        trials: batches of either way before anything is decided.
        again: every how many decisions the other way is tried.
    """

    def __init__(self, trials: int = 3, again: int = 50) -> None:
        self._trials, self._again = trials, again
        self._alone, self._mixed = Costs(), Costs()
        self._decided = 0
        self._warm = False

    def mixes(self, sizes: Sequence[int]) -> bool:
        """Whether to put deltas together.

        Args:
            sizes: tokens or samples of each delta.
        """
        if len(sizes) < 2:
            return False
        self._decided += 1
        if len(self._mixed) < self._trials or len(self._alone) < self._trials:
            return len(self._mixed) <= len(self._alone)
        together = self._mixed.expected((sum(sizes), len(sizes)))
        apart = sum(self._alone.expected((size,)) for size in sizes)
        better = together < apart
        return not better if self._decided % self._again == 0 else better

    def note(self, sizes: Sequence[int], seconds: float) -> None:
        """A batch took so long: of one delta, or of several together."""
        if len(sizes) > 1 and not self._warm:
            # A model's first mixed batch also finds out where its samples are.
            self._warm = True
        elif len(sizes) > 1:
            self._mixed.note((sum(sizes), len(sizes)), seconds)
        else:
            self._alone.note((sizes[0],), seconds)
