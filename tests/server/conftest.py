"""A pool of a tiny causal model, and an engine that mixes."""

from __future__ import annotations

import pytest
import torch

from peft_dst.server.engine import Engine, plans
from tests.models import BUILDERS
from tests.server.engines import SECONDS, Always, pooled


@pytest.fixture
def causal():
    """A tiny Llama with three deltas; in double precision, so that no rounding of a batch changes a token."""
    torch.manual_seed(0)
    return pooled(BUILDERS["llama"]().double().eval())


@pytest.fixture
def mixing(causal, monkeypatch):
    """An engine that always mixes what can be."""
    monkeypatch.setattr(plans, "Planner", lambda: Always(True))
    engine = Engine(causal)
    yield engine
    engine.stop(SECONDS)
