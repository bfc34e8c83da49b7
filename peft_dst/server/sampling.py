"""How the next token is picked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """What a client asks for.

    Attributes:
        temperature: 0 takes the most probable token, and so does next to nothing.
        top_p: sampling is from the fewest tokens whose probabilities reach this sum.
        seed: of this sequence's own random numbers; None for any.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def generator(self) -> torch.Generator:
        """Random numbers that nobody else takes from."""
        made = torch.Generator()
        made.seed() if self.seed is None else made.manual_seed(self.seed)
        return made


GREEDY = Sampling()


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token.

    Args:
        logits: floating (v,).
        sampling: how.
        generator: where random numbers come from.

    Raises:
        ArithmeticError: if the logits have no finite maximum.
    """
    best = int(logits.argmax())
    # Single tokens may be ruled out by -inf; NaN counts as the maximum.
    if not math.isfinite(top := float(logits[best])):
        raise ArithmeticError(f"no token can be picked: the model's largest logit is {top}.")
    if sampling.temperature == 0:
        return best
    # In double precision on the CPU: the same for every device and batch, up to the logits' own rounding. The maximum stays
    # 0 however small the temperature is, and the others go to -inf.
    probabilities = ((logits.double().cpu() - top) / sampling.temperature).softmax(0)
    if sampling.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probabilities = torch.zeros_like(probabilities).scatter(0, tokens, ordered * (before < sampling.top_p))
    return int(torch.multinomial(probabilities, 1, generator=generator))
