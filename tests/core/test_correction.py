"""Corrections of outputs against layers with the tuned weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from peft_dst.core.correction import (
    ROWS,
    correct_embedding,
    correct_linear,
    embedding_entries,
    linear_difference,
)


def changed(seed: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A record of k entries of a seed of any shape: positions, new values, seed values, and the tuned weight."""
    indices = torch.randperm(seed.numel())[:k].sort().values
    values = torch.randn(k).to(seed.dtype)
    tuned = seed.clone()
    tuned.view(-1)[indices] = values
    return indices, values, seed.view(-1)[indices], tuned


def dense_linear(input: Tensor, tuned: Tensor, inputs_first: bool) -> Tensor:
    """The plain twin: the layer with the whole tuned weight."""
    return input @ tuned if inputs_first else functional.linear(input, tuned)


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (ROWS + 7,), (3, ROWS), (0, 4)])
@pytest.mark.parametrize("k", [0, 1, 40, 17 * 23])
def test_linear_is_that_with_the_tuned_weight(inputs_first, leading, k):
    seed = torch.randn((17, 23) if not inputs_first else (23, 17), dtype=torch.float64)
    indices, values, seeds, tuned = changed(seed, k)
    input = torch.randn(*leading, 23, dtype=torch.float64)
    output = dense_linear(input, seed, inputs_first)
    difference = linear_difference(indices.int(), values, seeds, tuple(seed.shape), inputs_first)
    correct_linear(output, input, difference)
    assert torch.allclose(output, dense_linear(input, tuned, inputs_first), rtol=1e-12, atol=1e-12)
    untouched = torch.ones(17, dtype=torch.bool)
    untouched[difference.outputs] = False
    assert torch.equal(output[..., untouched], dense_linear(input, seed, inputs_first)[..., untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_in_lower_precision(dtype):
    seed = (torch.randn(48, 64) / 8).to(dtype)
    indices, values, seeds, tuned = changed(seed, 200)
    input = torch.randn(9, 64).to(dtype)
    output = functional.linear(input, seed)
    correct_linear(output, input, linear_difference(indices, values, seeds, (48, 64)))
    exact = functional.linear(input.double(), tuned.double())
    scale = functional.linear(input.double().abs(), tuned.double().abs()).max()
    assert output.dtype == dtype
    assert (output.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * scale
    # Autocast: the layer's input is float32, its output is not.
    mixed = functional.linear(input, seed)
    correct_linear(mixed, input.float(), linear_difference(indices, values.float(), seeds.float(), (48, 64)))
    assert torch.equal(mixed, output)


def test_a_part_of_a_batch_is_corrected_and_the_rest_is_not():
    seed = torch.randn(6, 4, dtype=torch.float64)
    indices, values, seeds, tuned = changed(seed, 7)
    input = torch.randn(5, 3, 4, dtype=torch.float64)
    output = functional.linear(input, seed)
    correct_linear(output[1:3], input[1:3], linear_difference(indices, values, seeds, (6, 4)))
    wanted = functional.linear(input, seed)
    wanted[1:3] = functional.linear(input[1:3], tuned)
    assert torch.allclose(output, wanted, rtol=1e-12)


def test_gradients_reach_the_input():
    seed = torch.randn(6, 4, dtype=torch.float64)
    indices, values, seeds, tuned = changed(seed, 7)
    input = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    output = functional.linear(input, seed)
    correct_linear(output, input, linear_difference(indices, values, seeds, (6, 4)))
    upstream = torch.randn(5, 6, dtype=torch.float64)
    output.backward(upstream)
    assert torch.allclose(input.grad, upstream @ tuned, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(40,), (4, 9), (2, 3, 5), (0, 3)])
@pytest.mark.parametrize("k", [0, 1, 30, 77])
def test_embedding_is_that_with_the_tuned_weight_bit_for_bit(dtype, shape, k):
    seed = torch.randn(11, 7).to(dtype)
    indices, values, _, tuned = changed(seed, k)
    tokens = torch.randint(0, 11, shape)
    output = functional.embedding(tokens, seed)
    correct_embedding(output, tokens, embedding_entries(indices, values, (11, 7)))
    assert torch.equal(output, functional.embedding(tokens, tuned))
