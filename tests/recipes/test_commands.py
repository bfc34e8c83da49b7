"""What the commands do before they run anything."""

from __future__ import annotations

import json

import pytest

from peft_dst.cli import main
from tests import toys


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(toys.classification(tmp_path)))
    return file


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code or 0, *capsys.readouterr()


def test_what_cannot_be_compared_is_not_trained_first(file, tmp_path, capsys):
    command = ("train", file, "--output", tmp_path / "run", "--comparison", tmp_path / "run.json")
    code, _, err = run(capsys, *command)
    assert code == 1
    assert "error: PEFT compares by MetaMathQA and GSM8K" in err
    assert not (tmp_path / "run").exists()


def test_the_list_says_what_is_searched(file, capsys):
    sweep = "sweep=[{method.name: [dynamic], seed: [0, 1]}, {method.name: [pruning], search.option: [null]}]"
    code, out, _ = run(capsys, "sweep", file, "--list", "search.option=training.learning_rate", sweep)
    assert (code, out) == (0, "dynamic: 2 seeds, training.learning_rate searched from 0.01\npruning: 1 seed\n")


def test_a_run_is_measured_again_otherwise(file, tmp_path, capsys):
    """With options of evaluation alone."""
    assert run(capsys, "train", file, "training.max_steps=1", "--output", tmp_path / "run", "-q")[0] == 0
    code, out, _ = run(capsys, "evaluate", tmp_path / "run", "evaluation.predictions=true", "--split", "validation")
    assert (code, out.partition(":")[0]) == (0, "validation")
    assert (tmp_path / "run" / "predictions_validation.jsonl").is_file()
    code, _, err = run(capsys, "evaluate", tmp_path / "run", "seed=3")
    assert code == 1
    assert "error: seed cannot be otherwise than it was in training" in err
