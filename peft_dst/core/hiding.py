"""Parameters out of an optimizer's groups for a step: whatever it does to those without a gradient, it passes them by."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.optim import Optimizer


class Hidden:
    """What is out of an optimizer's groups; true while there is any.

    Where two hide parameters of one optimizer, the second one is to restore its own first.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[dict[str, Any], list[Any]]] = []

    def __bool__(self) -> bool:
        return bool(self._groups)

    def hide(self, optimizer: Optimizer, parameters: Collection[int]) -> None:
        """Take the parameters of these `id`s out of the groups of an optimizer."""
        for group in optimizer.param_groups if parameters else []:
            kept = [parameter for parameter in group["params"] if id(parameter) not in parameters]
            if len(kept) < len(group["params"]):
                self._groups.append((group, group["params"]))
                group["params"] = kept

    def restore(self) -> None:
        """Give the optimizer its parameters back."""
        for group, parameters in self._groups:
            group["params"] = parameters
        self._groups.clear()
