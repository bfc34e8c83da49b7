"""What the choice sends is what the formula of docs/distributed.md says, and all that is sent besides FSDP's own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.distributed import Case, Traffic, count, project, traffic


USUAL = Case()


@pytest.mark.parametrize(
    ("world", "case"),
    [
        (2, USUAL),
        (4, USUAL),
        (4, replace(USUAL, through="DSTOptimizer", epsilon=0.3)),
        (2, replace(USUAL, siloing="none")),
        (2, replace(USUAL, layers=3, siloing="parameter")),
        (2, replace(USUAL, ties=True)),
        (4, replace(USUAL, ties=True, siloing="parameter")),
        (2, replace(USUAL, wide=True)),
        (4, replace(USUAL, mesh=(2, 2))),
    ],
)
def test_what_is_sent_is_what_the_formula_says(together, world, case):
    for row in together(world, count, case):
        counted, formula = row["counted"], row["formula"]
        assert counted["messages"] == formula["messages"]
        for what in ("payload", "sent"):
            assert counted[what] == pytest.approx(formula[what], rel=0.05)


def test_fsdp_sends_what_it_sends_without_us(together):
    (plain, *_), (ours, *_) = (together(2, count, replace(USUAL, through=through)) for through in ("plain", "hook"))
    assert plain["counted"] == {"messages": 0, "payload": 0, "sent": 0.0}
    assert plain["fsdp"] == ours["fsdp"]
    assert plain["fsdp"]["messages"] > 0


def test_by_hand():
    # Two silos: five numbers of four bytes, then three rounds of 2,048 counts of four bytes for each silo.
    assert traffic(2, [4], free=10) == Traffic(4, 20 + 3 * 2 * 8192, 1.5 * (20 + 3 * 2 * 8192))
    # Positions below 2^12 take two more rounds; int64 counts; two dimensions of a mesh.
    assert traffic(2, [4], free=10, largest=2**11, ties=True).messages == 6
    assert traffic(1, [2], free=2**30).payload == 12 + 3 * 16384
    assert traffic(2, [2, 4], free=10).payload == 2 * traffic(2, [4], free=10).payload


@pytest.mark.parametrize(("model", "silos"), [("7 B", 67), ("70 B", 163)])
def test_what_is_projected(model, silos):
    found = project(model)
    assert found["silos"] == silos
    assert found["share"] <= 0.01
    assert found["tied_share"] <= 0.01
