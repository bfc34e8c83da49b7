"""Masked words: an encoder's own task, and the probe of what is left of it (second paper, Section 4).

The probe is this task with the head made anew (`model.fresh`) and trained alone (`method.name=head_only`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from ..metrics import accuracy
from .base import IGNORED, Collate, Features, Row, Task
from .data import pick, text_of


class MaskedWords(Task):
    """Rows: text; empty lines are left out."""

    task_type = None

    def convert(self, raw: Row) -> list[Row]:
        text = text_of(pick(raw, "text", self.options.columns), "text").strip()
        return [{"text": text}] if text else []

    def model_class(self, config: PretrainedConfig) -> type:
        return AutoModelForMaskedLM

    def encode(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, training: bool) -> list[Features]:
        encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=self.options.max_length)
        features: list[Features] = [{"input_ids": ids} for ids in encoded["input_ids"]]
        if training:
            return features
        # Judged on the same masked words every time.
        masking = self._masking(tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.data_seed)
            for feature in features:
                masked = masking([feature])
                feature |= {name: masked[name][0].tolist() for name in ("input_ids", "labels")}
        return features

    def _masking(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForLanguageModeling:
        return DataCollatorForLanguageModeling(tokenizer, mlm_probability=self.options.mask_probability)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collate:
        masking, padding = self._masking(tokenizer), DataCollatorForTokenClassification(tokenizer)
        return lambda features: padding(features) if "labels" in features[0] else masking(features)

    def answers(
        self, rows: list[Row], features: list[Features], predictions: np.ndarray, tokenizer: PreTrainedTokenizerBase
    ) -> list[Any]:
        # Pairs of what was said and what stood there, for each masked word of a text.
        return [
            [(said, was) for said, was in zip(numbers, feature["labels"], strict=False) if was != IGNORED]
            for numbers, feature in zip(predictions.tolist(), features, strict=True)
        ]

    def metrics(self, rows: list[Row], answers: list[Any]) -> dict[str, float]:
        pairs = [pair for answer in answers for pair in answer]
        if not pairs:
            raise ValueError("no word was masked; give more texts, or a higher task.mask_probability.")
        return {"precision_at_1": accuracy([said for said, _ in pairs], [was for _, was in pairs])}
