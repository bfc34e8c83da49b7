"""What the tests of the command line work on, and how they run it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from transformers.utils import logging as transformers_logging

from peft_dst import DSTConfig
from peft_dst.cli import main
from tests import toys
from tests.models import bert, train


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def furnished(tmp_path_factory):
    """A folder with a base, a fine-tuned checkpoint, adapters and a recipe; tests get copies of it."""
    folder = tmp_path_factory.mktemp("furnished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        furnish()
    return folder


def furnish():
    torch.manual_seed(0)
    base = bert()
    base.save_pretrained("base")
    model = get_peft_model(bert_again(), DSTConfig(epsilon=0.02, modules_to_save=["classifier"]))
    train(model, "bert")
    model.save_pretrained("my-adapter")
    another = get_peft_model(bert_again(), DSTConfig(epsilon=0.02))
    train(another, "bert", first=10)
    another.save_pretrained("another-adapter")
    for name, config in (
        ("my-lora", LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)),
        ("my-shira", ShiraConfig(r=1, target_modules=["query"], init_weights=False)),
    ):
        get_peft_model(bert_again(), config).save_pretrained(name)
    train(base, "bert", steps=1)
    base.save_pretrained("tuned")
    Path("experiment.yaml").write_text(json.dumps(toys.classification(Path())))


@pytest.fixture
def desk(furnished, tmp_path, monkeypatch):
    """A copy of that folder, where the commands run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".datasets")
    torch.manual_seed(0)
    yield tmp_path
    # Programs are quieter than libraries.
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()


def bert_again():
    return type(bert()).from_pretrained("base")


@pytest.fixture
def run(capsys):
    """Run a command in this process: its exit code, what it prints, and what it says on stderr."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        # What transformers shows of its own is not ours to look at.
        err = "\n".join(line for line in err.splitlines() if line.startswith(("error", "note", "Error", "Usage")))
        return exit.value.code or 0, out, err

    return run
