import pytest
import torch

from peft_dst.core import distance


def test_by_hand():
    seed = torch.tensor([2.0, -0.5, 4.0])
    updated = torch.tensor([3.0, -0.25, 4.0])
    assert distance("absolute", seed, updated).tolist() == [1.0, 0.25, 0.0]
    assert distance("relative", seed, updated).tolist() == [0.5, 0.5, 0.0]
    assert distance("inverse_relative", seed, updated).tolist() == [2.0, 0.125, 0.0]


def test_relative_distance_to_a_zero_seed_is_defined():
    seed = torch.tensor([0.0, 0.0, 0.0, 1e-3, -0.0])
    updated = torch.tensor([0.0, 1e-6, -1e-2, 1e3, 1e4])
    delta = distance("relative", seed, updated)
    assert torch.isfinite(delta).all()
    assert delta[0] == 0
    # What leaves zero ranks above all else, by how far it went.
    assert delta.argsort(descending=True).tolist() == [4, 2, 1, 3, 0]


@pytest.mark.parametrize("kind", ["absolute", "relative", "inverse_relative"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(kind, dtype):
    seed, updated = torch.randn(2, 100).to(dtype)
    delta = distance(kind, seed, updated)
    assert delta.dtype == torch.float32
    assert torch.equal(delta, distance(kind, seed.float(), updated.float()))


def test_inputs_stay_and_unknown_is_named():
    seed, updated = torch.randn(2, 10, dtype=torch.float64)
    before = seed.clone(), updated.clone()
    assert distance("inverse_relative", seed, updated).dtype == torch.float64
    assert torch.equal(seed, before[0])
    assert torch.equal(updated, before[1])
    with pytest.raises(ValueError, match=r"'euclid'.*inverse_relative"):
        distance("euclid", seed, updated)
