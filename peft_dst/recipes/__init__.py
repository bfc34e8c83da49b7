"""Recipes: experiments as files. What is trained, on what, how, and what came of it (docs/experiments.md).

Needs the extra `recipes`. Nothing but the command line imports this, and that only when it is asked to run one.

* `options`  what an experiment says
* `config`   read from files, and checked
* `checks`   ranges of numbers, splits that overlap
* `tasks`    data sets and what is asked of them
* `metrics`  what answers are worth
* `models`   the model at its seed, head and body
* `finished` what a finished run left, also as where another begins
* `trainer`  transformers' Trainer, as runs need it
* `lab`      what the stages of a run share
* `methods`  from a method's name to a model ready to train
* `snapshots` how a subset moves meanwhile
* `record`   what is written down
* `forgetting` what a causal model loses of its language
* `runner`   train and evaluate
* `comparison` a run as PEFT's comparison of methods writes it
* `rates`    a learning rate where none is given
* `search`   a value chosen on validation data
* `summary`  what came of many runs
* `cache`    what several sweeps of a folder share
* `processes` runs side by side
* `sweep`    many runs
* `report/`  a page and pictures of what came of them
"""

from .comparison import check_comparable, compared
from .config import at, load_recipe, make_recipe, points, to_dict
from .options import Recipe
from .rates import settled
from .record import results
from .report import report
from .runner import evaluate, only_own_bars, train
from .summary import rows_of, title
from .sweep import groups, sweep


__all__ = [
    "Recipe",
    "at",
    "check_comparable",
    "compared",
    "evaluate",
    "groups",
    "load_recipe",
    "make_recipe",
    "only_own_bars",
    "points",
    "report",
    "results",
    "rows_of",
    "settled",
    "sweep",
    "title",
    "to_dict",
    "train",
]
