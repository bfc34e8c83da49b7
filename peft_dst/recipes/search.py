"""Choosing a value of the series 1, 2, 5, 10, … on validation data: what to try next, given what was tried."""

from __future__ import annotations

import math
from collections.abc import Mapping


SERIES = (1, 2, 5)


def next_places(scores: Mapping[int, float], most: int) -> list[int]:
    """What to try next, as places in the series, of which 0 is the start.

    The start and both its neighbours; then on to a side for as long as the best is at that end.

    Args:
        scores: place → figure of what was tried; larger is better.
        most: how many there may be in all.

    Returns:
        Places to try now; none when the best has a neighbour on both sides, or there were enough.
    """
    if not scores:
        return [0, -1, 1][:most]
    best = best_place(scores)
    wanted = [place for place in (best - 1, best + 1) if place not in scores]
    return wanted[: max(0, most - len(scores))]


def best_place(scores: Mapping[int, float]) -> int:
    """The place with the best figure; of equal ones the one nearest to the start, and then the lower."""
    return max(scores, key=lambda place: (scores[place], -abs(place), -place))


def in_series(start: float, place: int) -> float:
    """The start, or the member of the series so many places above or below it.

    A start between two members counts as the lower one: 0.3 is followed by 0.5 and preceded by 0.1.
    """
    if place == 0:
        return start
    exponent = math.floor(math.log10(start) + 1e-9)
    digit = sum(start / 10.0**exponent >= member - 1e-6 for member in SERIES) - 1
    exponent, digit = divmod(len(SERIES) * exponent + digit + place, len(SERIES))
    return float(f"{SERIES[digit]}e{exponent}")
