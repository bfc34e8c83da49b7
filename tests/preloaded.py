"""What is done once before tests fork processes: the first adapter, and Trainer, import and cache a lot."""

from __future__ import annotations

import gc

import pytest  # noqa: F401
import torch
from peft import get_peft_model
from transformers import Trainer  # noqa: F401

from peft_dst import DSTConfig
from tests.models import BUILDERS


state = torch.get_rng_state()
for build in BUILDERS.values():
    model = build()
for _ in range(2):
    # transformers makes its table of conversions when it is first asked for a model that is another one's base.
    model = get_peft_model(BUILDERS["bert"](), DSTConfig(epsilon=0.02))
del model
torch.set_rng_state(state)
# As in tests/conftest.py.
gc.collect()
gc.freeze()
