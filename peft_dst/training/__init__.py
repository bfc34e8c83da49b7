"""Around training: DSTOptimizer, the two learning rates, and the callback that reports."""

from .callback import DSTCallback, subset_metrics, training_advice
from .groups import create_dst_optimizer, parameter_groups
from .optimizer import DSTOptimizer


__all__ = [
    "DSTCallback",
    "DSTOptimizer",
    "create_dst_optimizer",
    "parameter_groups",
    "subset_metrics",
    "training_advice",
]
