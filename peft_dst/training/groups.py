"""Two learning rates: one for the subset, one for what is trained densely beside it.

A component must outgrow all others of its silo to stay in the subset, so the subset wants a learning rate ten to a
hundred times that of a fresh head (Appendix F of the DST paper: the smaller ε, the larger the best rate).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..tuner.layer import markers
from ..tuner.settling import settle


def parameter_groups(
    model: nn.Module, *, lr: float, head_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer parameter groups: the parameters under the constraint, and the other trainable ones.

    Args:
        model: a model with an active DST adapter, as `get_peft_model` or `model.add_adapter` leaves it.
        lr: learning rate of the parameters under the constraint.
        head_lr: learning rate of everything else that is trainable (`modules_to_save`); needed if there is anything.
        weight_decay: of the second group. The first has none: decay pulls on all of its components, also on those that
            are reset anyway, and distorts which are selected.

    Returns:
        Groups named "subset" and "dense" for any `torch.optim` class; the second only if there is anything in it.

    Raises:
        ValueError: if the model has no trainable parameter under a constraint, or others and no head_lr.
    """
    if hasattr(model, "peft_config"):
        # transformers' own load_adapter leaves this to the first forward pass.
        settle(model)
    weights = [weight for _, marker in markers(model) for weight in marker.weights.values()]
    # Of a fixed subset the values are trained, and its weights get gradients that are gathered for these.
    constrained = {id(weight.parameter if weight.free is None else weight.free) for weight in weights}
    gathered = {id(weight.parameter) for weight in weights if weight.free is not None}
    trainable = [
        parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in gathered
    ]
    subset = [parameter for parameter in trainable if id(parameter) in constrained]
    dense = [parameter for parameter in trainable if id(parameter) not in constrained]
    if not subset:
        raise ValueError(
            "the model has no trainable parameter under a DST constraint. Wrap it with get_peft_model(model, "
            "DSTConfig(...)), or activate a trainable adapter with set_adapter(name), before making the optimizer."
        )
    groups = [{"name": "subset", "params": subset, "lr": lr, "weight_decay": 0.0}]
    if dense:
        if head_lr is None:
            raise ValueError(
                f"{len(dense)} tensors are trained densely beside the subset (modules_to_save). Give them a learning rate "
                "of their own, head_lr; a tenth to a hundredth of lr is usual."
            )
        groups.append({"name": "dense", "params": dense, "lr": head_lr, "weight_decay": weight_decay})
    return groups


def create_dst_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer with the two learning rates of `parameter_groups`, e.g. for `Trainer(optimizers=(optimizer, None))`.

    Args:
        model: a model with an active DST adapter.
        optimizer_cls: any `torch.optim` optimizer class that knows weight decay.
        lr: learning rate of the parameters under the constraint.
        head_lr: learning rate of everything else that is trainable; needed if there is anything.
        weight_decay: of everything else; the parameters under the constraint have none.
        **kwargs: passed to the optimizer class, e.g. betas.
    """
    groups = parameter_groups(model, lr=lr, head_lr=head_lr, weight_decay=weight_decay)
    return optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
