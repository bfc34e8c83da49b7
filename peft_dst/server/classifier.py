"""Texts that are classified together, in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def classify(model: nn.Module, texts: Sequence[Sequence[int]]) -> Tensor:
    """Read texts side by side; each gets what it would get alone.

    Args:
        model: a classifier of sequences, of transformers.
        texts: tokens, at least one of each.

    Returns:
        Logits on the CPU, floating (texts, …).
    """
    longest = max(map(len, texts))
    with _padding(model, texts) as padding:
        ids = torch.full((len(texts), longest), padding)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        device = next(model.parameters()).device
        logits: Tensor = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return logits.cpu()


@contextmanager
def _padding(model: Any, texts: Sequence[Sequence[int]]) -> Iterator[int]:
    """The token that pads these.

    Decoders take the last token that is not padding, by its number, for a text's end, and refuse batches without such a
    number. Where the config has none, any token will do that no text ends with.
    """
    config = model.config.get_text_config()
    given = config.pad_token_id
    if given is not None and given >= 0:
        yield given
        return
    ends = {text[-1] for text in texts}
    chosen = next(token for token in range(len(texts) + 1) if token not in ends)
    if len(texts) > 1:
        config.pad_token_id = chosen
    try:
        yield chosen
    finally:
        config.pad_token_id = given
