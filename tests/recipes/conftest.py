"""Where `datasets` keeps what it has read."""

from __future__ import annotations

import datasets
import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".datasets")
    monkeypatch.delenv("PEFT_DST_DATA", raising=False)
    datasets.disable_progress_bars()
