"""The pipelines of generation on the real data, with models of toys' size (configs/tiny)."""

from __future__ import annotations

import json
import runpy
import statistics
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from peft_dst.recipes import load_recipe, train
from peft_dst.recipes.lab import Lab
from tests import toys


ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "tiny").glob("[a-z]*_llama.yaml"))
SHORT = ["training.max_steps=24", "training.batch_size=4", "training.logging_steps=4", "task.max_target_length=24",
         "task.validation_size=4", "task.test_size=4"]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory):
    """As examples/tiny_t5.py makes it, in seconds."""
    folder = tmp_path_factory.mktemp("tiny_t5")
    rows = [
        {"text": f"the {a} sleeps in the {b}, {i}", "n": i}
        for i, (a, b) in enumerate([("cat", "house"), ("dog", "city")] * 40)
    ]
    toys.write_rows(folder / "data", train=rows)
    options = ["--vocabulary", "60", "--width", "16", "--steps", "30", "--output", str(folder / "model")]
    before = sys.argv
    sys.argv = ["tiny_t5.py", str(folder / "data" / "train.jsonl"), *options]
    try:
        runpy.run_path(str(ROOT / "examples" / "tiny_t5.py"), run_name="__main__")
    finally:
        sys.argv = before
    return folder / "model"


def test_the_tiny_t5(tiny_t5):
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5)
    ids = tokenizer("the cat sleeps, 12").input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat sleeps, 12"
    # Digits stand alone, so that any number can be written.
    assert "12" not in tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_data_is_read(path, real_data, tiny_t5):
    """Every row has what is asked, and the answer; nothing of the test data is trained on."""
    recipe = load_recipe(path, [f"model.name={tiny_t5}"])
    rows = Lab(recipe, Path("nowhere")).rows
    for split in ("train", "validation", "test"):
        assert rows[split]
        assert all(row["input"].strip() and row["target"].strip() and row["references"] for row in rows[split])
    train_inputs = {row["input"] for row in rows.train}
    # The same question may have been asked twice (captions, WMT's short sentences).
    assert sum(row["input"] in train_inputs for row in rows.test) <= 0.05 * len(rows.test)


@pytest.mark.parametrize("name", ["triviaqa_llama", "multi30k_llama", "triviaqa_t5"])
def test_a_short_run(name, real_data, tiny_t5, tmp_path):
    """The loss falls, answers are text, and what was measured is what was answered."""
    more = ["task.train_size=200", *([f"model.name={tiny_t5}"] if name.endswith("t5") else [])]
    record = train(load_recipe(ROOT / "configs" / "tiny" / f"{name}.yaml", [*SHORT, *more]), tmp_path / "run")
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert statistics.fmean(losses[-2:]) < statistics.fmean(losses[:2]) - 0.1
    assert record["free_parameters"] == round(0.01 * record["body_parameters"])
    for split in ("validation", "test"):
        lines = (tmp_path / "run" / f"predictions_{split}.jsonl").read_text().splitlines()
        answers = [json.loads(line)["answer"] for line in lines]
        assert len(answers) == record["examples"][split] == 4
        assert not any(token in answer for token in ("<s>", "</s>", "<unk>", "<pad>") for answer in answers)
        if name.endswith("llama"):
            assert all(answer.strip() for answer in answers)
        assert all(figure >= 0 for figure in record["metrics"][split].values())
