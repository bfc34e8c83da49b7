"""DSTCallback: what a person wants to see while training with transformers' Trainer.

The constraint itself needs no callback; it holds in any loop.
"""

from __future__ import annotations

import os
import statistics
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_tensorboard_available

from ..core import Constraint, SparseWeight
from ..core.shards import Together, together
from ..tuner.constraints import active_constraints, set_training_steps
from ..tuner.settling import settle
from .optimizer import DSTOptimizer


# With Adam and a rate below this a subset of MiniLM learns next to nothing on TREC, or 19 points less (results/README.md).
LOW = 1e-3
# Share of the tuned parameters up to which a budget is a small one: beyond it low rates are right (docs/choosing.md).
SMALL = 0.05


def subset_metrics(constraint: Constraint) -> dict[str, float]:
    """Figures on a constraint's current subset, for logging.

    They are of the whole model also where several processes hold it together, which then all have to ask.

    Returns:
        `dst/free_parameters` components that differ from the seed; `dst/churn` the share of them that the last step
        brought in; `dst/threshold` the median over silos of the smallest kept distance; `dst/share/<kind>` the share
        of the subset that lies in each kind of module.
    """
    weights = list(constraint.weights)
    arrived = [count for silo in constraint.silos for count in silo.arrived()]
    counts = torch.tensor([[weight.indices.numel() for weight in weights], arrived], device="cpu")
    _sum_over_processes(weights, counts)
    free, churned = counts.sum(1).tolist()
    thresholds = [float(silo.threshold) for silo in constraint.silos if silo.budget]
    metrics = {
        "dst/free_parameters": float(free),
        "dst/churn": churned / max(free, 1),
        "dst/threshold": statistics.median(thresholds) if thresholds else 0.0,
    }
    for weight, count in zip(weights, counts[0].tolist(), strict=True):
        key = f"dst/share/{constraint.modules[weight.name][1]}"
        metrics[key] = metrics.get(key, 0.0) + count / max(free, 1)
    return metrics


def _sum_over_processes(weights: list[SparseWeight], counts: Tensor) -> None:
    """Of counts of what is held here of some weights, int64 (n, weights), make those of the whole weights."""
    divided: dict[Together, list[int]] = {}
    for i, weight in enumerate(weights):
        if (processes := together([weight.box])) is not None:
            divided.setdefault(processes, []).append(i)
    for processes, columns in divided.items():
        counts[:, columns] = processes.reduce(counts[:, columns])


class DSTCallback(TrainerCallback):
    """Adds the subset's figures to Trainer's logs, and warns of settings that do not go with the method.

    The figures (see `subset_metrics`) go into `trainer.state.log_history` and the progress bar's printout, and, where
    Trainer reports to TensorBoard, into a run called "dst" beside Trainer's own. Trainer calls reporting callbacks
    before the user's; to have another service report the figures too, put this one first:
    `trainer.callback_handler.callbacks.insert(0, DSTCallback())`.
    """

    def __init__(self) -> None:
        self._writer: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None and hasattr(model, "peft_config"):
            # transformers' own load_adapter leaves this to the first forward pass.
            settle(model)
        constraints = active_constraints(model) if model is not None else []
        if model is None or not constraints:
            warnings.warn(
                "DSTCallback found no active DST adapter on the model, so it has nothing to report. Wrap the model with "
                "get_peft_model(model, DSTConfig(...)).",
                stacklevel=2,
            )
            return
        if state.max_steps > 0:
            set_training_steps(model, state.max_steps)
        # Trainer hands over Accelerate's wrapper.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        _check_release(args, optimizer)
        if isinstance(optimizer, DSTOptimizer):
            # An attempt before this one may have run out of memory in a backward pass (auto_find_batch_size), with some
            # gradients used already.
            optimizer.zero_grad()
        for message in training_advice(model, constraints[0], optimizer):
            warnings.warn(message, stacklevel=2)
        if "tensorboard" in (args.report_to or []) and state.is_world_process_zero and is_tensorboard_available():
            from torch.utils.tensorboard import SummaryWriter

            self._close()  # of an attempt before this one that raised
            directory = os.getenv("TENSORBOARD_LOGGING_DIR") or os.path.join(str(args.output_dir), "runs")
            self._writer = SummaryWriter(os.path.join(os.path.expanduser(directory), "dst"))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Trainer logs training losses, evaluations and a summary alike; the subset belongs to the first.
        if logs is None or "loss" not in logs or model is None:
            return
        for constraint in active_constraints(model):
            metrics = subset_metrics(constraint)
            logs.update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)
            if self._writer is not None:
                for name, value in metrics.items():
                    self._writer.add_scalar(name, value, state.global_step)
                self._writer.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _check_release(args: TrainingArguments, optimizer: Any) -> None:
    """Refuse before the first step what would be refused in it."""
    if not (isinstance(optimizer, DSTOptimizer) and optimizer.releases_gradients):
        return
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} cannot be combined with "
            "DSTOptimizer(release_gradients=True), which uses each gradient at once. Set it to 1, or release_gradients "
            "to False."
        )
    if args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm} cannot be combined with DSTOptimizer(release_gradients=True): the norm "
            "over all gradients is known only when they are gone. Set max_grad_norm=0, or release_gradients to False."
        )


def training_advice(model: nn.Module, constraint: Constraint, optimizer: Optimizer | None) -> list[str]:
    """What to change in a training set-up for the method to work as in the paper; empty if nothing.

    Args:
        model: the model about to be trained.
        constraint: the constraint of its active adapter.
        optimizer: the optimizer, if it exists yet.
    """
    if constraint.fixed:
        # Its values are ordinary parameters, of which an optimizer may make what it likes.
        return []
    advice = []
    constrained = {id(weight.parameter) for weight in constraint.weights}
    decays = {
        group["weight_decay"]
        for group in (optimizer.param_groups if optimizer is not None else [])
        if group.get("weight_decay") and any(id(parameter) in constrained for parameter in group["params"])
    }
    engine = optimizer.engine if isinstance(optimizer, DSTOptimizer) else optimizer
    rates = [
        group.get("initial_lr", group["lr"])
        for group in (optimizer.param_groups if optimizer is not None else [])
        if any(id(parameter) in constrained for parameter in group["params"])
    ]
    small = constraint.budget <= SMALL * sum(silo.size for silo in constraint.silos)
    if small and rates and 0 < max(rates) < LOW and isinstance(engine, torch.optim.Adam | torch.optim.AdamW):
        advice.append(
            f"a learning rate of {max(rates):g} is one of full fine-tuning. A subset wants far more, the more so the "
            "smaller it is: 1e-2 at epsilon=1e-3 on a small encoder. Try some rates on held-out data."
        )
    if decays:
        advice.append(
            f"weight decay {max(decays):g} acts on every parameter under the constraint, not on the subset, and distorts "
            "which components are selected. Set weight_decay=0, or make the optimizer with "
            "peft_dst.create_dst_optimizer, which keeps decay to the dense parameters."
        )
    half = [w for w in constraint.weights if w.data.dtype in (torch.bfloat16, torch.float16)]
    if half and not isinstance(optimizer, DSTOptimizer):
        advice.append(
            f"{len(half)} tensors under the constraint are {half[0].data.dtype}, e.g. {half[0].name!r}: an update smaller "
            "than about 1/256 of a weight rounds away, and distances tie. Make the optimizer with peft_dst.DSTOptimizer, "
            "or load the model in float32 and train with bf16=True (autocast)."
        )
    if dropouts := _dropouts(model):
        advice.append(
            "dropout is on (" + ", ".join(f"{name}={p:g}" for name, p in dropouts.items()) + "); the paper trains DST "
            "without, since the constraint regularises already. Pass these as 0.0 to from_pretrained."
        )
    return advice


def _dropouts(model: nn.Module) -> dict[str, float]:
    """Positive dropout probabilities by config field, or of the modules if the model has no config."""
    config: Any = getattr(model, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    found = {k: v for k, v in fields.items() if "drop" in k and isinstance(v, float) and v > 0}
    if fields:
        return found
    return {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
