import numpy as np
import pytest
import torch

from peft_dst.core import DISTANCES, NonFiniteDistanceError, select, tiles
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


@pytest.mark.parametrize("tile", [1 << 10, 1 << 14, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_any_size_find_the_same(tile, dtype, monkeypatch):
    """Those of a GPU, as those of a CPU."""
    seeds = [torch.randn(n).to(dtype) for n in (5, 1, 200_000, 64, 33_001)]
    updates = [seed.float() + 0.01 * torch.randn(seed.shape) for seed in seeds]
    monkeypatch.setattr(tiles, "tile_size", lambda device, size: tile)
    for budget in (1, 200, 2_000, 50_000, 233_071):
        assert_selected([seed.float() for seed in seeds], updates, budget, "inverse_relative")
        own = select(seeds, updates, budget, "inverse_relative")
        wanted = select([seed.float() for seed in seeds], updates, budget, "inverse_relative")
        assert [i.tolist() for i in own.indices] == [i.tolist() for i in wanted.indices]


def test_how_large_tiles_are():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert {tiles.tile_size(cpu, n) for n in (0, 10**6, 10**9)} == {1 << 17}
    sizes = (0, 10**6, 1 << 25, (1 << 26) - 1, 1 << 26, 1 << 27, 10**10)
    assert [tiles.tile_size(gpu, n).bit_length() - 1 for n in sizes] == [22, 22, 22, 22, 23, 24, 24]


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


def test_a_silo_of_nothing():
    assert [i.tolist() for i in select([torch.empty(0)], [torch.empty(0)], 0, "absolute").indices] == [[]]


@pytest.mark.parametrize("fraction", [0.003, 0.01, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["sparse", "rows", "ties", "sorted", "two_scales"])
def test_distributions_that_mislead_a_sample(kind, fraction):
    """Whatever the guess, the counts tell; a wrong one costs another pass and never a component."""
    n = 400_000
    delta = {
        "sparse": lambda: torch.rand(n) * (torch.rand(n) < 0.02),
        "rows": lambda: (torch.rand(n // 400, 1) * (torch.rand(n // 400, 1) < 0.1)).expand(-1, 400).flatten(),
        "ties": lambda: torch.randint(0, 3, (n,)) / 4,
        "sorted": lambda: torch.linspace(0, 1, n),
        # Just those components are large that a sample of every seventh does not look at.
        "two_scales": lambda: torch.where(torch.arange(n) % 7 == 3, 1 + torch.rand(n), 1e-3 * torch.rand(n)),
    }[kind]()
    seeds = [torch.zeros(n - 1000), torch.zeros(1000)]
    assert_selected(seeds, list(delta.split([n - 1000, 1000])), int(n * fraction), "absolute")


def test_mixed_dtypes():
    seeds = [torch.randn(300_000), torch.randn(50_000).double(), torch.randn(3000).bfloat16()]
    updates = [seed + 0.01 * torch.randn_like(seed) for seed in seeds]
    for budget in (5, 1000, 100_000):
        assert_selected(seeds, updates, budget, "inverse_relative")


def test_updates_wider_than_their_seeds():
    """A float32 working copy of a bfloat16 weight: distances are those of float32."""
    seeds = [torch.randn(100_000).bfloat16(), torch.randn(500)]
    updates = [seed.float() + 1e-4 * torch.randn(seed.shape) for seed in seeds]
    for budget in (5, 1000, 30_000, 100_499):
        selection = select(seeds, updates, budget, "inverse_relative")
        wanted = select([seed.float() for seed in seeds], updates, budget, "inverse_relative")
        assert [i.tolist() for i in selection.indices] == [i.tolist() for i in wanted.indices]


def test_silos_beyond_the_reach_of_int32():
    """Zeros that are only read take no memory, so a tensor of more than 2^31 components can be had."""
    n = 2**31 + 70_000
    seed = torch.from_numpy(np.zeros(n, dtype=np.float16))
    updated = torch.from_numpy(np.zeros(n, dtype=np.float16))
    at = [5, 2**31 - 1, 2**31, 2**31 + 1, n - 1]
    updated[at] = torch.tensor([1.0, 5.0, 2.0, 3.0, 4.0], dtype=torch.float16)
    more = [torch.zeros(10), torch.full((10,), 2.5)]
    selection = select([seed, more[0]], [updated, more[1]], 6, "absolute")
    assert selection.indices[0].tolist() == [2**31 - 1, 2**31 + 1, n - 1]
    assert selection.indices[1].tolist() == [0, 1, 2]
    assert selection.threshold == 2.5
