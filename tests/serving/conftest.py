"""A tiny BERT with three deltas, and pools of them."""

from __future__ import annotations

import pytest
import torch

from tests.serving.helpers import deltas_of, pool_of
from tests.serving.mixtures import twins_of


@pytest.fixture
def tasks(tmp_path):
    """A tiny BERT and three deltas of it."""
    return deltas_of("bert", tmp_path)


@pytest.fixture
def served(tasks):
    base, *folders = tasks
    with pool_of(base, folders) as made:
        yield made


@pytest.fixture
def twinned(tmp_path):
    """A pool in double precision, and the plain twins by their deltas' names."""
    base, *folders = deltas_of("bert", tmp_path, dtype=torch.float64)
    plain = twins_of(base, folders)
    with pool_of(base, folders) as made:
        yield made, plain
