"""SuperGLUE: eight tasks as text, mixed in proportion to their sizes (first paper, Appendix G).

The wording is T5's. Where that asks for the referent of a pronoun (WSC), here both are marked and the answer is True or
False, so that every example can be trained on. Rows are read as SuperGLUE's own files and as the hub have them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from ..metrics import (
    accuracy,
    answer_f1,
    answer_match,
    binary_f1,
    grouped_match,
    macro_f1,
    normalise_squad,
    superglue_average,
)
from .base import Row, Splits
from .data import find_folder, load_rows, named
from .generation import Generation, fill


PARTS = ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC")
HUB = {"WSC": "wsc.fixed"}
CB_LABELS = ("entailment", "contradiction", "neutral")
RTE_LABELS = ("entailment", "not_entailment")


class SuperGLUE(Generation):
    """Rows as of generation, with part and, for MultiRC, group (the question that an answer belongs to)."""

    prompt = "{text}\n"

    def load(self) -> Splits:
        """Each part is divided by itself; then the parts are put together."""
        options = self.options
        names = options.parts or list(PARTS)
        for name in names:
            if name not in PARTS:
                raise ValueError(f"task.parts names {name!r}; SuperGLUE's tasks are {', '.join(PARTS)}.")
        divided = [self._load_part(name) for name in names]
        if not any(splits.validation for splits in divided):
            raise ValueError(f"{options.data} has no validation examples{self._remedy('validation')}.")
        # The mix in proportion: all examples of all tasks in one random order.
        train = Dataset.from_list([row for splits in divided for row in splits.train]).shuffle(seed=options.data_seed)
        return Splits(
            self.short(list(train)[: options.train_size]),
            [row for splits in divided for row in splits.validation],
            [row for splits in divided for row in splits.test],
        )

    def _load_part(self, name: str) -> Splits:
        options = self.options
        given = {
            "train": self._data(name, options.data, options.train).shuffle(seed=options.data_seed),
            "test": self._data(name, self.evaluated[0], options.test),
        }
        if options.validation is not None:
            given["validation"] = self._data(name, self.evaluated[0], options.validation)
        self.check_apart(given)
        rows = {role: self._read(name, getattr(options, role), data) for role, data in given.items()}
        test = rows["test"][: options.test_size]
        if options.validation is None:
            return Splits(*_cut(rows["train"], self.held_out(len(rows["train"]))), test)
        return Splits(rows["train"], rows["validation"][: options.validation_size], test)

    def _read(self, name: str, split: str, data: Dataset) -> list[Row]:
        found = []
        for i, raw in enumerate(data):
            try:
                found += self.rows_of(name, raw, i)
            except KeyError as error:
                raise ValueError(f"{name}, row {i} of the split {split} has no {error}.") from None
            except (ValueError, TypeError) as error:
                raise ValueError(f"{name}, row {i} of the split {split}: {error}") from None
        if not found:
            raise ValueError(f"{name} has no examples in the split {split}; name the other tasks in task.parts.")
        return found

    def _data(self, name: str, data: str, split: str) -> Dataset:
        # The hub's names of the tasks are in small letters; of WSC it has one with its spans put right, T5's.
        subset = name if find_folder(f"{data}/{name}") else HUB.get(name, name.lower())
        try:
            return load_rows(data, split, subset)
        except ValueError as error:
            raise ValueError(f"{name}: {error} To leave it out, name the others in task.parts.") from None

    def convert(self, raw: Row) -> list[Row]:
        raise AssertionError("rows are made by part")

    def rows_of(self, part: str, raw: Row, index: int) -> list[Row]:
        """The examples of one row of a task's data, as text."""
        template = self.options.prompt or self.prompt
        rows = READERS[part](raw, index)
        return [{"group": "", **row, "part": part, "input": fill(template, {"text": row["input"]})} for row in rows]

    def metrics(self, rows: list[Row], answers: list[Any]) -> dict[str, float]:
        scores: dict[str, dict[str, float]] = {}
        for part in PARTS:
            chosen = [(row, answer) for row, answer in zip(rows, answers, strict=True) if row["part"] == part]
            if chosen:
                scores[part] = part_scores(part, [row for row, _ in chosen], [answer for _, answer in chosen])
        figures = {f"{part}/{name}": value for part, found in scores.items() for name, value in found.items()}
        return {"average": superglue_average(scores), **figures}


def _cut(rows: list[Row], size: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and some `size` of the last ones held out; a paragraph of MultiRC or ReCoRD is on one side."""
    origins = [_origin(row, i) for i, row in enumerate(rows)]
    counts, held_out, so_far = Counter(origins), set(), 0
    for origin in reversed(origins):
        if so_far < size and origin not in held_out:
            held_out.add(origin)
            so_far += counts[origin]
    sides: tuple[list[Row], list[Row]] = [], []
    for row, origin in zip(rows, origins, strict=True):
        sides[origin in held_out].append(row)
    return sides


def _origin(row: Row, index: int) -> Any:
    """What the rows of one paragraph share."""
    return row["group"].rpartition("-")[0] or index


def part_scores(part: str, rows: list[Row], answers: list[str]) -> dict[str, float]:
    """A task's own scores.

    Accuracy; for CB also macro F1; for MultiRC F1 over answers and exact match over questions; for ReCoRD token F1 and
    exact match.
    """
    targets = [row["references"][0] for row in rows]
    if part == "MultiRC":
        exact = grouped_match(answers, targets, [row["group"] for row in rows])
        return {"f1": binary_f1(answers, targets, "True"), "exact_match": exact}
    if part == "ReCoRD":
        accepted = [row["references"] for row in rows]
        return {
            "f1": answer_f1(answers, accepted, normalise_squad),
            "exact_match": answer_match(answers, accepted, normalise_squad),
        }
    found = {"accuracy": accuracy(answers, targets)}
    return found | ({"f1": macro_f1(answers, targets)} if part == "CB" else {})


def _example(text: str, target: str, **more: Any) -> Row:
    return {"input": text, "target": target, "references": [target], **more}


def _named(value: Any, names: tuple[str, ...]) -> str:
    return named(value, names) if isinstance(value, int) else str(value)


def _truth(value: Any) -> str:
    return named(int(value), ("False", "True"))


def _boolq(raw: Row, index: int) -> list[Row]:
    return [_example(f"boolq question: {raw['question']} passage: {raw['passage']}", _truth(raw["label"]))]


def _cb(raw: Row, index: int) -> list[Row]:
    text = f"cb hypothesis: {raw['hypothesis']} premise: {raw['premise']}"
    return [_example(text, _named(raw["label"], CB_LABELS))]


def _copa(raw: Row, index: int) -> list[Row]:
    text = f"copa choice1: {raw['choice1']} choice2: {raw['choice2']} premise: {raw['premise']} question: {raw['question']}"
    return [_example(text, named(raw["label"], ("choice1", "choice2")))]


def _multirc(raw: Row, index: int) -> list[Row]:
    if "paragraph" in raw:  # the hub's: an answer a row
        group = f"{raw['idx']['paragraph']}-{raw['idx']['question']}"
        found = [(raw["paragraph"], raw["question"], raw["answer"], raw["label"], group)]
    else:
        passage = raw["passage"]
        found = [
            (passage["text"], question["question"], answer["text"], answer["label"], f"{index}-{i}")
            for i, question in enumerate(passage["questions"])
            for answer in question["answers"]
        ]
    return [
        _example(f"multirc question: {question} answer: {answer} paragraph: {text}", _truth(label), group=group)
        for text, question, answer, label, group in found
    ]


def _record(raw: Row, index: int) -> list[Row]:
    if "query" in raw:  # the hub's: a query a row
        index = raw["idx"]["passage"]
        text, queries = raw["passage"], [(raw["query"], list(raw["answers"]))]
        entities = list(raw["entities"])
    else:
        text = raw["passage"]["text"]
        # Ends are inclusive.
        entities = [text[entity["start"] : entity["end"] + 1] for entity in raw["passage"]["entities"]]
        queries = [(qa["query"], [answer["text"] for answer in qa["answers"]]) for qa in raw["qas"]]
    entities = list(dict.fromkeys(entities))
    text = text.replace("@highlight", "")
    return [
        _example(f"record query: {query} entities: {', '.join(entities)} passage: {text}", answers[0])
        | {"references": list(dict.fromkeys(answers)), "group": f"{index}-{i}"}
        for i, (query, answers) in enumerate(queries)
        if answers
    ]


def _rte(raw: Row, index: int) -> list[Row]:
    text = f"rte hypothesis: {raw['hypothesis']} premise: {raw['premise']}"
    return [_example(text, _named(raw["label"], RTE_LABELS))]


def _wic(raw: Row, index: int) -> list[Row]:
    text = f"wic sentence1: {raw['sentence1']} sentence2: {raw['sentence2']} word: {raw['word']}"
    return [_example(text, _truth(raw["label"]))]


def _wsc(raw: Row, index: int) -> list[Row]:
    spans = raw.get("target", raw)
    words = raw["text"].split()
    for number, mark in ((1, "*"), (2, "#")):
        start = spans[f"span{number}_index"]
        end = start + len(str(spans[f"span{number}_text"]).split()) - 1
        words[start] = f"{mark}{words[start]}"
        words[min(end, len(words) - 1)] += mark
    return [_example(f"wsc: {' '.join(words)}", _truth(raw["label"]))]


READERS: dict[str, Callable[[Row, int], list[Row]]] = {
    "BoolQ": _boolq,
    "CB": _cb,
    "COPA": _copa,
    "MultiRC": _multirc,
    "ReCoRD": _record,
    "RTE": _rte,
    "WiC": _wic,
    "WSC": _wsc,
}
