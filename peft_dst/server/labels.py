"""What a classifier says of a text: its classes by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def scores(logits: Tensor, names: Mapping[int, str]) -> dict[str, float]:
    """Label → probability.

    Args:
        logits: floating (n,).
        names: class → label, as the base's config has them.
    """
    probabilities = logits.double().softmax(-1).tolist()
    # A delta's head may have other classes than the base's config names.
    known = names if len(names) == len(probabilities) else {}
    return {str(known.get(i, i)): p for i, p in enumerate(probabilities)}
