"""What the numbers and splits of a recipe may be, which types do not say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from .options import TaskOptions


# Options that have a least value, by it.
AT_LEAST = {
    1: (
        *("evaluation.every", "evaluation.text_examples", "evaluation.train_examples", "evaluation.beams"),
        *("evaluation.max_new_tokens", "search.trials", "task.train_size", "task.validation_size", "task.test_size"),
        *("task.max_length", "task.max_target_length", "task.max_characters", "training.max_steps"),
        *("training.batch_size", "training.evaluation_batch_size", "training.accumulation", "training.save_steps"),
        *("training.logging_steps", "training.empty_cache_steps", "training.head_first.batch_size"),
        *("method.num_free_parameters", "method.rank", "method.virtual_tokens", "method.score_examples"),
        "method.text_examples",
    ),
    0: (
        *("training.head_learning_rate", "training.epochs", "training.weight_decay", "training.warmup"),
        *("training.max_grad_norm", "training.snapshots", "training.head_first.epochs"),
        *("training.head_first.learning_rate", "method.coefficient", "method.pruning_learning_rate"),
        *("method.lora_dropout", "model.dropout", "task.mask_probability"),
    ),
}
FRACTIONS = ("method.lora_dropout", "model.dropout", "task.mask_probability")
# `train`, `train[:1000]`
_SPLIT = re.compile(r"\s*([^\[\s]+)(?:\[(.*)\])?\s*")
# Roles of splits that have no example in common.
PAIRS = (("train", "test"), ("validation", "test"), ("train", "validation"))


def check_numbers(options: Mapping[str, Any]) -> None:
    """Check ranges.

    Args:
        options: values by their dotted names.

    Raises:
        ValueError: for a number outside its range.
    """
    for least, names in AT_LEAST.items():
        for name in names:
            number = options[name]
            if number is not None and not least <= number < math.inf:
                raise ValueError(f"{name} must be {least} or more, got {number}.")
    for name in FRACTIONS:
        number = options[name]
        if number is not None and number > 1:
            raise ValueError(f"{name} must be 1 at most, got {number}.")


def check_splits(task: TaskOptions) -> None:
    """Check that no example is tested on that is trained on or chosen by, nor chosen by that is trained on, as far as the
    splits' names tell.

    Parts of splits are compared when the data is there (`tasks.base`).

    Raises:
        ValueError: for splits that overlap.
    """
    elsewhere = task.evaluation_data is not None and (
        (task.evaluation_data, task.evaluation_subset) != (task.data, task.subset)
    )
    for one, other in PAIRS:
        splits = getattr(task, one), getattr(task, other)
        if None not in splits and not (elsewhere and one == "train") and _in_common(*splits):
            raise ValueError(overlap_error(task, one, other))


def overlap_error(task: TaskOptions, one: str, other: str) -> str:
    """What is said of two splits (of `PAIRS`) that overlap."""
    first, second = getattr(task, one), getattr(task, other)
    rule = "tested on is never trained on, nor chosen by" if other == "test" else "chosen by is never trained on"
    return (
        f"task.{one}={first} and task.{other}={second} have examples in common; what is {rule}. Name another split, or "
        "parts of it, such as validation[:800] and validation[800:]."
    )


def _in_common(one: str, other: str) -> bool:
    """Whether two splits, as `datasets` writes them, have rows in common for certain."""
    return any(
        a[1] == b[1] and (a[2] is None or b[2] is None or a[2] == b[2])
        for a in map(_SPLIT.fullmatch, one.split("+"))
        for b in map(_SPLIT.fullmatch, other.split("+"))
        if a and b
    )
