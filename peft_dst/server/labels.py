"""What a classifier says of a text: its classes by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor


# Of independent labels those of at least this probability are told.
LIKELY = 0.5


def verdict(logits: Tensor, config: Any) -> dict[str, Any]:
    """What is said of a text.

    Args:
        logits: floating (n,), of the base's head or of a delta's.
        config: the base's, which has the labels (`id2label`) and says what the outputs are (`problem_type`).

    Returns:
        `scores`, label → number; a delta's head of another width has numbers for labels. Of classes these are
        probabilities, and `label` is the most probable; of independent labels each is a probability by itself, and `labels`
        are the likely ones, the most probable first; of a regression they are the outputs as they are, without a label.
        One output is a regression, if it is no independent label: it would be a class of probability 1, whatever the text.
    """
    own = len(config.id2label) == len(logits)
    names = config.id2label if own else {}

    def named(values: Tensor) -> dict[str, float]:
        return {str(names.get(i, i)): value for i, value in enumerate(values.tolist())}

    logits = logits.double()
    if config.problem_type == "multi_label_classification":
        scores = named(logits.sigmoid())
        likely = [label for label, score in scores.items() if score >= LIKELY]
        return {"labels": sorted(likely, key=lambda label: -scores[label]), "scores": scores}
    if len(logits) == 1 or (own and config.problem_type == "regression"):
        return {"scores": named(logits)}
    scores = named(logits.softmax(-1))
    return {"label": max(scores, key=lambda label: scores[label]), "scores": scores}
