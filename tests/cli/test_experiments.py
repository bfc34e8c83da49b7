"""The commands that run experiments, and show what came of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from peft_dst.delta import SparseDelta


def test_train_and_evaluate(desk, run):
    command = ("train", "experiment.yaml", "method.epsilon=0.1", "--output", "run")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    record = json.loads(Path("run/results.json").read_text())
    assert record["recipe"]["method"]["epsilon"] == 0.1
    accuracy = record["metrics"]["test"]["accuracy"]
    assert out.startswith(f"run: finished; {record['free_parameters']:,} free parameters.\n")
    assert f"test: accuracy {accuracy:.4f}, " in out
    assert SparseDelta.load("run/adapter").num_entries == record["free_parameters"]
    code, again, _ = run(*command)
    assert (code, again) == (0, out.replace("finished;", "finished before;"))
    code, out, _ = run("evaluate", "run")
    assert code == 0
    assert out.startswith(f"test: accuracy {accuracy:.4f}, ")
    assert json.loads(Path("run/evaluation.json").read_text())["metrics"]["test"] == record["metrics"]["test"]
    code, _, err = run("train", "experiment.yaml", "--output", "run")
    assert code == 1
    assert err == "error: run holds a run with method.epsilon = 0.1, not 0.02; give another folder, or remove that one."
    code, _, err = run("train", "experiment.yaml", "method.epsilom=0.1", "--output", "other")
    assert code == 1
    assert "did you mean method.epsilon" in err
    assert not Path("other").exists()


def test_train_says_which_learning_rate_it_took(desk, run):
    command = ("train", "experiment.yaml", "training.max_steps=1", "training.learning_rate=auto", "--output", "run")
    code, out, _ = run(*command)
    rate = json.loads(Path("run/results.json").read_text())["recipe"]["training"]["learning_rate"]
    assert (code, out.splitlines()[0]) == (
        0,
        f"learning rate {rate:g} by rule; training.learning_rate=NUMBER gives another.",
    )
    assert run(*command, "--quiet")[:2] == (0, "")
    # The same number by hand is the same run, and nobody need be told.
    code, out, _ = run(*command[:3], f"training.learning_rate={rate}", *command[4:])
    assert (code, out.splitlines()[0].partition(";")[0]) == (0, "run: finished before")


def test_sweep(desk, run):
    sweep = "sweep={method.epsilon: [0.1, 0.02], seed: [0, 1]}"
    code, out, _ = run("sweep", "experiment.yaml", sweep, "training.max_steps=1", "--list")
    assert (code, out) == (0, "epsilon=0.1: 2 seeds\nepsilon=0.02: 2 seeds\n")
    command = ("sweep", "experiment.yaml", sweep, "training.max_steps=1", "-o", "folder", "--workers", "0")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == [
        "chosen",
        "free",
        "parameters",
        "file,",
        "bytes",
        "seeds",
        "test",
        "accuracy",
        "deviation",
        "p",
        "seconds",
    ]
    assert [line.split()[0] for line in lines[2:]] == ["epsilon=0.1", "epsilon=0.02"]
    summary = json.loads(Path("folder/summary.json").read_text())
    mean = summary["points"][0]["metrics"]["test"]["accuracy"]["mean"]
    assert f" {mean:.4f} " in lines[2]
    assert run(*command) == (0, out, "")
    code, out, err = run(
        *command[:2],
        "sweep={method.rank: [1], method.name: [lora]}",
        "method.target_modules=[nothing]",
        "-o",
        "bad",
        "-w",
        "0",
    )
    assert code == 1
    assert "failed" in out
    assert err.startswith("error: bad/runs/lora,rank=1,seed=0-")
    assert "No modules were targeted" in err


def test_report(desk, run):
    """Of one run here; of sweeps, and what is on the page, in tests/recipes/test_report.py."""
    assert run("train", "experiment.yaml", "training.max_steps=2", "--output", "folder")[0] == 0
    code, out, err = run("report", "folder", "folder/../folder/results.json", "-o", "report")
    assert (code, out) == (1, "")
    assert "hold the same run; give one of them." in err
    code, out, err = run("report", "folder", "-o", "report")
    pictures = len(list(Path("report").glob("*.png")))
    assert (code, out, err) == (0, f"report/index.html, and {pictures} pictures beside it.\n", "")
    assert pictures == len(list(Path("report").iterdir())) - 1 > 0
    code, _, err = run("report", "folder", "-o", "report")
    assert (code, err) == (1, "error: report exists already. Give another name, or remove it first.")
    code, _, err = run("report", "base", "-o", "other")
    assert code == 1
    assert err.startswith("error: base holds neither summary.json")
    assert run("report", "folder", "-q", "-o", "other") == (0, "", "")
    assert run("report", "nothing", "-o", "other")[0] == 2


def test_recipes_need_their_extra(desk, run, monkeypatch):
    """And the help of the commands does not; nor does the package: test_program.py."""
    for name in [name for name in sys.modules if name.startswith("peft_dst.recipes")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules["peft_dst"], "recipes", raising=False)
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    code, _, err = run("train", "experiment.yaml")
    assert code == 1
    assert err == "error: recipes need omegaconf, which is not installed: pip install 'peft-dst[recipes]'."
    code, _, err = run("evaluate", "base")
    assert code == 1
    for name in ("datasets", "sacrebleu", "seqeval", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, _ = run("train", "--help")
    assert code == 0
    assert "OPTION=VALUE" in out
