"""The README's code and the example run as a reader would run them."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer


ROOT = Path(__file__).parent.parent


def quickstart(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PEFT_DST_DATA"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "quickstart.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def accuracies(output: str) -> dict[str, float]:
    """Task → accuracy after training, from the last table."""
    rows = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")]
    return {row[0].strip(): float(row[5]) for row in rows if len(row) == 7}


def test_quickstart_on_its_own_data(minilm, tmp_path):
    output = quickstart("--epochs", "0.1", "--output", str(tmp_path))
    assert accuracies(output).keys() == {"question_types", "sentiment", "support_intents"}
    assert "base restored bit-exactly: yes" in output
    for task in accuracies(output):
        assert (tmp_path / task / "adapter_model.safetensors").stat().st_size < 900_000


@pytest.fixture
def selections(monkeypatch):
    """The harness as a module, and what it makes of a command line."""
    monkeypatch.delenv("PEFT_DST_DATA", raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = importlib.import_module("selections")

    def arguments(*options: str) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["selections.py", *options])
        return module.arguments()

    return module, arguments


def test_selections_compares_methods_and_starts_where_it_was(minilm, tmp_path, selections):
    module, arguments = selections
    options = ["--output", str(tmp_path), "--train-size", "48", "--held-out", "10", "--epochs", "1", "--seeds", "0"]
    options += ["--grid", "full=1e-4", "dynamic=1e-2,2e-2", "lora=1e-3", "--widen", "0", "--threads", "1"]
    options += ["--methods", "full", "head_only", "dynamic", "lora"]
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "selections.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert {row[0].removeprefix("| "): row[1] for row in rows} == {
        "full": "22,565,376", "head_only": "0", "dynamic": "22,565", "lora": "18,432"
    }  # fmt: skip
    records = module.results(tmp_path)
    assert sorted(record["split"] for record in records) == ["held_out"] * 2 + ["test"] * 4
    held_out = {r["lr"]: r["accuracy"] for r in records if r["split"] == "held_out"}
    (dynamic,) = (r for r in records if (r["method"], r["split"]) == ("dynamic", "test"))
    assert dynamic["lr"] == min(held_out, key=lambda lr: (-held_out[lr], lr))
    assert dynamic["changed_parameters"] == dynamic["free_parameters"] == 22_565
    # Started again there is nothing to do, and the table is the same.
    assert module.plan(arguments(*options)) == ([], 0)
    assert module.table(records) in done.stdout
    with pytest.raises(SystemExit, match=r"holds runs with epsilon = 0\.001, not 0\.0001"):
        module.refuse_other_options(arguments(*options, "--epsilon", "1e-4"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "--methods has no 'magic'"),
        (["--methods", "full:0.1"], "--methods has no 'full:0.1'"),
        (["--methods", "combined"], "combined needs plain text: --text FILE"),
    ],
)
def test_selections_says_what_is_wrong_with_its_options(minilm, tmp_path, selections, options, message):
    with pytest.raises(SystemExit, match=message):
        selections[1]("--output", str(tmp_path), *options)


def held_out(method: str, accuracies: dict[float, float]) -> list[dict]:
    return [{"method": method, "split": "held_out", "lr": lr, "accuracy": a} for lr, a in accuracies.items()]


def test_selections_widens_a_grid_where_the_best_is_at_its_end(minilm, tmp_path, selections):
    module, arguments = selections
    args = arguments(
        "--output", str(tmp_path), "--methods", "random", "full", "--grid", "random=5e-2,1e-1", "--widen", "2"
    )
    known = {5e-2: 0.5, 1e-1: 0.7}
    assert module.grid(args, "random", []) == [5e-2, 1e-1]
    assert module.grid(args, "random", held_out("full", known)) == [5e-2, 1e-1]
    assert module.grid(args, "random", held_out("random", known)) == [5e-2, 1e-1, 2e-1]
    assert module.best_rate(args, "random", held_out("random", known)) is None
    assert module.best_rate(args, "random", held_out("random", {**known, 2e-1: 0.7})) == 1e-1
    assert module.grid(args, "random", held_out("random", {**known, 2e-1: 0.8})) == [5e-2, 1e-1, 2e-1, 5e-1]
    # Only so often.
    last = held_out("random", {**known, 2e-1: 0.8, 5e-1: 0.9})
    assert module.grid(args, "random", last) == [5e-2, 1e-1, 2e-1, 5e-1]
    assert module.best_rate(args, "random", last) == 5e-1
    downwards = held_out("random", {5e-2: 0.7, 1e-1: 0.5})
    assert module.grid(args, "random", downwards) == [2e-2, 5e-2, 1e-1]


def test_selections_builds_on_the_learning_rate_of_pruning(minilm, tmp_path, selections):
    module, arguments = selections
    args = arguments(
        "--output", str(tmp_path), "--methods", "pruning_retrained:0.1", "--seeds", "0", "1", "--widen", "0"
    )
    assert args.methods == ["pruning_retrained:0.1", "pruning:0.1"]
    ready, later = module.plan(args)
    assert {run.method for run in ready} == {"pruning:0.1"}
    assert {run.coefficient for run in ready} == {0.1}
    # Both test on two seeds; six rates to try come first, of the one that must wait.
    assert (len(ready), later) == (6, 6 + 2 + 2)


# Of the temporary folder, which goes when the program ends.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_quickstart_says_what_is_wrong_with_a_folder(minilm, tmp_path, monkeypatch):
    script = str(ROOT / "examples" / "quickstart.py")
    monkeypatch.setattr(sys, "argv", [script, "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="no data set with a text and a label found"):
        runpy.run_path(script, run_name="__main__")


def test_quickstart_reaches_its_accuracy_on_trec(minilm, data_folder):
    output = quickstart("--data", str(data_folder), "--tasks", "trec")
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
