"""A tiny BERT with three deltas, and a pool of them."""

from __future__ import annotations

import pytest

from peft_dst.serving import DeltaPool
from tests.serving.helpers import deltas_of


@pytest.fixture
def tasks(tmp_path):
    """A tiny BERT and three deltas of it."""
    return deltas_of("bert", tmp_path)


@pytest.fixture
def served(tasks):
    base, *folders = tasks
    with DeltaPool(base) as made:
        for folder in folders:
            made.add(folder.name, folder)
        yield made
