"""A label for every word: named entities. A word's first token carries its label, the others none."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import (
    AutoModelForTokenClassification,
    BatchEncoding,
    DataCollatorForTokenClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from ..metrics import accuracy, span_scores
from .base import IGNORED, Collate, Features, Row, Task
from .data import named, pick, text_of


TAG_COLUMNS = ("ner_tags",)
OUTSIDE = "O"
# seqeval's schemes: IOB, IOBES, …
_ENTITY = re.compile(r"[A-Z]-.+", re.DOTALL)


class Tagging(Task):
    """Rows: words, tags (strings B-…, I-…, O)."""

    task_type = "TOKEN_CLS"

    def prepare(self, train: Dataset) -> None:
        column = self.options.columns.get("tags", next((c for c in TAG_COLUMNS if c in train.column_names), "tags"))
        feature = train.features.get(column)
        # A list of labels; its older name is Sequence.
        inner = getattr(feature, "feature", None)
        self._names: list[str] | None = inner.names if isinstance(inner, ClassLabel) else None
        rows = train[column] if column in train.column_names else []
        # What is no text is told of when its row is read.
        found = {tag for tags in rows for tag in tags or () if isinstance(tag, str)}
        self.labels = self._names or sorted({OUTSIDE} | found)

    def convert(self, raw: Row) -> list[Row]:
        words = pick(raw, "words", self.options.columns, ("tokens",))
        tags = pick(raw, "tags", self.options.columns, TAG_COLUMNS)
        if len(words) != len(tags):
            raise ValueError(f"there are {len(words)} words and {len(tags)} tags.")
        # An entity that only the test set has is one that is never found.
        named_tags = [named(tag, self._names) if self._names else text_of(tag, "tags") for tag in tags]
        for tag in named_tags:
            if tag != OUTSIDE and not _ENTITY.fullmatch(tag):
                raise ValueError(f"the tag {tag!r} is neither O nor one like B-PER or I-PER.")
        return [{"words": list(words), "tags": named_tags}]

    def model_class(self, config: PretrainedConfig) -> type:
        return AutoModelForTokenClassification

    def encode(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, training: bool) -> list[Features]:
        if not tokenizer.is_fast:
            raise ValueError(
                "tagging needs a fast tokenizer, which knows the tokens of each word; set model.tokenizer."
            )
        _put_spaces_before_words(tokenizer)
        numbers = {label: i for i, label in enumerate(self.labels)}
        unknown = IGNORED if training else numbers[OUTSIDE]
        encoded = self._tokens(rows, tokenizer)
        features = []
        for i, row in enumerate(rows):
            labels = [IGNORED] * len(encoded["input_ids"][i])
            for word, token in _first_tokens(encoded.word_ids(i)).items():
                labels[token] = numbers.get(row["tags"][word], unknown)
            features.append({name: encoded[name][i] for name in encoded} | {"labels": labels})
        return features

    def _tokens(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
        words = [row["words"] for row in rows]
        return tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.options.max_length)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collate:
        return DataCollatorForTokenClassification(tokenizer)

    def answers(
        self, rows: list[Row], features: list[Features], predictions: np.ndarray, tokenizer: PreTrainedTokenizerBase
    ) -> list[Any]:
        encoded = self._tokens(rows, tokenizer)
        found = []
        for i, (row, numbers) in enumerate(zip(rows, predictions.tolist(), strict=True)):
            # Words that were cut off, or have no token (a lone variation selector), have no entity.
            answer = [OUTSIDE] * len(row["words"])
            for word, token in _first_tokens(encoded.word_ids(i)).items():
                answer[word] = self.labels[numbers[token]]
            found.append(answer)
        return found

    def metrics(self, rows: list[Row], answers: list[Any]) -> dict[str, float]:
        references = [row["tags"] for row in rows]
        flat = [tag for tags in answers for tag in tags], [tag for tags in references for tag in tags]
        return {**span_scores(answers, references), "accuracy": accuracy(*flat)}


def _put_spaces_before_words(tokenizer: Any) -> None:
    """Have a byte-level tokenizer read each word as it does in the middle of a text, where a space stands before it.

    The tokenizer's own `add_prefix_space` is looked at when it is made, and by nothing afterwards.
    """
    if (split := tokenizer.backend_tokenizer.pre_tokenizer) is not None:
        split.__setstate__(re.sub(rb'("add_prefix_space": ?)false', rb"\1true", split.__getstate__()))
        tokenizer.backend_tokenizer.pre_tokenizer = split


def _first_tokens(words: list[int | None]) -> dict[int, int]:
    """Each word's first token, from the word of each token."""
    first: dict[int, int] = {}
    for token, word in enumerate(words):
        if word is not None:
            first.setdefault(word, token)
    return first
