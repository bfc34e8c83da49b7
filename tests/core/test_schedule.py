"""At which steps the subset is chosen."""

from __future__ import annotations

import pytest

from peft_dst.core import Schedule


@pytest.mark.parametrize(
    ("schedule", "chosen"),
    [
        (Schedule(), [1, 2, 3, 4, 5, 6, 7, 8]),
        (Schedule(stop=1), [1]),
        (Schedule(interval=3), [1, 4, 7]),
        (Schedule(interval=3, stop=4), [1, 4]),
        (Schedule(interval=2, stop=0.5), [1, 3]),
        (Schedule(stop=0.01), [1]),
    ],
)
def test_steps_by_hand(schedule, chosen):
    assert [step for step in range(1, 9) if schedule.chooses(step, 8)] == chosen


def test_a_fraction_needs_to_know_the_whole():
    with pytest.raises(RuntimeError, match="set_training_steps"):
        Schedule(stop=0.5).chooses(1, None)
    assert Schedule(stop=5).chooses(5, None)
