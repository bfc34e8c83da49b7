import pytest
import torch

from peft_dst.core import allocate_budgets


def test_largest_remainder_by_hand():
    # Shares 0.5, 2.5, 7.0 of ten: the whole parts are 0, 2, 7, and the one left goes to the earlier of two halves.
    assert allocate_budgets([5, 25, 70], epsilon=0.1) == [1, 2, 7]
    assert allocate_budgets([3, 5], epsilon=1.0) == [3, 5]
    # Shares 0.2, 0.2, 1.6: the total is two, and the tiny silos get nothing.
    assert allocate_budgets([2, 2, 16], epsilon=0.1) == [0, 0, 2]


@pytest.mark.parametrize("epsilon", [1e-5, 1e-4, 3e-3, 0.017, 0.5, 1.0])
def test_total_is_exact_and_no_share_is_exceeded(epsilon):
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        sizes = [*torch.randint(1, 5000, (40,), generator=generator).tolist(), 300_000]
        budgets = allocate_budgets(sizes, epsilon=epsilon)
        assert sum(budgets) == round(epsilon * sum(sizes))
        for size, budget in zip(sizes, budgets, strict=True):
            assert epsilon * size - 1 < budget < epsilon * size + 1
            assert budget <= size


def test_absolute_budget():
    sizes = [10, 1000, 3, 50_000]
    budgets = allocate_budgets(sizes, num_free_parameters=777)
    assert sum(budgets) == 777
    assert all(777 * size / 51013 - 1 < b < 777 * size / 51013 + 1 for size, b in zip(sizes, budgets, strict=True))


def test_refusals():
    with pytest.raises(ValueError, match=r"epsilon=1e-05 leaves no free parameter among the 300.*epsilon >="):
        allocate_budgets([100, 200], epsilon=1e-5)
    with pytest.raises(ValueError, match=r"asks for 301 free parameters, but only 300"):
        allocate_budgets([100, 200], num_free_parameters=301)
    with pytest.raises(ValueError, match="exactly one"):
        allocate_budgets([100])
