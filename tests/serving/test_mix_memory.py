"""What a pool holds for mixed batches, and lets go."""

from __future__ import annotations

import copy
import gc
import weakref

from tests.serving.helpers import pool_of
from tests.serving.mixtures import NAMES


def test_what_is_held_is_counted_and_let_go(twinned):
    pool, _ = twinned
    with pool.mix(NAMES):
        pass
    held = pool.statistics.nbytes
    ready = sum(pool.ready(name).nbytes for name in pool.names())
    assert held == ready + sum(pool._shelf.mixable(name).nbytes for name in pool.names())
    assert held > 2 * ready
    pool.remove("task0")
    assert pool.statistics.nbytes < held


def test_of_a_removed_delta_nothing_is_held(twinned):
    """Neither what the last mixed batch was made of, which the next one goes on with."""
    pool, _ = twinned
    with pool.mix(NAMES):
        held = {name: weakref.ref(pool._shelf.mixable(name)) for name in pool.names()}
    pool.remove("task1")
    gc.collect()
    assert held["task1"]() is None
    assert held["task0"]() is not None


def test_a_closed_pool_holds_nothing(twinned):
    pool, _ = twinned
    with pool.mix(NAMES):
        held = [weakref.ref(pool._shelf.mixable(name)) for name in pool.names()]
    pool.close()
    gc.collect()
    assert [one() for one in held] == [None] * 3


def test_without_a_budget_nothing_is_read_twice_in_a_row(twinned, tmp_path):
    pool, _ = twinned
    with pool_of(copy.deepcopy(pool.model), [tmp_path / "task0", tmp_path / "task1"], budget=0) as small:
        for _ in range(3):
            with small.mix(["task0", "task1"]):
                pass
        assert small.statistics.loads == 2
        for _ in range(3):
            with small.use("task0"):
                pass
        assert small.statistics.loads == 3
