"""Every kind of task on toy data: what is read, what a model sees, and a run from end to end on tiny models."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, RobertaTokenizer

from peft_dst.recipes import evaluate, make_recipe, train
from peft_dst.recipes.lab import Lab
from peft_dst.recipes.options import TaskOptions
from peft_dst.recipes.tasks import data, first_rows, load_rows, make_task
from peft_dst.recipes.tasks.generation import fill
from peft_dst.recipes.tasks.superglue import READERS
from tests import toys


SHORT = {"max_steps": 3, "batch_size": 4, "evaluation_batch_size": 3}
EVALUATION = {"max_new_tokens": 5, "predictions": True}


def recipe(tmp_path, kind, task, **more):
    name = str(toys.model(tmp_path / kind, kind))
    task = {"data": str(tmp_path / "data"), "max_length": 24, "max_target_length": 8, **task}
    method = {"name": "dynamic", "epsilon": 0.02}
    return make_recipe({"model": {"name": name}, "task": task, "training": SHORT, "method": method, **more})


GENERATIONS = {
    "translation": ([{"de": "die katze", "en": "the cat"}, {"de": "der hund", "en": "the dog"}] * 6, "bleu"),
    "question_answering": ([{"question": "where is anna", "answers": ["in paris", "paris"]}] * 12, "exact_match"),
    "maths": ([{"question": "1 and 2", "answer": "one and two\n#### 3"}] * 12, "accuracy"),
}


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
@pytest.mark.parametrize("name", GENERATIONS)
def test_generation(name, kind, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    rows, metric = GENERATIONS[name]
    toys.write_rows(tmp_path / "data", train=rows, test=rows[:4])
    made = recipe(tmp_path, kind, {"name": name}, evaluation=EVALUATION | {"beams": 4 if name == "translation" else 1})
    with caplog.at_level("WARNING", "transformers"):
        record = train(made, tmp_path / "run")
    assert not [entry.message for entry in caplog.records if entry.name.startswith("transformers.generation")]
    assert next(iter(record["metrics"]["test"])) == metric
    assert len((tmp_path / "run" / "predictions_test.jsonl").read_text().splitlines()) == 4
    assert evaluate(tmp_path / "run")["test"] == record["metrics"]["test"]


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_generation_learns_to_answer(kind, tmp_path):
    """Two questions by heart: whatever is in a batch beside them, and however long their inputs are."""
    rows = [
        {"question": "who is red", "answers": ["the cat"]},
        {"question": "where is the green house of anna and paul", "answers": ["in paris"]},
    ] * 8
    toys.write_rows(tmp_path / "data", train=rows, test=rows[:4])
    made = recipe(
        tmp_path, kind, {"name": "question_answering"}, evaluation=EVALUATION | {"splits": ["test"]},
        training=SHORT | {"max_steps": 60, "batch_size": 8, "learning_rate": 3e-2, "warmup": 0}, method={"name": "full"},
    )  # fmt: skip
    assert train(made, tmp_path / "run")["metrics"]["test"] == {"exact_match": 1.0, "f1": 1.0}


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_what_a_generating_model_sees(kind, tmp_path):
    rows = [
        {"question": "who is red", "answers": ["the cat"]},
        {"question": "where is anna now", "answers": ["paris"]},
    ] * 6
    toys.write_rows(tmp_path / "data", train=rows, test=rows[:2])
    lab = Lab(
        recipe(tmp_path, kind, {"name": "question_answering", "prompt": "question: {question} answer:"}), tmp_path
    )
    lab.bare()
    train_batch = lab.collate(lab.train_features[:2])
    read, target = (
        lab.tokenizer.batch_decode(t.where(t >= 0, 0)) for t in (train_batch["input_ids"], train_batch["labels"])
    )
    rows = lab.rows.train[:2]
    for row, inputs, answer in zip(rows, read, target, strict=True):
        whole = f"{row['input']} </s>" if kind == "t5" else f"{row['input']} {row['target']} </s>"
        assert inputs.replace("<pad>", "").strip() == whole.replace("now", "<unk>")
        assert answer.replace("<pad>", "").split() == [*row["target"].split(), "</s>"]
    batch = lab.collate(lab.task.encode(lab.rows.test, lab.tokenizer, training=False))
    assert batch.keys() == {"input_ids", "attention_mask"}
    # The shorter one is padded: at the left, where a causal model goes on at the right.
    assert batch["attention_mask"][0, 0 if kind == "llama" else -1] == 0
    assert batch["attention_mask"][1].all()


def test_tagging(tmp_path):
    tags = ["B-LOC", "O", "B-PER", "I-PER"]
    rows = [{"tokens": ["paris", "is", "anna", "paul"], "ner_tags": tags}] * 16
    toys.write_rows(tmp_path / "data", train=rows, test=rows[:4])
    training = SHORT | {"max_steps": 40, "learning_rate": 1e-2, "head_learning_rate": 1e-2}
    made = recipe(tmp_path, "bert", {"name": "tagging"}, training=training, method={"name": "full"})
    record = train(made, tmp_path / "run")
    assert record["metrics"]["test"] == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "accuracy": 1.0}
    assert evaluate(tmp_path / "run")["test"] == record["metrics"]["test"]


def test_only_the_first_token_of_a_word_is_tagged(minilm):
    task = make_task(TaskOptions(name="tagging", data="", max_length=8))
    train = Dataset.from_list([{"tokens": ["Unbelievably", "Sonmarg"], "ner_tags": ["O", "B-LOC"]}])
    task.prepare(train)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    row = {
        "words": ["Sonmarg", "is", "nice", "and", "far", "away", "Sonmarg"],
        "tags": ["B-LOC"] + ["O"] * 5 + ["B-LOC"],
    }
    (feature,) = task.encode([row], tokenizer, training=True)
    pieces = tokenizer.convert_ids_to_tokens(feature["input_ids"])
    labelled = [piece for piece, label in zip(pieces, feature["labels"], strict=True) if label != -100]
    assert labelled == [p for p in pieces if not p.startswith(("##", "["))]
    # What was cut off counts as not found.
    (answer,) = task.answers([row], [feature], np.array([feature["labels"]]), tokenizer)
    assert answer[0] == "B-LOC"
    assert len(answer) == 7
    assert answer[-1] == "O"
    assert task.metrics([row], [answer])["recall"] == 0.5


def test_a_word_without_tokens_moves_no_other_tag(minilm):
    """A lone variation selector, as tweets have it."""
    task = make_task(TaskOptions(name="tagging", data=""))
    rows = [{"words": ["the", "\ufe0f", "Sonmarg", "Anna"], "tags": ["O", "O", "B-LOC", "B-PER"]}]
    task.prepare(Dataset.from_list([{"tokens": row["words"], "ner_tags": row["tags"]} for row in rows]))
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    features = task.encode(rows, tokenizer, training=False)
    predictions = np.array([features[0]["labels"]])
    assert task.answers(rows, features, predictions, tokenizer) == [rows[0]["tags"]]


def test_byte_level_tokenizers_read_words_as_in_the_middle_of_a_text():
    """RoBERTa's: without a space in front "cat" is another word than in "the cat"."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary = letters | {
        token: len(letters) + i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    }
    tokenizer = RobertaTokenizer(vocab=vocabulary, merges=[])
    task = make_task(TaskOptions(name="tagging", data=""))
    row = {"words": ["the", "cat"], "tags": ["O", "B-PER"]}
    task.prepare(Dataset.from_list([{"tokens": row["words"], "ner_tags": row["tags"]}]))
    (feature,) = task.encode([row], tokenizer, training=True)
    pieces = tokenizer.convert_ids_to_tokens(feature["input_ids"])
    assert "".join(pieces) == "<s>ĠtheĠcat</s>"
    assert [piece for piece, label in zip(pieces, feature["labels"], strict=True) if label != -100] == ["Ġ", "Ġ"]


def test_masked_words(tmp_path):
    toys.write_rows(tmp_path / "data", train=[{"text": ""}, {"text": "the red cat sleeps in the house " * 2}] * 8,
                    test=[{"text": "the green dog sleeps in the city"}, {"text": " "}] * 4)  # fmt: skip
    made = recipe(tmp_path, "bert", {"name": "masked_words"}, model={"name": str(tmp_path / "bert"), "head": ["cls"]})
    lab = Lab(made, tmp_path / "lab")
    assert len(lab.rows.test) == 4
    one, again = (lab.task.encode(lab.rows.test, lab.tokenizer, training=False) for _ in range(2))
    assert one == again, "judged on the same masked words every time"
    assert any(label != -100 for feature in one for label in feature["labels"])
    # Training masks anew.
    batches = [lab.collate(lab.train_features) for _ in range(2)] if lab.bare() else []
    assert not torch.equal(batches[0]["labels"], batches[1]["labels"])
    assert train(made, tmp_path / "run")["metrics"]["test"].keys() == {"precision_at_1"}
    # Its bias has two names, and is written down once.
    made.training.head_first.epochs = 0.5
    assert train(made, tmp_path / "head")["metrics"]["test"].keys() == {"precision_at_1"}


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_checkpoint_without_all_of_the_body_is_refused(kind, tmp_path):
    toys.write_rows(tmp_path / "data", train=toys.questions(8), test=toys.questions(4))
    name, part = {"bert": ("classification", "encoder.layer.1."), "t5": ("question_answering", "encoder.block.1.")}[
        kind
    ]
    if kind == "t5":
        rows = [{"question": "who", "answers": ["paul"]}] * 8
        toys.write_rows(tmp_path / "data", train=rows, test=rows)
    made = recipe(tmp_path, kind, {"name": name})
    file = tmp_path / kind / "model.safetensors"
    tensors = load_file(file)
    assert Lab(made, tmp_path / "lab").bare().head == {"bert": ["classifier"], "t5": []}[kind]
    save_file({key: tensor for key, tensor in tensors.items() if not key.startswith(part)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"have no '.*{re.escape(part)}.*such tensors\), which is part of the body"):
        Lab(made, tmp_path / "lab").bare()
    # A pooler may be missing: many a checkpoint has none.
    if kind == "bert":
        save_file({key: tensor for key, tensor in tensors.items() if "pooler" not in key}, file, {"format": "pt"})
        assert Lab(made, tmp_path / "lab").bare().head == ["pooler", "classifier"]


def superglue(folder):
    """SuperGLUE's own files, with two or three rows each."""
    made = {
        "BoolQ": [{"question": "is it red", "passage": "the cat is red", "label": True}],
        "CB": [{"premise": "the cat sleeps", "hypothesis": "it sleeps", "label": "entailment"}],
        "COPA": [{"premise": "a", "choice1": "one", "choice2": "two", "question": "cause", "label": 1}],
        "MultiRC": [{"passage": {"text": "the cat", "questions": [
            {"question": "who", "answers": [{"text": "cat", "label": 1}, {"text": "dog", "label": 0}]}]}}],
        "ReCoRD": [{"passage": {"text": "Anna saw Paul\n@highlight\nred", "entities": [{"start": 0, "end": 3},
            {"start": 9, "end": 12}]}, "qas": [{"query": "@placeholder was seen", "answers": [{"text": "Paul"}]}]}],
        "RTE": [{"premise": "a", "hypothesis": "b", "label": "not_entailment"}],
        "WiC": [{"word": "cat", "sentence1": "a cat", "sentence2": "the cat", "label": False}],
        "WSC": [{"text": "Mark told Pete Smith lies, he was red", "label": False,
                 "target": {"span1_index": 2, "span1_text": "Pete Smith", "span2_index": 5, "span2_text": "he"}}],
    }  # fmt: skip
    for part, rows in made.items():
        toys.write_rows(folder / part, train=rows * 6, validation=rows * 2)
    return made


def test_superglue(tmp_path):
    superglue(tmp_path / "data")
    task = {"name": "superglue", "test": "validation", "validation_size": 1}
    made = recipe(tmp_path, "t5", task, evaluation=EVALUATION)
    lab = Lab(made, tmp_path / "lab")
    assert {row["input"] for row in lab.rows.test if row["part"] == "RTE"} == {"rte hypothesis: b premise: a\n"}
    parts = [row["part"] for row in lab.rows.train]
    # In proportion: all there is, in one order; of each part something is held out, of MultiRC a paragraph of two answers.
    assert {part: parts.count(part) for part in READERS} == {part: 10 if part == "MultiRC" else 5 for part in READERS}
    assert parts != sorted(parts)
    record = train(made, tmp_path / "run")
    names = {name.partition("/")[0] for name in record["metrics"]["test"]}
    assert names == {"average", *READERS}
    two = recipe(tmp_path, "t5", task | {"parts": ["CB", "COPA"]}, evaluation=EVALUATION)
    assert {row["part"] for row in Lab(two, tmp_path / "lab").rows.train} == {"CB", "COPA"}
    (tmp_path / "data" / "WiC" / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"WiC: .*WiC has no train\.jsonl; .*task\.parts"):
        Lab(made, tmp_path / "lab")


def test_superglues_wording(tmp_path):
    made = superglue(tmp_path)
    found = {part: [(r["input"], r["target"]) for r in READERS[part](rows[0], 0)] for part, rows in made.items()}
    assert found == {
        "BoolQ": [("boolq question: is it red passage: the cat is red", "True")],
        "CB": [("cb hypothesis: it sleeps premise: the cat sleeps", "entailment")],
        "COPA": [("copa choice1: one choice2: two premise: a question: cause", "choice2")],
        "MultiRC": [
            ("multirc question: who answer: cat paragraph: the cat", "True"),
            ("multirc question: who answer: dog paragraph: the cat", "False"),
        ],
        "ReCoRD": [("record query: @placeholder was seen entities: Anna, Paul passage: Anna saw Paul\n\nred", "Paul")],
        "RTE": [("rte hypothesis: b premise: a", "not_entailment")],
        "WiC": [("wic sentence1: a cat sentence2: the cat word: cat", "False")],
        "WSC": [("wsc: Mark told *Pete Smith* lies, #he# was red", "False")],
    }


def test_the_hubs_form_of_superglue_is_the_same():
    hub = {
        "MultiRC": {"paragraph": "the cat", "question": "who", "answer": "cat", "label": 1,
                    "idx": {"paragraph": 3, "question": 1}},
        "ReCoRD": {"passage": "Anna saw Paul", "query": "q", "entities": ["Anna", "Paul"], "answers": ["Paul"],
                   "idx": {"passage": 5, "query": 9}},
        "CB": {"premise": "p", "hypothesis": "h", "label": 2},
        "RTE": {"premise": "p", "hypothesis": "h", "label": 0},
        "WSC": {"text": "he is Pete", "span1_index": 2, "span1_text": "Pete", "span2_index": 0, "span2_text": "he",
                "label": 1},
    }  # fmt: skip
    found = {part: READERS[part](row, 0)[0] for part, row in hub.items()}
    assert found["MultiRC"]["group"] == "3-1"
    assert [row["target"] for row in found.values()] == ["True", "Paul", "neutral", "entailment", "True"]
    assert found["ReCoRD"]["group"] == "5-0"
    assert found["ReCoRD"]["input"] == "record query: q entities: Anna, Paul passage: Anna saw Paul"
    assert found["WSC"]["input"] == "wsc: #he# is *Pete*"


def test_columns_of_the_hub_are_found(monkeypatch):
    """Labels as numbers with names, dotted columns, TriviaQA's nested answers; a hub id that is no folder."""
    rows = {"sentence": ["a", "b"] * 5, "label": [1, 0] * 5}
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    hub = {"glue/sst2": Dataset.from_dict(rows, features=features)}
    monkeypatch.setattr(data, "load_dataset", lambda name, subset, split: hub[f"{name}/{subset}"])
    task = make_task(TaskOptions(name="classification", data="glue", subset="sst2"))
    found = task.load()
    assert task.labels == ["bad", "good"]
    assert sorted((row["text"], row["label"]) for row in found.test[:2]) == [("a", "good"), ("b", "bad")]
    translation = make_task(TaskOptions(name="translation", data="wmt"))
    assert translation.convert({"translation": {"de": "hund", "en": "dog"}})[0]["references"] == ["dog"]
    assert translation.convert({"de": "hund", "en": "dog", "en_ref_B": "hound"})[0]["references"] == ["dog", "hound"]
    trivia = make_task(TaskOptions(name="question_answering", data="trivia_qa"))
    (row,) = trivia.convert({"question": "who", "answer": {"aliases": ["Sam", "Mark"], "value": "Mark"}})
    assert row["target"] == "Mark"
    assert set(row["references"]) == {"Sam", "Mark"}
    with pytest.raises(ValueError, match=r"'no/such' is no folder with JSON lines .* as a hub id it cannot be read"):
        load_rows("no/such", "train")


def test_only_the_first_rows_are_fetched(monkeypatch, tmp_path):
    """Of a data set of the hub; one that is not there is told as ever."""
    fetched = []

    def stream(name, split, streaming):
        assert (name, split, streaming) == ("wiki", "train", True)
        for number in range(1000):
            fetched.append(number)
            yield {"text": str(number)}

    with monkeypatch.context() as patched:
        patched.setattr(data, "load_dataset", stream)
        assert first_rows("wiki", "train", 3) == [{"text": "0"}, {"text": "1"}, {"text": "2"}]
    assert len(fetched) == 3
    toys.write_rows(tmp_path / "mine", train=toys.questions(4))
    assert len(first_rows(str(tmp_path / "mine"), "train", 9)) == 4
    assert len(first_rows(str(tmp_path / "mine"), "train", 2)) == 2
    with pytest.raises(ValueError, match=r"'no/such' is no folder with JSON lines"):
        first_rows("no/such", "train", 2)


def test_the_hubs_names_of_superglues_tasks(monkeypatch):
    asked = []
    rows = Dataset.from_list([{"premise": "a", "hypothesis": "b", "label": 0}] * 5)
    wsc = Dataset.from_list([{"text": "he is Pete", "span1_index": 2, "span1_text": "Pete", "span2_index": 0,
                              "span2_text": "he", "label": 1}] * 5)  # fmt: skip

    def load(name, subset, split):
        asked.append((name, subset))
        return wsc if subset.startswith("wsc") else rows

    monkeypatch.setattr(data, "load_dataset", load)
    make_task(TaskOptions(name="superglue", data="aps/super_glue", parts=["RTE", "WSC"], test="validation")).load()
    # Of two it is the one whose spans were put right.
    assert set(asked) == {("aps/super_glue", "rte"), ("aps/super_glue", "wsc.fixed")}


def test_folders(tmp_path, monkeypatch):
    toys.write_rows(tmp_path / "mine", train=toys.questions(10), validation=toys.questions(4))
    monkeypatch.setenv("PEFT_DST_DATA", str(tmp_path))
    assert len(load_rows("mine", "train[:30%]+validation")) == 7
    with pytest.raises(ValueError, match=r"mine has no test\.jsonl; its splits are train, validation"):
        load_rows("mine", "test")
    with pytest.raises(ValueError, match=r"no column for 'label' \(kind\).*Set task\.columns=\{label: COLUMN\}"):
        make_task(TaskOptions(name="classification", data="mine", test="validation", columns={"label": "kind"})).load()


def test_what_is_evaluated_may_come_from_elsewhere(tmp_path):
    toys.write_rows(tmp_path / "made-up", train=[{"query": "1 and 1", "response": f"#### {i}"} for i in range(10)])
    toys.write_rows(
        tmp_path / "real", dev=[{"question": "a", "answer": "#### 1"}] * 3, test=[{"question": "b", "answer": "x"}]
    )
    where = {"data": str(tmp_path / "made-up"), "evaluation_data": str(tmp_path / "real")}
    rows = make_task(TaskOptions(name="maths", validation="dev[:2]", **where)).load()
    assert (len(rows.train), len(rows.validation), rows.test[0]["target"]) == (10, 2, "x")
    rows = make_task(TaskOptions(name="maths", **where)).load()
    assert (len(rows.train), len(rows.validation), len(rows.test)) == (8, 2, 1)


@pytest.mark.parametrize(
    ("train", "test", "common"),
    [
        ("other[:16]", "other[16:]", False),
        ("other[:17]", "other[16:]", True),
        ("other[:50%]", "other[50%:]", False),
        ("other[:60%]", "other[50%:90%]", True),
        ("other[:50%]", "other[10:]", False),
        ("other[:60%]", "other[10:]", True),
        ("other[:-5]", "other[-5:]", False),
        ("other[:-5]", "other[-6:-5]", True),
        ("other[:-5]+train", "train[-2:]", True),
        ("other[:15]", "train[:15]", False),
        ("other[-5:]+train", "other[:15]", False),
    ],
)
@pytest.mark.parametrize("role", ["train", "validation"])
def test_parts_of_a_split(train, test, common, role, tmp_path):
    """No row that is tested on is trained on, or chosen by."""
    rows = [{"text": f"a {i}", "label": "b"} for i in range(20)]
    toys.write_rows(tmp_path / "data", other=rows, train=rows, third=rows)
    splits = {"train": "third", "test": test, role: train}

    def load_from(**elsewhere):
        options = TaskOptions(name="classification", data=str(tmp_path / "data"), **splits, **elsewhere)
        return make_task(options).load()

    if not common:
        load_from()
        return
    message = rf"task\.{role}={re.escape(train)} and task\.test={re.escape(test)} have examples in common"
    with pytest.raises(ValueError, match=message):
        load_from()
    # The same folder, in other words.
    with pytest.raises(ValueError, match=message):
        load_from(evaluation_data=str(tmp_path / "data" / ".." / "data"))
    toys.write_rows(tmp_path / "more", other=rows, train=rows, third=rows)
    if role == "train":
        load_from(evaluation_data=str(tmp_path / "more"))


def test_what_is_chosen_by_is_not_trained_on(tmp_path):
    rows = [{"text": f"a {i}", "label": "b"} for i in range(20)]
    toys.write_rows(tmp_path / "data", train=rows, test=rows)
    given = {"name": "classification", "data": str(tmp_path / "data")}
    message = (
        r"task\.train=train\[:15\] and task\.validation=train\[-8:\] have .*: what is chosen by is never trained on"
    )
    with pytest.raises(ValueError, match=message.replace(": what", "; what")):
        make_task(TaskOptions(**given, train="train[:15]", validation="train[-8:]")).load()
    found = make_task(TaskOptions(**given, train="train[:15]", validation="train[-5:]")).load()
    assert not {row["text"] for row in found.train} & {row["text"] for row in found.validation}


def test_superglues_parts_of_a_split_and_data_from_elsewhere(tmp_path):
    superglue(tmp_path / "data")
    toys.write_rows(
        tmp_path / "real" / "CB",
        train=[{"premise": "z", "hypothesis": f"{i}", "label": "neutral"} for i in range(6)],
        validation=[{"premise": "z", "hypothesis": "v", "label": "neutral"}],
    )
    given = {"name": "superglue", "data": str(tmp_path / "data"), "parts": ["CB"]}
    elsewhere = {"evaluation_data": str(tmp_path / "real")}
    found = make_task(TaskOptions(**given, **elsewhere, validation="validation", test="train[:4]")).load()
    assert (len(found.train), len(found.validation), len(found.test)) == (6, 1, 4)
    assert "premise: z" not in found.train[0]["input"]
    assert all("premise: z" in row["input"] for row in found.validation + found.test)
    with pytest.raises(ValueError, match=r"task\.train=train\[:4\] and task\.test=train\[-3:\] have examples"):
        make_task(TaskOptions(**given, train="train[:4]", test="train[-3:]")).load()
    make_task(TaskOptions(**given, train="train[:3]", test="train[-3:]", validation="validation")).load()


def test_templates_have_no_power():
    assert fill("{a} {a}: {b}", {"a": "x {b}", "b": "1"}) == "x {b} x {b}: 1"
    with pytest.raises(ValueError, match=r"task\.prompt names \{c\}, but the task's rows have a, b"):
        fill("{c}", {"a": 1, "b": 2})
    assert fill("{a.__class__}", {"a": 1}) == "{a.__class__}"
