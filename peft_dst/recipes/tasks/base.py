"""What every task can do; and how its rows are divided: test examples are never trained on or chosen by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..checks import PAIRS, overlap_error
from ..options import TaskOptions
from .data import load_rows, rows_in_common, source_of


Row = dict[str, Any]
Features = dict[str, Any]
Collate = Callable[[list[Features]], dict[str, torch.Tensor]]
# The label of a position that no loss or metric looks at, torch's and transformers' convention.
IGNORED = -100


@dataclass
class Splits:
    """Rows to train on, to choose by (learning rates, …), and to report."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]

    def __getitem__(self, name: str) -> list[Row]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


class Task(ABC):
    """A kind of task with its options.

    Rows are dictionaries with names of the task's own; what the data calls them is settled in `convert`.
    """

    # PEFT's name; None where PEFT has none.
    task_type: str | None
    generates: ClassVar[bool] = False

    def __init__(self, options: TaskOptions) -> None:
        self.options = options
        # What there is to choose from, in the order of the model's outputs; none where it writes its answer.
        self.labels: list[str] = []

    def load(self) -> Splits:
        """Read the data, and divide it.

        Raises:
            ValueError: if a split or a column is missing, a split has no rows, or a row does not have what it should.
        """
        options = self.options
        train = load_rows(options.data, options.train, options.subset).shuffle(seed=options.data_seed)
        given = {"train": train, "test": self.evaluation_rows(options.test)}
        if options.validation is not None:
            given["validation"] = self.evaluation_rows(options.validation)
        self.check_apart(given)
        # Before the cut: a rare label may be in the part that is held out.
        self.prepare(train)
        if options.validation is None:
            size = self.held_out(len(train))
            if not size:
                raise ValueError(f"{options.data} has no validation examples{self._remedy('validation')}.")
            # The last ones: more or fewer training examples leave the validation examples what they are.
            held_out = train.select(range(len(train) - size, len(train)))
            train = train.select(range(len(train) - size))
        else:
            held_out = given["validation"]
            held_out = held_out.select(range(min(options.validation_size, len(held_out))))
        return self.divided(train, held_out, given["test"])

    def held_out(self, count: int) -> int:
        """How many of so many training examples are cut for validation."""
        return min(self.options.validation_size, count // 5)

    def evaluation_rows(self, split: str) -> Dataset:
        """Rows of a split that is not trained on."""
        return load_rows(self.evaluated[0], split, self.evaluated[1])

    @property
    def evaluated(self) -> tuple[str, str | None]:
        """Data set and subset that are evaluated on."""
        options = self.options
        if options.evaluation_data is not None:
            return options.evaluation_data, options.evaluation_subset
        return options.data, options.subset

    def check_apart(self, given: Mapping[str, Dataset]) -> None:
        """Check that splits, by their roles (train, test, perhaps validation), have no rows in common.

        Raises:
            ValueError: if they have.
        """
        options = self.options
        elsewhere = source_of(options.data, options.subset) != source_of(*self.evaluated)
        for one, other in PAIRS:
            if not {one, other} <= given.keys() or (elsewhere and one == "train"):
                continue
            if rows_in_common(given[one], getattr(options, one), given[other], getattr(options, other)):
                raise ValueError(overlap_error(options, one, other))

    def divided(self, train: Dataset, validation: Dataset, test: Dataset) -> Splits:
        """The rows of each split, converted and cut to size."""
        given = {"train": train, "validation": validation, "test": test}
        parts = {name: self._rows(data, name) for name, data in given.items()}
        for name, rows in parts.items():
            if not rows:
                raise ValueError(f"{self.options.data} has no {name} examples{self._remedy(name)}.")
        return Splits(
            parts["train"][: self.options.train_size], parts["validation"], parts["test"][: self.options.test_size]
        )

    def _remedy(self, name: str) -> str:
        if name == "validation" and self.options.validation is None:
            return ": a fifth of fewer than 5 training examples is none; give more, or name a split in task.validation"
        return f"; see task.{name}"

    def _rows(self, data: Dataset, name: str) -> list[Row]:
        """Rows of the examples that `name` (train, validation or test) has."""
        found = []
        for number, raw in enumerate(data):
            try:
                found += self.convert(raw)
            except ValueError as error:
                split = getattr(self.options, name) or self.options.train
                where = f"{self.options.data}, {name} example {number} (task.{name}={split})"
                raise ValueError(f"{where}: {error}") from None
        return found

    def prepare(self, train: Dataset) -> None:  # noqa: B027
        """Learn from the training data what rows need, such as the set of labels."""

    @abstractmethod
    def convert(self, raw: Row) -> list[Row]:
        """The task's rows of one row of the data, usually one."""

    @abstractmethod
    def model_class(self, config: PretrainedConfig) -> type:
        """The Auto class of a model for this task."""

    def model_options(self) -> dict[str, Any]:
        """Options of that model's config."""
        if not self.labels:
            return {}
        names = dict(enumerate(self.labels))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}

    @abstractmethod
    def encode(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, training: bool) -> list[Features]:
        """Rows as what the model reads; to be trained on, or to be answered."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collate:
        """What makes a batch of encoded rows."""

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """What is kept of a batch's logits: the most probable label, int64 of the logits' shape but the last."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1)

    def answers(
        self, rows: list[Row], features: list[Features], predictions: np.ndarray, tokenizer: PreTrainedTokenizerBase
    ) -> list[Any]:
        """Predictions in the task's own terms, one a row."""
        return predictions.tolist()

    @abstractmethod
    def metrics(self, rows: list[Row], answers: list[Any]) -> dict[str, float]:
        """Figures by name; the first is the one to choose by, and larger is better."""
