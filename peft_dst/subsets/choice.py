"""From scores to a static subset: in each silo the budget's largest scores."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core import select
from .scores import Scores, check_scores


def choose(
    scores: Scores,
    silos: Mapping[str, Sequence[str]],
    budgets: Mapping[str, int],
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Choose a static subset: "the k parameters with the largest values" (the paper, Section 2.1), silo by silo.

    Ties go to the lower (tensor, flat index). A score of zero is never chosen; a silo with fewer scores above zero than
    its budget gets those, with one warning for all such silos.

    Args:
        scores: for every name in the silos; others are ignored.
        silos: silo → names of its parameters, as `core.partition` gives them.
        budgets: silo → number of components to choose, 0 <= budget <= the silo's size.
        shapes: parameter name → shape, to check the scores against (the caller's model).

    Returns:
        For every name in the silos, in their order, the sorted flat positions chosen, int64 (k_i,).

    Raises:
        ValueError: if a name has no score or one that is none, if its shape is not the parameter's, if a name is in two
            silos, or if a budget is missing or out of range.
    """
    _check_names(scores, silos, budgets)
    chosen: dict[str, Tensor] = {}
    short: dict[str, int] = {}
    for silo, names in silos.items():
        # Looked up once, for scores may be made when they are asked for.
        own = {name: scores[name] for name in names}
        check_scores(own, shapes)
        _check_budget(silo, budgets[silo], sum(score.numel() for score in own.values()))
        positions = _largest([score.reshape(-1) for score in own.values()], budgets[silo])
        chosen |= dict(zip(names, positions, strict=True))
        count = sum(at.numel() for at in positions)
        if count < budgets[silo]:
            short[silo] = count
    if short:
        some = [f"{silo!r} {count:,} of {budgets[silo]:,}" for silo, count in list(short.items())[:5]]
        more = f" and {len(short) - len(some)} more silos" if len(short) > len(some) else ""
        warnings.warn(
            f"fewer scores above zero than the budget in {', '.join(some)}{more}: those get fewer free parameters. Score "
            "on more examples, lower epsilon, or take larger silos.",
            stacklevel=2,
        )
    return chosen


def _largest(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Positions of the largest scores of one silo's flat tensors (n_i,)."""
    if budget == sum(score.numel() for score in scores):
        # There `select` keeps whatever has other bits than its seed: also a score of -0.0.
        return [(score > 0).nonzero().flatten() for score in scores]
    # A score is its distance from zero; zeros that are one in memory.
    zeros = [torch.zeros(1, device=score.device).expand(score.numel()) for score in scores]
    return select(zeros, scores, budget, "absolute").indices


def _check_names(scores: Scores, silos: Mapping[str, Sequence[str]], budgets: Mapping[str, int]) -> None:
    if unmatched := sorted(silos.keys() ^ budgets.keys()):
        raise ValueError(f"silos and budgets differ in {unmatched[0]!r}: give one budget for each silo and no other")
    for name, count in Counter(name for names in silos.values() for name in names).items():
        if count > 1:
            raise ValueError(f"{name!r} is {count} times in the silos: a parameter belongs to one silo")
        if name not in scores:
            raise ValueError(
                f"there is no score of {name!r}. Score it too (`names`), or leave it out of the tuned parameters "
                "(target_modules, exclude_modules)."
            )


def _check_budget(silo: str, budget: int, size: int) -> None:
    if not 0 <= budget <= size:
        raise ValueError(f"the budget of silo {silo!r} is {budget:,}; it has {size:,} components. Use 0 to {size:,}.")
