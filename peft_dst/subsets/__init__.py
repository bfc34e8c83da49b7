"""Static subsets: which components are free, chosen once before training (the paper on optimal subsets, Sections 2.1, 3.1).

Every strategy there is one score a component, and the same choice: in each silo the budget's largest scores. So there
are small functions that score, and one that chooses. Imports torch, numpy, safetensors, tqdm and `core`; nothing here
knows of PEFT or transformers.

* `scores`    what is computed from the weights alone, or from other scores
* `gradients` the empirical Fisher information, from a model and a task's data
* `batches`   a dataloader's batches, example by example
* `files`     scores on disk
* `cache`     a pass over the data that can be resumed
* `choice`    scores, silos and budgets to positions
"""

from .choice import choose
from .files import load_scores, save_scores
from .gradients import DEFINITIONS, score_parameters
from .scores import Scores, change_scores, check_scores, combined_scores, is_bias, magnitude_scores, random_scores


__all__ = [
    "DEFINITIONS",
    "Scores",
    "change_scores",
    "check_scores",
    "choose",
    "combined_scores",
    "is_bias",
    "load_scores",
    "magnitude_scores",
    "random_scores",
    "save_scores",
    "score_parameters",
]
