"""A base and a model that was fine-tuned from it, in folders."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.models import BUILDERS, train


@pytest.fixture
def pair(tmp_path):
    """Folders of a tiny base and of a fine-tuned model, how to load the base, and the two models."""

    def make(name="bert", dtype=torch.float32, **options):
        torch.manual_seed(0)
        base = BUILDERS[name]()
        tuned = copy.deepcopy(base)
        train(tuned, name)
        for folder, model in (("base", base), ("tuned", tuned)):
            model.to(dtype).save_pretrained(tmp_path / folder, **options)

        def load(which="base"):
            return type(base).from_pretrained(tmp_path / which, dtype=dtype)

        return load, base, tuned

    return make
