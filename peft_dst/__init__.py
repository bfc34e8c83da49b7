"""Dynamic Subset Tuning for Hugging Face PEFT.

Importing this package registers the method with PEFT; from then on `DSTConfig` works wherever PEFT's own configs do.
"""

from .registration import register


register()

from .analysis import overlap  # noqa: E402
from .config import DSTConfig  # noqa: E402
from .extraction import extract  # noqa: E402
from .subsets import change_scores, combined_scores, load_scores, save_scores, score_parameters  # noqa: E402
from .training import DSTCallback, DSTOptimizer, create_dst_optimizer, parameter_groups  # noqa: E402
from .tuner.constraints import set_training_steps  # noqa: E402
from .tuner.hotswap import hotswap_adapter  # noqa: E402
from .tuner.model import DSTModel  # noqa: E402
from .tuner.rescale import rescale_adapter_scale  # noqa: E402
from .tuner.static import fix_subset, start_from  # noqa: E402


__version__ = "0.1.0"
__all__ = [
    "DSTCallback",
    "DSTConfig",
    "DSTModel",
    "DSTOptimizer",
    "change_scores",
    "combined_scores",
    "create_dst_optimizer",
    "extract",
    "fix_subset",
    "hotswap_adapter",
    "load_scores",
    "overlap",
    "parameter_groups",
    "register",
    "rescale_adapter_scale",
    "save_scores",
    "score_parameters",
    "set_training_steps",
    "start_from",
]
