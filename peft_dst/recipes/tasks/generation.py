"""Answers in words, by a model of sequences to sequences or by a causal one."""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from ..metrics import answer_f1, answer_match, bleu, number_match, stated_match
from ..options import TaskOptions
from .base import IGNORED, Collate, Features, Row, Splits, Task
from .data import pick, text_of


_BRACES = re.compile(r"\{(\w+)\}")


def fill(template: str, values: Row) -> str:
    """A template with its names in braces replaced; nothing of a format string's power, so that data stays data.

    Raises:
        ValueError: for a name that has no value.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"task.prompt names {match[0]}, but the task's rows have {', '.join(values)}.")
        return str(values[match[1]])

    return _BRACES.sub(value, template)


class Generation(Task):
    """Rows: input, target (what is trained on), references (what an answer is compared with)."""

    generates = True
    prompt: ClassVar[str]

    def __init__(self, options: TaskOptions) -> None:
        super().__init__(options)
        self.task_type = "SEQ_2_SEQ_LM"

    @property
    def encoder_decoder(self) -> bool:
        return self.task_type == "SEQ_2_SEQ_LM"

    def row(self, values: Row, target: str, references: list[str]) -> Row:
        for name, value in {**values, "target": target}.items():
            text_of(value, name)
        return {"input": fill(self.options.prompt or self.prompt, values), "target": target, "references": references}

    def divided(self, train: Dataset, validation: Dataset, test: Dataset) -> Splits:
        splits = super().divided(train, validation, test)
        return replace(splits, train=self.short(splits.train))

    def short(self, rows: list[Row]) -> list[Row]:
        """The rows of no more than task.max_characters.

        Raises:
            ValueError: if there are none.
        """
        most = self.options.max_characters
        if most is None:
            return rows
        found = [row for row in rows if len(row["input"]) + len(row["target"]) <= most]
        if not found:
            raise ValueError(f"no training example has {most} characters or fewer; raise task.max_characters.")
        return found

    def model_class(self, config: PretrainedConfig) -> type:
        writes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
        if not writes and type(config) in MODEL_FOR_MASKED_LM_MAPPING:
            raise ValueError(
                f"task.name={self.options.name} needs a model that writes, causal or with encoder and decoder; "
                f"{type(config).__name__} is an encoder's. Set model.name to another."
            )
        self.task_type = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
        return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM

    def encode(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, training: bool) -> list[Features]:
        inputs = self._inputs(rows, tokenizer)
        if not training:
            return [{"input_ids": ids} for ids in inputs]
        # What is cut off has no end to learn.
        most = self.options.max_target_length
        if self.encoder_decoder:
            targets = tokenizer(text_target=[row["target"] for row in rows])["input_ids"]
            return [{"input_ids": ids, "labels": target[:most]} for ids, target in zip(inputs, targets, strict=True)]
        targets = tokenizer([row["target"] for row in rows], add_special_tokens=False)["input_ids"]
        # A causal model reads its input, and is trained on the target and on where it ends.
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        targets = [target[:most] if len(target) > most else target + end for target in targets]
        learned = self.options.train_inputs
        return [
            {"input_ids": ids + target, "labels": (ids if learned else [IGNORED] * len(ids)) + target}
            for ids, target in zip(inputs, targets, strict=True)
        ]

    def _inputs(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        side = tokenizer.truncation_side
        if not self.encoder_decoder:
            # A causal model goes on from the end, which asks for the answer.
            tokenizer.truncation_side = "left"
        try:
            inputs = [row["input"] for row in rows]
            return tokenizer(inputs, truncation=True, max_length=self.options.max_length)["input_ids"]
        finally:
            tokenizer.truncation_side = side

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collate:
        padding = tokenizer.pad_token_id
        if padding is None:
            raise ValueError(
                "the tokenizer has neither a padding nor an end token; set model.tokenizer to one that has."
            )

        def collate(features: list[Features]) -> dict[str, torch.Tensor]:
            # What a causal model shall continue stands at the right edge.
            left = not self.encoder_decoder and "labels" not in features[0]
            ids = [torch.tensor(feature["input_ids"]) for feature in features]
            side = "left" if left else "right"
            batch = {
                "input_ids": pad_sequence(ids, True, padding, side),
                "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], True, 0, side),
            }
            if "labels" in features[0]:
                labels = [torch.tensor(feature["labels"]) for feature in features]
                batch["labels"] = pad_sequence(labels, True, IGNORED)
            return batch

        return collate

    def answers(
        self, rows: list[Row], features: list[Features], predictions: np.ndarray, tokenizer: PreTrainedTokenizerBase
    ) -> list[Any]:
        tokens = np.where(predictions == IGNORED, tokenizer.pad_token_id, predictions)
        return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    @abstractmethod
    def metrics(self, rows: list[Row], answers: list[Any]) -> dict[str, float]: ...


class Translation(Generation):
    """Columns: source, target, and a second reference where the data has one (first paper: German to English)."""

    prompt = "translate German to English: {source}\n"

    def convert(self, raw: Row) -> list[Row]:
        columns = self.options.columns
        source = pick(raw, "source", columns, ("translation.de", "de"))
        target = pick(raw, "target", columns, ("translation.en", "en"))
        second = raw.get(columns.get("second_reference", "en_ref_B"))
        return [self.row({"source": source}, target, [target, *([second] if second else [])])]

    def metrics(self, rows: list[Row], answers: list[Any]) -> dict[str, float]:
        return {"bleu": bleu(answers, [row["references"] for row in rows])}


class QuestionAnswering(Generation):
    """Closed book: a question, and the answers that are accepted, of which the first is trained on."""

    prompt = "question: {question} answer:"

    def convert(self, raw: Row) -> list[Row]:
        columns = self.options.columns
        question = pick(raw, "question", columns)
        answers = pick(raw, "answers", columns, ("answer.aliases", "answer"))
        answers = [answers] if isinstance(answers, str) else list(answers)
        if not answers:
            return []
        value = raw.get("answer")
        # TriviaQA on the hub names one of the aliases as the answer.
        target = value["value"] if isinstance(value, dict) and value.get("value") else answers[0]
        return [self.row({"question": question}, target, [*answers, target])]

    def metrics(self, rows: list[Row], answers: list[Any]) -> dict[str, float]:
        references = [row["references"] for row in rows]
        return {"exact_match": answer_match(answers, references), "f1": answer_f1(answers, references)}


class Maths(Generation):
    """GSM8K: a chain of thought that ends in `#### number`; MetaMathQA's ends in `The answer is: number`."""

    prompt = "question: {question}\nanswer: "

    def convert(self, raw: Row) -> list[Row]:
        question = pick(raw, "question", self.options.columns, ("query",))
        answer = pick(raw, "answer", self.options.columns, ("response",))
        return [self.row({"question": question}, answer, [answer])]

    def metrics(self, rows: list[Row], answers: list[Any]) -> dict[str, float]:
        references = [row["references"][0] for row in rows]
        return {"accuracy": number_match(answers, references), "stated": stated_match(answers, references)}
