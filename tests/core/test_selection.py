import pytest
import torch

from peft_dst.core import DISTANCES, NonFiniteDistanceError, select
from peft_dst.core.reference import reference_step


def reference(seeds, updates, budget, kind):
    names = [str(i) for i in range(len(seeds))]
    _, subset = reference_step(
        dict(zip(names, seeds, strict=True)), dict(zip(names, updates, strict=True)), {"s": names}, {"s": budget}, kind
    )
    return list(subset.values())


def assert_selected(seeds, updates, budget, kind):
    selection = select(seeds, updates, budget, kind)
    for mine, wanted in zip(selection.indices, reference(seeds, updates, budget, kind), strict=True):
        assert mine.tolist() == wanted.tolist()
    return selection


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("sizes", [(1,), (7,), (1024,), (70_001,), (5, 1, 3000, 64, 131_073)])
def test_equals_a_full_sort(sizes, kind):
    seeds = [torch.randn(n) for n in sizes]
    updates = [seed + 0.01 * torch.randn_like(seed) for seed in seeds]
    n = sum(sizes)
    for budget in sorted({0, 1, 2, n // 1000, n // 100, n // 10, n // 2, n - 1, n} & set(range(n + 1))):
        selection = assert_selected(seeds, updates, budget, kind)
        assert sum(i.numel() for i in selection.indices) == budget


@pytest.mark.parametrize("budget", [1, 10, 100, 4000, 9999])
def test_ties_go_to_the_lower_tensor_and_index(budget):
    # Distances of few different values, some zero: ties everywhere, also at the threshold.
    seeds = [torch.ones(n) for n in (3000, 17, 6983)]
    updates = [1 + torch.randint(0, 4, seed.shape) / 8 for seed in seeds]
    assert_selected(seeds, updates, budget, "absolute")


def test_all_equal_distances_keep_the_first():
    seeds, updates = [torch.zeros(2000), torch.zeros(50)], [torch.ones(2000), torch.ones(50)]
    selection = select(seeds, updates, 2010, "absolute")
    assert selection.indices[0].tolist() == list(range(2000))
    assert selection.indices[1].tolist() == list(range(10))
    assert selection.threshold == 1


def test_fewer_non_zero_distances_than_budget():
    seeds, updates = [torch.zeros(5000)], [torch.zeros(5000)]
    updates[0][[17, 4000]] = 1.0
    assert select(seeds, updates, 100, "absolute").indices[0].tolist() == [17, 4000]
    assert select(seeds, [torch.zeros(5000)], 100, "absolute").indices[0].tolist() == []


def test_full_budget_keeps_all_that_moved_even_at_distance_zero():
    seeds, updates = [torch.tensor([0.0, 1.0, 0.0, 2.0])], [torch.tensor([5.0, 1.0, -0.0, 3.0])]
    # A zero seed has the inverse-relative distance zero; -0.0 has other bits than 0.0.
    assert select(seeds, updates, 4, "inverse_relative").indices[0].tolist() == [0, 2, 3]
    assert select(seeds, updates, 3, "inverse_relative").indices[0].tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    seeds = [torch.randn(3000).to(dtype), torch.randn(70_000).to(dtype)]
    updates = [(seed + 0.1 * torch.randn_like(seed)).to(dtype) for seed in seeds]
    for budget in (1, 73, 7300):
        assert_selected(seeds, updates, budget, "inverse_relative")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_is_found(value):
    seeds = [torch.randn(100), torch.randn(5000)]
    updates = [seed.clone() for seed in seeds]
    updates[1][4321] = value
    with pytest.raises(NonFiniteDistanceError) as caught:
        select(seeds, updates, 10, "absolute")
    assert caught.value.position == 1


def test_empty_tensors_and_zero_dimensional_ones():
    seeds = [torch.empty(0), torch.tensor([1.0]), torch.empty(0)]
    updates = [torch.empty(0), torch.tensor([2.0]), torch.empty(0)]
    assert [i.tolist() for i in select(seeds, updates, 1, "absolute").indices] == [[], [0], []]


def test_overflowing_sum_of_finite_distances_is_no_error():
    seeds, updates = [torch.zeros(4)], [torch.full((4,), 3e38)]
    assert select(seeds, updates, 2, "absolute").indices[0].tolist() == [0, 1]
