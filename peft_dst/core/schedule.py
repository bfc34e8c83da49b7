"""At which steps a subset is chosen anew: at every one, as the DST paper does, or less often (its Table 7, generalised)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """When the subset is chosen. In between, the components in it keep their updates and all others are reset.

    Attributes:
        interval: every so many steps, counted from the first.
        stop: the last step at which it may be (an integer from 1), or the same as a fraction of training; None for no end.
            1 is the paper's "no churn": the subset of the first step stays.
    """

    interval: int = 1
    stop: int | float | None = None

    @property
    def every_step(self) -> bool:
        return self.interval == 1 and self.stop is None

    def chooses(self, step: int, total: int | None) -> bool:
        """Whether the subset is chosen at a step.

        Args:
            step: number of the step, from 1.
            total: number of steps of the whole training, where it is known.

        Raises:
            RuntimeError: if the total is needed and not known.
        """
        if self.stop is not None and step > self._last(total):
            return False
        return (step - 1) % self.interval == 0

    def _last(self, total: int | None) -> int:
        if isinstance(self.stop, int):
            return self.stop
        assert self.stop is not None
        if total is None:
            raise RuntimeError(
                f"churn_stop={self.stop} is a fraction of training, and nobody has said how long that is. Add "
                "DSTCallback() to Trainer, call peft_dst.set_training_steps(model, n) before the first step, or give "
                "churn_stop as a number of steps."
            )
        return max(1, int(self.stop * total + 1e-9))


EVERY_STEP = Schedule()
