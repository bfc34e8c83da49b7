"""The learning rate of a recipe that gives none (docs/choosing.md): a rule drawn from our own sweeps."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from ..config import DEFAULT_EPSILON, DSTConfig
from .options import AUTO, Recipe
from .search import rounded


# At each budget what was chosen on validation data, or near it: one rate serves several methods. Under AdamW with a linear
# schedule (results/minilm).
BY_EPSILON = {
    "moving": {1e-5: 5e-2, 1e-4: 2e-2, 1e-3: 1e-2, 1e-2: 5e-3, 1.0: 1e-4},
    "random": {1e-5: 5e-1, 1e-4: 1e-1, 1e-3: 2e-2, 1e-2: 1e-2, 1.0: 1e-4},
    "scored": {1e-5: 1e-2, 1e-4: 2e-3, 1e-3: 1e-3, 1e-2: 5e-4, 1.0: 1e-4},
    "lora": {1e-5: 5e-3, 1e-4: 2e-3, 1e-3: 2e-3, 1e-2: 2e-3},
}
KINDS = {
    **dict.fromkeys(("dynamic", "first_step", "magnitude", "transfer"), "moving"),
    **dict.fromkeys(("fisher", "fisher_pretraining", "combined", "diff_pruning"), "scored"),
    "random": "random",
    "lora": "lora",
}
FULL = 1e-4
# Of methods whose rate does not go by the budget.
FIXED = {
    "bitfit": 2e-3,
    "prompt_tuning": 2e-1,
    "l2": 2e-4,
    # Of l1 nothing has been measured.
    **dict.fromkeys(("full", "l1", "pruning", "head_only"), FULL),
}


def settled(recipe: Recipe) -> Recipe:
    """The recipe with a number where its learning rate is `auto`.

    Raises:
        ValueError: if there is no rule: for an optimizer other than AdamW, a budget that is given as a number, or another
            distance than the default.
    """
    if recipe.training.learning_rate != AUTO:
        return recipe
    if recipe.training.optimizer != "adamw":
        raise ValueError(
            f"training.learning_rate=auto is a rule for adamw, not for {recipe.training.optimizer}; give a number."
        )
    method = recipe.method
    ranked = method.name == "lora" and method.rank is not None
    if method.name in KINDS and method.num_free_parameters is not None and not ranked:
        raise ValueError(
            "training.learning_rate=auto goes by method.epsilon, not by method.num_free_parameters; give either that "
            "fraction or a learning rate."
        )
    if method.name in ("dynamic", "first_step") and method.distance not in (None, DSTConfig.distance):
        raise ValueError(
            f"training.learning_rate=auto is a rule for the distance {DSTConfig.distance}; {method.distance} wants another "
            "rate, up to ten times as large or a fifth of it. Give a number, or search."
        )
    if method.name == "diff_pruning" and method.pruning_learning_rate is None:
        # The training that is pruned is another one.
        method = replace(method, pruning_learning_rate=FULL)
    rate = by_rule(method.name, DEFAULT_EPSILON if method.epsilon is None else method.epsilon)
    return replace(recipe, method=method, training=replace(recipe.training, learning_rate=rate))


def by_rule(method: str, epsilon: float) -> float:
    """A method's learning rate at a budget, a member of the series 1, 2, 5, 10 and so on.

    Between measured budgets it goes straight on double logarithmic scales; beyond them it stays.

    Args:
        method: as `method.name`.
        epsilon: fraction of the body that is trained.
    """
    if method in FIXED:
        return FIXED[method]
    known = sorted(BY_EPSILON[KINDS[method]].items())
    epsilon = min(max(epsilon, known[0][0]), known[-1][0])
    (low, start), (high, end) = next(pair for pair in itertools.pairwise(known) if epsilon <= pair[1][0])
    part = math.log(epsilon / low) / math.log(high / low)
    return rounded(start * (end / start) ** part)
