"""What a causal model loses of its language: the loss on plain text, before training and after."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import cross_entropy

from .lab import Lab
from .tasks import first_rows
from .tasks.base import IGNORED


@torch.no_grad()
def text_loss(lab: Lab, model: nn.Module, seed: bool = False) -> float:
    """Mean loss of a token of the recipe's text, in nats; a text counts up to task.max_length.

    Args:
        lab: the run.
        model: a causal model.
        seed: without its adapter, if it has one.

    Raises:
        ValueError: if the model is no causal one, or the text has no two tokens in a row.
    """
    options = lab.recipe.evaluation
    assert options.text is not None
    if lab.task.task_type != "CAUSAL_LM":
        raise ValueError("evaluation.text is for causal models; set it to null.")
    rows = first_rows(options.text, options.text_split, options.text_examples)
    if strange := [row for row in rows if not isinstance(row.get("text"), str)]:
        raise ValueError(
            f"evaluation.text={options.text} needs a column 'text' with text in each row; it has {', '.join(strange[0])}."
        )
    texts = [row["text"] for row in rows]
    every = lab.tokenizer(texts, truncation=True, max_length=lab.recipe.task.max_length)["input_ids"]
    encoded = [ids for ids in every if ids]
    # In small batches: a pass over text shall not need more memory than training does.
    size = lab.recipe.training.batch_size
    device = next(model.parameters()).device
    total, count = 0.0, 0
    mode = model.training
    model.eval()
    with model.disable_adapter() if seed and isinstance(model, PeftModel) else nullcontext():
        for start in range(0, len(encoded), size):
            features = [{"input_ids": ids, "labels": ids} for ids in encoded[start : start + size]]
            batch: dict[str, Any] = {name: tensor.to(device) for name, tensor in lab.collate(features).items()}
            labels = batch.pop("labels")
            # Of a prompt's own positions there is nothing to say.
            logits = model(**batch).logits[:, -labels.shape[1] :]
            found = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
            total, count = total + float(found), count + int((labels[:, 1:] != IGNORED).sum())
    model.train(mode)
    if not count:
        raise ValueError(f"evaluation.text={options.text} has no text of two tokens; give another.")
    return total / count
