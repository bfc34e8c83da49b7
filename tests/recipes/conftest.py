"""Where `datasets` keeps what it has read."""

from __future__ import annotations

import os

import datasets
import pytest

from peft_dst.recipes.tasks.data import VARIABLE


# Of tests that want real data; the others make their own.
FOLDER = os.environ.get(VARIABLE)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".datasets")
    monkeypatch.delenv("PEFT_DST_DATA", raising=False)
    datasets.disable_progress_bars()


@pytest.fixture
def real_data(monkeypatch, _own_cache):
    """The real data sets, where recipes look for them; a test that needs them skips where there are none."""
    if not FOLDER:
        pytest.skip(f"{VARIABLE} does not name a folder with the real data sets")
    monkeypatch.setenv(VARIABLE, FOLDER)
