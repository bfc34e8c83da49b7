"""Sequences that are continued together, in one batch with one cache, whenever each of them began."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .sampling import GREEDY, Sampling, pick


@dataclass(eq=False)
class Continuation:
    """A text to be continued.

    Attributes:
        prompt: tokens, at least one.
        limit: new tokens at most, at least one.
        sampling: how they are picked.
        ends: tokens that end it; such a one is not part of the answer.
        on_token: called with each new token; whoever is called must not take long.
        tokens: the answer so far.
        finished: why it ended: "stop" or "length"; "cancelled"; "error"; None before.
        error: what went wrong, if that was it.
        cancelled: set by whoever no longer wants it; nothing more is computed for it then.
    """

    prompt: Sequence[int]
    limit: int
    sampling: Sampling = GREEDY
    ends: frozenset[int] = frozenset()
    on_token: Callable[[int], None] = lambda token: None
    tokens: list[int] = field(default_factory=list)
    finished: str | None = None
    error: Exception | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("there is nothing to continue: the prompt has no tokens.")
        if self.limit < 1:
            raise ValueError(f"at least one new token must be asked for, got {self.limit}.")
        self.generator = self.sampling.generator()

    def take(self, logits: Tensor) -> None:
        """Pick the next token, float (v,) → one more in `tokens`, or the end.

        Whatever goes wrong in that is the end of this one alone, whoever else is in its batch.
        """
        if self.cancelled:
            self.finished = "cancelled"
            return
        try:
            token = pick(logits, self.sampling, self.generator)
            if token in self.ends:
                self.finished = "stop"
                return
            self.tokens.append(token)
            self.on_token(token)
        except Exception as error:
            self.finished, self.error = "error", error
            return
        if len(self.tokens) == self.limit:
            self.finished = "length"


@torch.no_grad()
def check_model(model: Any) -> None:
    """Find out by a few tokens whether a model continues texts side by side as it does each alone.

    Raises:
        ValueError: if it does not; it says why.
    """
    name = type(model).__name__
    text = Continuation([0], 2)
    try:
        # Beside a longer one, so that there is padding.
        cohort = Cohort(model, [text, Continuation([0, 1, 0], 2)])
        beside = cohort._next()[0]
        device = cohort.mask.device
        alone = model(input_ids=torch.tensor([[*text.prompt, *text.tokens]], device=device)).logits[0, -1]
    except Exception as error:
        raise ValueError(f"{name} cannot continue texts side by side. {type(error).__name__}: {error}") from error
    rounding = max(torch.finfo(kind).eps for kind in (alone.dtype, torch.float32)) ** 0.5
    if not (beside - alone).abs().max() <= rounding * (alone.max() - alone.min()):
        raise ValueError(
            f"{name} gives other logits for a text that is padded on the left and read token by token than for the text "
            "alone; such models cannot be served."
        )


class Cohort:
    """Continuations in one batch.

    The batch is padded on the left, so that all of them end at its right edge and grow there. One that has ended leaves the
    batch at once; another cohort can join between two steps.

    Args:
        model: a causal model of transformers.
        members: what to continue; their prompts are read now, in one forward pass.

    Attributes:
        width: of the logits.

    Raises:
        ValueError: if the model keeps something else than plain keys and values, which cannot be cut and joined.
    """

    @torch.no_grad()
    def __init__(self, model: Any, members: Sequence[Continuation]) -> None:
        self.model = model
        # Of a prompt the last position's logits are all that is wanted: those of all are many times as large as the rest.
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in signature(type(model).forward).parameters else {}
        # A delta's head may have more outputs than there are tokens that can be read again.
        self._readable = self.model.get_input_embeddings().num_embeddings
        self.members = list(members)
        # One that was interrupted goes on after what it has.
        texts = [[*member.prompt, *member.tokens] for member in members]
        longest = max(map(len, texts))
        device = next(model.parameters()).device
        ids = torch.zeros(len(members), longest, dtype=torch.int64)
        self.mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, longest - len(text) :] = torch.tensor(text)
            self.mask[row, longest - len(text) :] = 1
        self.mask = self.mask.to(device)
        self.cache = DynamicCache(config=model.config)
        logits = self._forward(ids.to(device), (self.mask.cumsum(1) - 1).clamp(min=0))
        for layer in self.cache.layers:
            if type(layer) is not DynamicLayer:
                raise ValueError(
                    f"{type(model).__name__} keeps a {type(layer).__name__} of what it has read, where only plain keys and "
                    "values can be served."
                )
        if self.cache.get_seq_length() != longest:
            raise ValueError(f"{type(model).__name__} does not keep keys and values of what it has read.")
        self._take(logits)

    @torch.no_grad()
    def step(self) -> None:
        """One more token for each. Those that are finished leave."""
        self._take(self._next())

    def _next(self) -> Tensor:
        """Read the last token of each; logits of the next ones, floating (members, v)."""
        ids = torch.tensor([[member.tokens[-1]] for member in self.members], device=self.mask.device)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.members), 1)], 1)
        return self._forward(ids, self.mask.sum(1, keepdim=True) - 1)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **self._options,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _take(self, logits: Tensor) -> None:
        self.width = logits.shape[-1]
        for member, of_one in zip(self.members, logits, strict=True):
            member.take(of_one[: self._readable])
        self.leave()

    def leave(self) -> None:
        """Let go of those that are finished."""
        staying = [row for row, member in enumerate(self.members) if member.finished is None]
        if len(staying) == len(self.members):
            return
        self.members = [self.members[row] for row in staying]
        rows = torch.tensor(staying, dtype=torch.int64, device=self.mask.device)
        self.mask = self.mask[rows]
        if staying:
            self.cache.batch_select_indices(rows)
            # What was padding for all is cut off.
            self._shift(-int(self.mask.argmax(1).min()))

    def join(self, other: Cohort) -> None:
        """Take another cohort's members in. They are of the same model. After an error both are as they were."""
        if not other.members:
            return
        if not self.members:
            self.members, self.mask, self.cache = other.members, other.mask, other.cache
            return
        sizes = [(cohort, *cohort.mask.shape) for cohort in (self, other)]
        length = max(self.mask.shape[1], other.mask.shape[1])
        try:
            self._shift(length - self.mask.shape[1])
            other._shift(length - other.mask.shape[1])
            self.mask = torch.cat([self.mask, other.mask])
            # Layer by layer, in place: memory for all of them twice is what there may not be.
            for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
                mine.keys = torch.cat([mine.keys, theirs.keys])
                mine.values = torch.cat([mine.values, theirs.values])
        except BaseException:
            for cohort, rows, width in sizes:
                cohort._cut(rows, width)
            raise
        self.members += other.members
        other.members = []

    def _cut(self, rows: int, width: int) -> None:
        """Leave the first rows, and the right edge, whichever of its tensors have more."""
        self.mask = self.mask[:rows, -width:]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:rows, :, -width:], layer.values[:rows, :, -width:]

    def divide(self, keys: Sequence[object]) -> list[Cohort]:
        """Part it into cohorts of members with the same key; it is not to be used any more then.

        After an error it is as it was.
        """
        rows: dict[object, list[int]] = {}
        for row, key in enumerate(keys):
            rows.setdefault(key, []).append(row)
        if len(rows) < 2:
            return [self]
        return [self._part(of_key) for of_key in rows.values()]

    def _part(self, rows: list[int]) -> Cohort:
        part = copy.copy(self)
        at = torch.tensor(rows, device=self.mask.device)
        part.members, part.mask = [self.members[row] for row in rows], self.mask[at]
        part.cache = DynamicCache(config=self.model.config)
        for number, layer in enumerate(self.cache.layers):
            part.cache.update(layer.keys[at], layer.values[at], number)
        part._shift(-int(part.mask.argmax(1).min()))
        return part

    def _shift(self, by: int) -> None:
        """Add padding on the left, or take some away (a negative number)."""
        if not by:
            return
        self.mask = nn.functional.pad(self.mask, (by, 0))
        for layer in self.cache.layers:
            # (batch, heads, length, size)
            layer.keys = nn.functional.pad(layer.keys, (0, 0, by, 0))
            layer.values = nn.functional.pad(layer.values, (0, 0, by, 0))
