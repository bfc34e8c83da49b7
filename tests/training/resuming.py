"""Training that is interrupted, and goes on from files in an adapter and an optimizer made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.models import assert_same, loss, weights


# A BERT's adapter, its optimizer, and whatever else is stepped and saved with that.
Training = tuple[Any, ...]


def _train(training: Training, steps: range) -> None:
    model, *stepped = training
    for step in steps:
        loss(model, "bert", step).backward()
        for one in stepped:
            one.step()
        stepped[0].zero_grad()


def assert_resumed_equals_uninterrupted(
    make: Callable[[], Training],
    folder: Path,
    check: Callable[[Training, Training], None] = lambda interrupted, resumed: None,
) -> None:
    """Compare six steps at once with three and three. `check` is given both halves when the second has been loaded."""
    whole, first, second = make(), make(), make()
    _train(whole, range(6))
    _train(first, range(3))
    first[0].save_pretrained(folder)
    torch.save([one.state_dict() for one in first[1:]], folder / "optimizer.pt")
    model = second[0]
    model.delete_adapter("default")
    model.load_adapter(folder, "default", is_trainable=True)
    model.set_adapter("default")
    for one, state in zip(second[1:], torch.load(folder / "optimizer.pt", weights_only=True), strict=True):
        one.load_state_dict(state)
    check(first, second)
    _train(second, range(3, 6))
    assert_same(weights(whole[0].base_model.model), weights(model.base_model.model))
