"""Scores: how much a component should be among the free ones, a non-negative float32 for each.

What is meant by "the paper" here is the second one, on optimal subsets: *Parameter-Efficient Fine-Tuning: Is There An
Optimal Subset of Parameters to Tune?* Its Section 3.1 compares these strategies.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor


# Parameter name → finite, non-negative float32 tensor of the parameter's shape, on the CPU.
Scores: TypeAlias = Mapping[str, Tensor]

# Components of a tile: its uint64 scratch stays in the cache.
_TILE = 1 << 16
# SplitMix64's constants (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def random_scores(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Uniform noise: the paper's random baseline.

    A hash of (seed, name, flat index) in integer arithmetic, so that one random seed means the same subset on every
    platform, in every version of torch and numpy, and whatever else is scored. It is the stream of SplitMix64 that
    starts at BLAKE2b-64 of "seed:name"; its upper 24 bits, plus one, are the score's.

    Args:
        name: the parameter's name.
        shape: its shape, e.g. (1024, 512).
        seed: the random seed, any integer (not the seed of the glossary).

    Returns:
        Scores in (0, 1], multiples of 2^-24, float32 of that shape.
    """
    key = np.uint64(int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little"))
    scores = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
    flat = scores.view(-1).numpy()
    for start in range(0, flat.size, _TILE):
        stop = min(start + _TILE, flat.size)
        z = np.arange(start + 1, stop + 1, dtype=np.uint64)
        z *= _GOLDEN
        z += key
        z ^= z >> np.uint64(30)
        z *= _MIX_1
        z ^= z >> np.uint64(27)
        z *= _MIX_2
        z ^= z >> np.uint64(31)
        z >>= np.uint64(40)
        flat[start:stop] = z  # 24 bits: exact
        flat[start:stop] += np.float32(1)
        flat[start:stop] *= np.float32(2**-24)
    return scores


def magnitude_scores(parameter: Tensor) -> Tensor:
    """|θ0|: large weights are the free ones (ours, for comparison; pruning's oldest criterion).

    Args:
        parameter: the seed's values, any shape and floating dtype.

    Returns:
        Scores, float32 of that shape.
    """
    return parameter.detach().to("cpu", torch.float32, copy=True).abs_()


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias, by its name: BitFit's subset is all components of these and no others.

    BitFit (Zaken, Goldberg and Ravfogel 2022) tunes every bias term of the encoder, LayerNorm's among them. A bias is
    called `bias`, or ends in `_bias` (torch's `in_proj_bias`); T5's `relative_attention_bias.weight` is a table of
    embeddings and is none.

    Args:
        name: the parameter's full name, e.g. "encoder.layer.0.output.LayerNorm.bias".
    """
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


def combined_scores(downstream: Scores, pretraining: Scores) -> dict[str, Tensor]:
    """G = F̃_downstr / (1 + F̃_pretr) (the paper, Eq. 3): large for the task and not already large in pretraining.

    The 1 has the scale of a squared gradient: where all of F̃_pretr is far below it, G ranks as F̃_downstr does.

    Args:
        downstream: the Fisher information on the task's data.
        pretraining: the same on pretraining data; it may have more names.

    Returns:
        G, for every name of `downstream`.

    Raises:
        ValueError: if the pretraining scores lack a name or have another shape, or if either are not scores.
    """
    check_scores(downstream)
    remedy = "Score both with the same model and `names`; a new head has no pretraining: leave it out of `names`."
    _check_pair(downstream, pretraining, "the pretraining scores", "the downstream scores", remedy)
    check_scores({name: pretraining[name] for name in downstream})
    return {name: score / (1 + pretraining[name]) for name, score in downstream.items()}


def change_scores(seed: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|Θ − Θ0|: the components that full fine-tuning moved furthest.

    Diff pruning (Guo, Rush and Kim 2021) in the paper's variant: the model is fine-tuned whole, with an L1 penalty on
    Θ − Θ0 in place of the relaxed L0, and pruned once. Keeping Θ there is "without re-training"; training that subset
    anew from Θ0 is "with re-training".

    Args:
        seed: Θ0, name → tensor of any shape and floating dtype.
        tuned: Θ, likewise; it may have more names (a head).

    Returns:
        Scores for every name of `seed`; the difference is taken in float32, or float64 where a tensor has it.

    Raises:
        ValueError: if `tuned` lacks a name or has another shape.
    """
    remedy = "Both must be states of one model: take `tuned` from the model that was fine-tuned from `seed`."
    _check_pair(seed, tuned, "the tuned model", "the seed", remedy)
    scores = {}
    for name, before in seed.items():
        wide = torch.promote_types(torch.promote_types(before.dtype, tuned[name].dtype), torch.float32)
        after = tuned[name].detach().to("cpu", wide, copy=True)
        scores[name] = after.sub_(before.detach().to("cpu", wide)).abs_().to(torch.float32)
    return scores


def _check_pair(one: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str, beside: str, remedy: str) -> None:
    for name, tensor in one.items():
        if name not in other:
            raise ValueError(f"{name!r} is missing in {what}. {remedy}")
        if other[name].shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(other[name].shape)} in {what}, {tuple(tensor.shape)} in {beside}. {remedy}"
            )


def check_scores(scores: Scores, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
    """Check that scores are such: float32, on the CPU, finite, not negative.

    Args:
        scores: what is to be checked.
        shapes: parameter name → its shape, where that is known; names that are not in it are not looked up.

    Raises:
        ValueError: naming the first parameter that is wrong, and the remedy.
    """
    for name, score in scores.items():
        if score.dtype != torch.float32 or not score.is_cpu:
            raise ValueError(
                f"the score of {name!r} is {score.dtype} on {score.device}; scores are float32 on the CPU. "
                "Convert it: `score.float().cpu()`."
            )
        if shapes is not None and name in shapes and tuple(score.shape) != tuple(shapes[name]):
            raise ValueError(
                f"the score of {name!r} has shape {tuple(score.shape)}, the parameter {tuple(shapes[name])}. The scores "
                "are another model's: score this one."
            )
        if score.numel():
            # Both are NaN if any score is.
            low, high = (float(value) for value in score.aminmax())
            if not (low >= 0 and high < math.inf):
                raise ValueError(
                    f"the score of {name!r} has values from {low} to {high}; scores are finite and not negative. Was it "
                    "computed in float16, or is it a file of weights? Score the model again in float32 or bfloat16."
                )
