"""What stands in the place of a gradient that was used in the backward pass and freed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ReleasedGradient(Tensor):
    """In the place of a gradient that has been used and freed: holds its norm, and refuses to be read or changed.

    The norm is what Trainer logs whether it clips or not. Multiplying by one, as clipping does while the total norm is
    within its limit, is no change.
    """

    norm_before: Tensor

    @staticmethod
    def of(gradient: Tensor) -> ReleasedGradient:
        nothing = torch.empty((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)
        released = Tensor._make_subclass(ReleasedGradient, nothing)
        # Those of sparse embeddings come in parts.
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        released.norm_before = torch.linalg.vector_norm(values, 2.0)
        return released

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args)
        if function is torch.linalg.vector_norm and args[1:] == (2.0,) and not kwargs:
            return args[0].norm_before
        if function is Tensor.mul_ and isinstance(args[1], Tensor) and args[1].numel() == 1 and float(args[1]) == 1.0:
            return args[0]
        raise RuntimeError(
            "this gradient has been used and freed in the backward pass (release_gradients=True), so it can be neither "
            "clipped, nor scaled, nor read. Switch that off (max_grad_norm=0 in TrainingArguments, no GradScaler), or "
            "make the DSTOptimizer with release_gradients=False."
        )

    def __repr__(self, **unused: Any) -> str:  # type: ignore[override]
        return "ReleasedGradient()"


# What may be asked of it on the way to its norm. (Properties reach a subclass by their getters.)
_HARMLESS = {
    vars(torch._C.TensorBase)[name].__get__ for name in ("device", "dtype", "shape", "layout", "requires_grad")
}


def gradient(parameter: nn.Parameter) -> Tensor | None:
    """A parameter's gradient, if it has one that was not released."""
    return None if type(parameter.grad) is ReleasedGradient else parameter.grad
