"""Between DSTOptimizer and the fused AdamW kernels: where they are wanted, and which silos they can step."""

from __future__ import annotations

import functools
import warnings

import torch
from torch.optim import Optimizer

from ..core import Constraint, Silo, adamw
from ..core.adamw import Groups, State
from ..core.kernels import available, failure


# Where the kernels are used unasked.
BY_DEFAULT = "cuda"


def wanted(kernels: bool | None, device: torch.device) -> bool:
    """Whether the kernels are to step what is on a device, wherever they can.

    Args:
        kernels: what `DSTOptimizer` was told.
        device: the device. The first time that it is met, a kernel is tried there.

    Raises:
        RuntimeError: if they were asked for and cannot be compiled.
    """
    if not (device.type == BY_DEFAULT if kernels is None else kernels):
        return False
    error = failure(device)
    if error is not None and kernels:
        raise RuntimeError(_remedy(device, error)) from error
    if error is not None:
        warn_once(device, error)
    return error is None


@functools.cache
def warn_once(device: torch.device, error: Exception) -> None:
    warnings.warn(f"{_remedy(device, error)} Until then steps go that way.", RuntimeWarning, stacklevel=2)


def _remedy(device: torch.device, error: Exception) -> str:
    return (
        f"Triton cannot compile or load a kernel for {device}: {str(error).rstrip('.')}. It needs a C compiler (gcc or "
        "clang, or what CC names) and Python's headers, which slim images lack, and a driver that is new enough. Install "
        "them, or make the DSTOptimizer with kernels=False, which steps on working copies."
    )


def supports(engine: Optimizer, groups: Groups, state: State, constraint: Constraint, silo: Silo) -> bool:
    """Whether the kernels can make an optimizer's step of one silo and the selection after it (`core.adamw.supports`)."""
    return available(silo.weights[0].data) and adamw.supports(engine, groups, state, constraint, silo)
