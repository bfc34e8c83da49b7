"""The README's code and the example run as a reader would run them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests import toys
from tests.programs import run


ROOT = Path(__file__).parent.parent


QUICKSTART = ROOT / "examples" / "quickstart.py"


def accuracies(output: str) -> dict[str, float]:
    """Task → accuracy after training, from the last table."""
    rows = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")]
    return {row[0].strip(): float(row[5]) for row in rows if len(row) == 7}


def test_quickstart_on_its_own_data(minilm, tmp_path, apart):
    output = apart(run, QUICKSTART, "--epochs", "0.1", "--output", tmp_path)
    assert accuracies(output).keys() == {"question_types", "sentiment", "support_intents"}
    assert "base restored bit-exactly: yes" in output
    for task in accuracies(output):
        assert (tmp_path / task / "adapter_model.safetensors").stat().st_size < 900_000


# Of the temporary folder, which goes when the program ends.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_quickstart_says_what_is_wrong_with_a_folder(minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(QUICKSTART), "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="no data set with a text and a label found"):
        runpy.run_path(str(QUICKSTART), run_name="__main__")


def test_quickstart_tests_on_labels_that_are_public(minilm, tmp_path):
    """sst2's test set on the hub has -1 for every label; its validation set is taken."""
    rows = [{"text": f"a {i}", "label": i % 2} for i in range(4)]
    toys.write_rows(tmp_path, train=rows, validation=rows[:3], test=[{"text": "a", "label": -1}] * 2)
    load_task = runpy.run_path(str(QUICKSTART))["load_task"]
    assert load_task(str(tmp_path), AutoTokenizer.from_pretrained(minilm), 4).test["labels"] == [0, 1, 0]


def test_quickstart_reaches_its_accuracy_on_trec(minilm, data_folder, apart):
    output = apart(run, QUICKSTART, "--data", data_folder, "--tasks", "trec")
    assert accuracies(output)["trec"] >= 0.93
    assert "base restored bit-exactly: yes" in output


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # Trainer's default, without a GPU
def test_the_readme_runs(minilm, tmp_path, monkeypatch):
    """The first block trains, saves, loads and swaps; only the hub's names are replaced by local folders."""
    monkeypatch.chdir(tmp_path)
    code = blocks(ROOT / "README.md")[0]
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 15
    assert "sentence-transformers/all-MiniLM-L6-v2" in code
    code = code.replace("sentence-transformers/all-MiniLM-L6-v2", minilm)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    rows = [{**tokenizer("a short sentence", padding="max_length", max_length=8), "labels": i % 2} for i in range(8)]
    (tmp_path / "script.py").write_text(code)
    runpy.run_path(str(tmp_path / "script.py"), {"train_set": rows})
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_python_in_the_docs_compiles(path):
    for code in blocks(path):
        compile(code, str(path), "exec")
