"""The method itself, on plain tensors: silos, budgets, distances, selection, and the step that enforces the constraint.

Nothing here knows of PEFT or transformers; the only imports besides the standard library are torch and numpy, and
Triton once a kernel is wanted.

* `silos`      which parameters compete with one another (names only)
* `budgets`    how many components of each silo may differ from the seed
* `distances`  how far a component has moved from its seed
* `tiles`      a silo's distances, computed a tile at a time and forgotten
* `selection`  the exact choice of a silo's subset
* `iterative`  the paper's approximate choice, with a tracked threshold
* `weights`    live weights that differ from their seed in a few known places
* `checksums`  whether the seed is still what it was
* `subset`     silos with their budgets, and what is free in them now
* `step`       an optimizer's step under way, and how it is ended or undone
* `schedule`   at which steps the subset is chosen
* `constraint` one adapter's constraint: what happens around an optimizer step
* `free`       training a subset that never changes
* `hiding`     parameters that an optimizer's step passes by
* `correction` what changed entries change in a layer's output
* `stacking`   the same for several groups of samples in one call (on a GPU by `correction_triton`)
* `hook`       the global optimizer hook that calls it, for any `torch.optim` optimizer
* `wrappers`   wrappers that step copies of the weights, which are refused
* `reference`  the same step, dense and plain, to test the fast one against
* `adamw`      which silos' AdamW step and choice can be made in one, and what such a step is given
* `adamw_tiles` how it is made on a CPU (`tiled_step` in an optimizer's place)
* `kernels`    how it is made on a GPU (with `kernels_triton`, and its plain `kernels_reference`)
"""

from .budgets import allocate_budgets
from .constraint import Constraint, concerned
from .distances import DISTANCES, distance
from .free import FixedStep
from .hook import exempt
from .schedule import Schedule
from .selection import Selection, select
from .silos import SILOINGS, partition
from .subset import Silo, Subset
from .tiles import NonFiniteDistanceError
from .weights import SparseWeight, gather, scatter


__all__ = [
    "DISTANCES",
    "SILOINGS",
    "Constraint",
    "FixedStep",
    "NonFiniteDistanceError",
    "Schedule",
    "Selection",
    "Silo",
    "SparseWeight",
    "Subset",
    "allocate_budgets",
    "concerned",
    "distance",
    "exempt",
    "gather",
    "partition",
    "scatter",
    "select",
]
