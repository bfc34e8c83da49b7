"""A label for a text or for a pair of texts."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from ..metrics import accuracy, macro_f1
from .base import Collate, Features, Row, Task
from .data import named, pick, text_of


TEXT_COLUMNS = ("sentence", "question")
LABEL_COLUMNS = ("label_text", "label_coarse", "coarse_label")


class Classification(Task):
    """Rows: text, label (a string) and, where task.columns names it, second."""

    task_type = "SEQ_CLS"

    def prepare(self, train: Dataset) -> None:
        name = self.options.columns.get("label", "label")
        column = next((c for c in (name, *LABEL_COLUMNS) if c in train.column_names), name)
        feature = train.features.get(column)
        self._names: list[str] | None = feature.names if isinstance(feature, ClassLabel) else None
        given = train[column] if column in train.column_names else []
        # What is null or a list is told of when its row is read.
        values = range(len(self._names)) if self._names else {v for v in given if isinstance(v, str | int | float)}
        self.labels = [self._label(value) for value in sorted(values)]

    def _label(self, value: Any) -> str:
        if not isinstance(value, str | int | float):
            raise ValueError(f"a label must be text or a number, not {str(value)[:40]}; see task.columns.")
        return named(value, self._names) if self._names else str(value)

    def convert(self, raw: Row) -> list[Row]:
        columns = self.options.columns
        row = {
            "text": text_of(pick(raw, "text", columns, TEXT_COLUMNS), "text"),
            "label": self._label(pick(raw, "label", columns, LABEL_COLUMNS)),
        }
        if row["label"] not in self.labels:
            raise ValueError(f"the label {row['label']!r} is not among those of the training data, {self.labels}.")
        return [row | ({"second": text_of(pick(raw, "second", columns), "second")} if "second" in columns else {})]

    def model_class(self, config: PretrainedConfig) -> type:
        return AutoModelForSequenceClassification

    def encode(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, training: bool) -> list[Features]:
        texts = [row["text"] for row in rows]
        seconds = [row["second"] for row in rows] if rows and "second" in rows[0] else None
        encoded = tokenizer(texts, seconds, truncation=True, max_length=self.options.max_length)
        numbers = {label: i for i, label in enumerate(self.labels)}
        return [
            {name: encoded[name][i] for name in encoded} | {"labels": numbers[row["label"]]}
            for i, row in enumerate(rows)
        ]

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collate:
        return DataCollatorWithPadding(tokenizer)

    def answers(
        self, rows: list[Row], features: list[Features], predictions: np.ndarray, tokenizer: PreTrainedTokenizerBase
    ) -> list[Any]:
        return [self.labels[i] for i in predictions.tolist()]

    def metrics(self, rows: list[Row], answers: list[Any]) -> dict[str, float]:
        references = [row["label"] for row in rows]
        return {"accuracy": accuracy(answers, references), "macro_f1": macro_f1(answers, references)}
