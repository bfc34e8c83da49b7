"""PEFT's own tests against DST (tests/peft_suite): the list of expected failures, and the run where PEFT's tests are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft import IA3Config, LoraConfig, PrefixTuningConfig

from peft_dst import DSTConfig
from tests.peft_suite import cases, expected


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("failure", expected.FAILURES, ids=lambda failure: failure.test.partition("::")[2])
def test_every_expected_failure_names_a_test_of_ours(failure):
    path, _, name = failure.ours.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_the_table_of_the_readme_is_up_to_date():
    assert expected.table() in (ROOT / "tests/peft_suite/README.md").read_text()


def test_tests_are_matched_by_name_and_parameters():
    name = "test_custom_models.py::TestPeftCustomModel::test_training_custom_models"
    assert expected.failure(f"{name}[DST-MLP]") is not None
    assert expected.failure(f"{name}[DST-random-MLP]") is None
    assert expected.failure(f"{name}_too[DST-MLP]") is None
    assert expected.is_stand_in("test_mapping.py::TestGetPeftModel::test_get_peft_model_repeated_invocation")
    assert expected.left_out("test_tuners_utils.py::TestTargetedModuleNames::test_ia3_targeted_module_list")


def test_twins_keep_what_methods_share_once():
    names = ["test_name", "model_id", "config_cls", "config_kwargs"]
    rows = [
        ("one", "MLP2", LoraConfig, {"target_modules": ["lin0"], "r": 3, "init_lora_weights": False}),
        ("two", "MLP2", IA3Config, {"target_modules": ["lin0"], "feedforward_modules": []}),
        ("three", "MLP2", LoraConfig, {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0]}}),
        ("four", "MLP", LoraConfig, {"modules_to_save": ["lin1"]}),
    ]
    found = cases.twins(names, rows)
    assert [twin.id for twin in found] == [
        'DST-MLP2-target_modules=["lin0"]',
        'DST-MLP-modules_to_save=["lin1"]',
        'DST-random-MLP-modules_to_save=["lin1"]',
    ]
    assert found[0].values[1:] == (
        "MLP2",
        DSTConfig,
        {"epsilon": 0.5, "target_modules": ["lin0"], "init_weights": False},
    )
    assert cases.twins(["config"], [pytest.param(LoraConfig(target_modules=["q"])), PrefixTuningConfig()])[0].values[
        0
    ] == DSTConfig(epsilon=0.5, target_modules=["q"])
    assert cases.twins(["config_cls"], [LoraConfig])[0].values == (cases.TinyDSTConfig,)
    assert cases.twins(["flag"], [True, False]) == []


def test_the_suite_passes_but_for_what_is_expected():
    source = os.environ.get("PEFT_SOURCE")
    if not source:
        pytest.skip("PEFT_SOURCE does not name a checkout or the unpacked source distribution of peft, with its tests")
    told = re.search(r'^__version__ = "(.*)"', (Path(source) / "src/peft/__init__.py").read_text(), re.MULTILINE)
    if told is not None and told[1] != peft.__version__:
        pytest.skip(f"PEFT_SOURCE is version {told[1]}; installed is {peft.__version__}")
    run = subprocess.run(
        [sys.executable, "-m", "tests.peft_suite", source], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
