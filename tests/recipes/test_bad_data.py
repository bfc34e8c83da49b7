"""Data that is not what it should be: it is refused in a line that names where, or divided so that it does no harm."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoConfig, AutoTokenizer

from peft_dst.recipes.options import TaskOptions
from peft_dst.recipes.tasks import data, make_task
from tests import toys


def load(tmp_path, name, rows, test=None, **options):
    toys.write_rows(tmp_path / "data", train=rows, test=rows[:2] if test is None else test)
    return make_task(TaskOptions(name=name, data=str(tmp_path / "data"), **options)).load()


GOOD = [{"text": f"a {i}", "label": "b"} for i in range(10)]
TAGS = {"words": ["a", "b"], "tags": ["O", "O"]}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("classification", {"text": ["a"], "label": "b"}, r"text must be text, not \['a'\]"),
        ("classification", {"text": "a", "label": ["b"]}, r"a label must be text or a number, not \['b'\]"),
        ("classification", {"text": None, "label": "b"}, r"text is null; leave that row out"),
        ("tagging", {**TAGS, "tags": ["O"]}, "there are 2 words and 1 tags"),
        ("tagging", {**TAGS, "tags": [0, 1]}, "tags must be text, not 0"),
        ("tagging", {**TAGS, "tags": ["O", "PER"]}, "the tag 'PER' is neither O nor one like B-PER"),
        ("maths", {"question": ["a"], "answer": "1"}, r"question must be text, not \['a'\]"),
        ("masked_words", {"text": 3}, "text must be text, not 3"),
    ],
)
def test_a_row_that_cannot_be_is_named(name, row, message, tmp_path):
    with pytest.raises(ValueError, match=rf"data, train example \d+ \(task\.train=train\): {message}"):
        load(tmp_path, name, [row] * 10)


def test_files_that_cannot_be_read(tmp_path):
    toys.write_rows(tmp_path / "data", train=GOOD, test=GOOD)
    task = make_task(TaskOptions(name="classification", data=str(tmp_path / "data")))
    file = tmp_path / "data" / "test.jsonl"
    for text, message in (
        ("", r"test\.jsonl is empty; give it rows"),
        ('{"text": "a", "label": "b"}\n{"text": \n', r"test\.jsonl, line 2 is no JSON"),
        ('{"text": "a"}\n3\n', r"test\.jsonl, line 2 holds '3'; each line must be an object"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            task.load()


def test_too_few_rows_to_cut(tmp_path):
    with pytest.raises(
        ValueError, match=r"no validation examples: a fifth of fewer than 5 .*name a split in task\.valid"
    ):
        load(tmp_path, "classification", GOOD[:4])


def test_a_rare_label_may_be_held_out(tmp_path):
    """Which examples are cut is not for the labels to decide."""
    for place in range(10):
        rows = [{"text": f"a {i}", "label": "rare" if i == place else "b"} for i in range(10)]
        found = load(tmp_path, "classification", rows)
        assert {row["label"] for row in found.train + found.validation} == {"b", "rare"}


def from_hub(monkeypatch, features, **splits):
    """As if the hub had it."""
    made = {name: Dataset.from_list(rows, features=features) for name, rows in splits.items()}
    monkeypatch.setattr(data, "load_dataset", lambda name, subset, split: made[split])


def test_hidden_labels_are_refused(monkeypatch):
    """A test set without public labels has -1, which is no label, and not the last one."""
    message = r"test example 0 \(task\.test=test\): a label is -1, .*this split has no public labels"
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    from_hub(monkeypatch, features, train=[{"text": "a", "label": 1}] * 10, test=[{"text": "a", "label": -1}])
    with pytest.raises(ValueError, match=message):
        make_task(TaskOptions(name="classification", data="hub")).load()
    features = Features({"words": List(Value("string")), "tags": List(ClassLabel(names=["O", "B-X"]))})
    row = {"words": ["a"], "tags": [1]}
    from_hub(monkeypatch, features, train=[row] * 10, test=[{**row, "tags": [-1]}])
    with pytest.raises(ValueError, match=message):
        make_task(TaskOptions(name="tagging", data="hub")).load()


@pytest.mark.parametrize(
    ("part", "row"),
    [
        ("BoolQ", {"question": "a", "passage": "b"}),
        ("CB", {"premise": "a", "hypothesis": "b"}),
        ("RTE", {"premise": "a", "hypothesis": "b"}),
        ("COPA", {"premise": "a", "choice1": "b", "choice2": "c", "question": "cause"}),
    ],
)
def test_superglues_hidden_labels_are_refused(part, row, monkeypatch):
    from_hub(monkeypatch, None, train=[{**row, "label": 1}] * 10, test=[{**row, "label": -1}])
    with pytest.raises(ValueError, match=rf"{part}, row 0 of the split test: a label is -1, .*no public labels"):
        make_task(TaskOptions(name="superglue", data="hub", parts=[part])).load()


def test_superglues_empty_and_unlabelled_splits(tmp_path):
    rows = [{"premise": "a", "hypothesis": "b", "label": "neutral"}] * 10
    task = make_task(TaskOptions(name="superglue", data=str(tmp_path), parts=["CB"]))
    toys.write_rows(tmp_path / "CB", train=rows, test=[{"premise": "a", "hypothesis": "b"}])
    with pytest.raises(ValueError, match=r"CB, row 0 of the split test has no 'label'"):
        task.load()
    toys.write_rows(tmp_path / "CB", train=rows[:4], test=rows)
    with pytest.raises(ValueError, match="has no validation examples: a fifth of fewer than 5"):
        task.load()


def test_multirc_is_cut_by_paragraph(monkeypatch):
    """No question of the validation part is trained on."""
    rows = [
        {"paragraph": f"p{p}", "question": f"q{q}", "answer": f"a{a}", "label": a, "idx": {"paragraph": p, "question": q}}
        for p in range(10) for q in range(3) for a in range(2)
    ]  # fmt: skip
    from_hub(monkeypatch, None, train=rows, test=rows)
    options = TaskOptions(name="superglue", data="hub", parts=["MultiRC"], validation_size=6)
    found = make_task(options).load()
    assert (len(found.train), len(found.validation)) == (54, 6)
    paragraphs = [{row["group"].partition("-")[0] for row in rows} for rows in (found.train, found.validation)]
    assert not paragraphs[0] & paragraphs[1]


def test_record_is_cut_by_passage(monkeypatch):
    """No passage of the validation part is trained on, whose other queries name the same people."""
    rows = [
        {"passage": f"p{p}", "query": f"q{q}", "entities": ["a"], "answers": ["a"], "idx": {"passage": p, "query": q}}
        for p in range(10) for q in range(3)
    ]  # fmt: skip
    from_hub(monkeypatch, None, train=rows, test=rows)
    found = make_task(TaskOptions(name="superglue", data="hub", parts=["ReCoRD"], validation_size=6)).load()
    assert (len(found.train), len(found.validation)) == (24, 6)
    passages = [{row["input"].rpartition(" ")[2] for row in rows} for rows in (found.train, found.validation)]
    assert not passages[0] & passages[1]


def test_what_a_causal_model_is_asked_stays(tmp_path):
    """A long input loses its beginning, a target that is cut has no end."""
    tokenizer = AutoTokenizer.from_pretrained(toys.model(tmp_path / "llama", "llama"))
    row = {"input": "the red cat sleeps in the house green", "target": "the cat sleeps", "references": []}
    task = make_task(TaskOptions(name="maths", data="", max_length=3, max_target_length=2))
    task.model_class(AutoConfig.from_pretrained(tmp_path / "llama"))
    (feature,) = task.encode([row], tokenizer, training=True)
    assert tokenizer.decode(feature["input_ids"]).split()[-5:] == ["the", "house", "green", "the", "cat"]
    (asked,) = task.encode([row], tokenizer, training=False)
    assert tokenizer.decode(asked["input_ids"]).split()[-1] == "green"
    task.options.max_target_length = 3
    (feature,) = task.encode([row], tokenizer, training=True)
    assert feature["labels"][-1] == tokenizer.eos_token_id


def test_an_encoder_writes_nothing(tmp_path):
    config = AutoConfig.from_pretrained(toys.model(tmp_path / "bert", "bert"))
    with pytest.raises(ValueError, match=r"task\.name=maths needs a model that writes.* BertConfig is an encoder's"):
        make_task(TaskOptions(name="maths", data="")).model_class(config)
