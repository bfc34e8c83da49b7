"""Together or delta by delta: by what either took."""

from __future__ import annotations

import random

import pytest

from peft_dst.serving.planner import Costs, Planner


def test_costs_are_a_line_in_the_sizes():
    costs = Costs()
    for size, count in [(4, 2), (32, 8), (100, 3), (7, 7), (60, 1)]:
        costs.note((size, count), 0.01 + 0.002 * size + 0.003 * count)
    assert costs.expected((50, 4)) == pytest.approx(0.01 + 0.1 + 0.012, rel=1e-6)


def test_sizes_that_never_changed():
    costs = Costs()
    for _ in range(5):
        costs.note((8,), 0.2)
    assert costs.expected((8,)) == pytest.approx(0.2, rel=1e-3)


def test_what_is_long_past_does_not_count():
    costs = Costs(last=8)
    for size in range(1, 20):
        costs.note((size,), 5.0)
    for size in range(1, 9):
        costs.note((size,), 0.1 * size)
    assert costs.expected((4,)) == pytest.approx(0.4, rel=1e-6)


def simulate(alone, mixed, rounds: int = 400, seed: int = 0) -> tuple[Planner, list[bool]]:
    """A machine on which batches take so long, give or take a tenth."""
    rng, planner, decisions = random.Random(seed), Planner(), []
    for _ in range(rounds):
        sizes = [rng.randrange(1, 9) for _ in range(rng.randrange(2, 9))]
        together = planner.mixes(sizes)
        decisions.append(together)
        if together:
            planner.note(sizes, mixed(sizes) * rng.uniform(0.9, 1.1))
        else:
            for size in sizes:
                planner.note([size], alone(size) * rng.uniform(0.9, 1.1))
    return planner, decisions


def test_a_fixed_cost_of_a_batch_speaks_for_mixing():
    _, decisions = simulate(lambda n: 1.0 + 0.05 * n, lambda sizes: 1.2 + 0.06 * sum(sizes))
    assert sum(decisions[20:]) > 0.95 * len(decisions[20:])


def test_a_cost_of_mixing_speaks_against_it():
    _, decisions = simulate(lambda n: 0.001 + 0.05 * n, lambda sizes: 0.1 + 0.08 * sum(sizes))
    assert sum(decisions[20:]) < 0.05 * len(decisions[20:])
    assert any(decisions[20:]), "it is tried again now and then"


def test_it_depends_on_the_sizes():
    planner, _ = simulate(lambda n: 1.0 + 0.5 * n, lambda sizes: 1.0 + 0.8 * sum(sizes))
    # Two large ones: 2 + 0.5 * 16 = 10 against 1 + 0.8 * 16 = 13.8. Eight small ones: 8 + 4 = 12 against 1 + 6.4 = 7.4.
    assert [planner.mixes([8, 8]), planner.mixes([1] * 8)] == [False, True]


def test_it_follows_a_machine_that_changes():
    planner, _ = simulate(lambda n: 1.0, lambda sizes: 3.0)
    assert not planner.mixes([4, 4])
    for _ in range(70):
        planner.note([4, 4], 0.5)
    assert planner.mixes([4, 4])


def decided(together: float, apart: float, count: int = 160) -> list[bool]:
    """What is decided of two deltas of one size that take so long; the first mixed batch takes as long as a hundred."""
    planner, decisions = Planner(), []
    for _ in range(count):
        decisions.append(planner.mixes([4, 4]))
        if decisions[-1]:
            planner.note([4, 4], together if sum(decisions) > 1 else 100 * together)
        else:
            planner.note([4], apart / 2)
            planner.note([4], apart / 2)
    return decisions


def test_when_each_way_is_tried():
    """By turns until there are three batches of each, the first mixed one not counted; then at every fiftieth decision."""
    for together, apart, mixes in ((1.0, 2.0, True), (2.0, 1.0, False)):
        want = [True, True, False, True, True, False] + [mixes] * 154
        for number in (50, 100, 150):
            want[number - 1] = not mixes
        assert decided(together, apart) == want


def test_one_delta_is_not_mixed():
    assert not Planner().mixes([5])
    assert not Planner().mixes([])
