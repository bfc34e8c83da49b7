"""What subsets are compared with: LoRA and prompt tuning of the same size, and fine-tuning pulled towards the seed.

Sizes are not computed by rules of our own: PEFT wraps a copy of the model without weights (on the meta device), and what
it made trainable is counted. A fresh head (`modules_to_save`) is left out of every count, as it is left out of a DST
budget.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn


# A baseline further than this from its budget is not of the same size.
TOLERANCE = 0.25


@dataclass(frozen=True)
class Match:
    """How near a baseline comes to a budget: `trainable` parameters, without a dense head, for a `budget`."""

    trainable: int
    budget: int

    @property
    def difference(self) -> int:
        """Parameters above (positive) or below the budget."""
        return self.trainable - self.budget

    @property
    def relative(self) -> float:
        """The difference as a fraction of the budget."""
        return self.difference / self.budget

    def __str__(self) -> str:
        return f"{self.trainable:,} trainable parameters for a budget of {self.budget:,} ({self.relative:+.1%})"


def lora_config_for_budget(
    model: nn.Module, budget: int, *, narrow: bool = False, **lora_options: Any
) -> tuple[LoraConfig, Match]:
    """The LoRA config whose rank comes nearest to a budget: r · Σ (in + out) over the targeted layers.

    Args:
        model: the base model, unchanged; neither it nor its weights are copied.
        budget: number of trainable parameters wanted, the head aside.
        narrow: if r = 1 on all targeted modules is more than a quarter above the budget, target fewer: those of
            PEFT's default for this architecture (such as the queries and values), then only the last of them.
        **lora_options: options of `LoraConfig` but r. target_modules is "all-linear" if not given.

    Returns:
        The config, and how near it comes. A warning says so if that is further than a quarter of the budget.

    Raises:
        ValueError: if the budget is not positive, or r is given.
    """
    _check_budget(budget)
    if "r" in lora_options:
        raise ValueError(f"r={lora_options['r']!r} is given, but the budget of {budget} decides it; leave r out.")
    options = {"target_modules": "all-linear", **lora_options}
    config, match = _nearest_rank(model, budget, options)
    if narrow and match.relative > TOLERANCE:
        config, match = _narrowed(model, budget, options)
    if abs(match.relative) > TOLERANCE:
        remedy = "" if narrow else "; narrow=True targets fewer modules" if match.difference > 0 else ""
        warnings.warn(f"LoRA of rank {config.r} has {match}{remedy}.", stacklevel=2)
    return config, match


def prompt_tuning_config_for_budget(model: nn.Module, budget: int, **options: Any) -> tuple[PromptTuningConfig, Match]:
    """The prompt tuning config whose number of virtual tokens comes nearest to a budget.

    Args:
        model: the base model, unchanged; neither it nor its weights are copied.
        budget: number of trainable parameters wanted, the head aside.
        **options: options of `PromptTuningConfig` but num_virtual_tokens; task_type is needed for encoders and T5.

    Returns:
        The config, and how near it comes. A warning says so if that is further than a quarter of the budget.

    Raises:
        ValueError: if the budget is not positive, or num_virtual_tokens is given.
    """
    _check_budget(budget)
    if "num_virtual_tokens" in options:
        raise ValueError(
            f"num_virtual_tokens={options['num_virtual_tokens']!r} is given, but the budget of {budget} decides it; "
            "leave it out."
        )

    def make(tokens: int) -> PromptTuningConfig:
        return PromptTuningConfig(num_virtual_tokens=tokens, **copy.deepcopy(options))

    tokens, match = _nearest(lambda n: _trainable(_dry_run(model, make(n))), budget)
    if abs(match.relative) > TOLERANCE:
        warnings.warn(f"a prompt of {tokens} virtual tokens has {match}.", stacklevel=2)
    return make(tokens), match


def _check_budget(budget: int) -> None:
    if type(budget) is not int or budget < 1:
        raise ValueError(f"budget must be a positive integer, the number of trainable parameters; got {budget!r}.")


def _nearest_rank(model: nn.Module, budget: int, options: dict[str, Any]) -> tuple[LoraConfig, Match]:
    def make(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, **copy.deepcopy(options))

    rank, match = _nearest(lambda r: _trainable(_dry_run(model, make(r))), budget)
    return make(rank), match


def _narrowed(model: nn.Module, budget: int, options: dict[str, Any]) -> tuple[LoraConfig, Match]:
    """Fewer modules: PEFT's default ones, and of these only the last where all of them are still too many."""
    name = getattr(getattr(model, "config", None), "model_type", None)
    default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(name)
    if default and options["target_modules"] == "all-linear":
        options = {**options, "target_modules": list(default)}
        config, match = _nearest_rank(model, budget, options)
        if match.relative <= TOLERANCE:
            return config, match
    wrapped = _dry_run(model, LoraConfig(r=1, **copy.deepcopy(options)))
    names = wrapped.base_model.targeted_module_names
    counts = [_trainable(wrapped.get_base_model().get_submodule(name)) for name in names]
    # The last modules are those next to the output.
    sums = [sum(counts[-m:]) for m in range(1, len(names) + 1)]
    m = 1 + min(range(len(sums)), key=lambda i: abs(sums[i] - budget))
    return _nearest_rank(model, budget, {**options, "target_modules": names[-m:]})


def _nearest(count: Callable[[int], int], budget: int) -> tuple[int, Match]:
    """The size n >= 1 nearest to the budget, of a count that is a + b · n; of two equally near ones the smaller."""
    one = count(1)
    each = count(2) - one
    n = max(1, math.ceil((budget - one) / each + 0.5))
    return n, Match(count(n), budget)


def _dry_run(model: nn.Module, config: PeftConfig) -> PeftModel:
    """A copy of the model without weights, wrapped."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(t): _without_values(t) for t in tensors}
    with warnings.catch_warnings():
        # Wrapping the real model will say the same.
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(model, memo), config)


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _trainable(model: nn.Module) -> int:
    """Number of trainable parameters, the dense head (`modules_to_save`) aside."""
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in n)


class SeedPenalty:
    """Regularised full fine-tuning: what a model's distance from its seed costs (second paper, Tables 3 and 11).

    l1 is coefficient · Σ |Θ − Θ0|, l2 is coefficient · Σ (Θ − Θ0)², summed over all penalised components and not
    averaged: the coefficient is the pull on one component, whatever the model's size. The paper gives coefficients (0.01,
    0.1 and 1) but does not say how its sum is normalised, nor whether its l2 is squared, so its figures need not carry
    over.

    Args:
        model: the model at its seed, on the device where it trains; all its trainable parameters are penalised, and
            their values copied.
        kind: "l1" or "l2".
        coefficient: weight of the penalty, positive.
        parameters: names of the parameters to penalise, instead of all trainable ones.
        exclude: names of parameters, or of modules with everything below them, to leave out; the end of a name will do.
            A fresh head belongs here: its initial values are no seed.

    Raises:
        ValueError: for another kind or coefficient, a name that is not there, or if no parameter is left.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Literal["l1", "l2"],
        coefficient: float,
        parameters: Iterable[str] | None = None,
        *,
        exclude: Iterable[str] = (),
    ) -> None:
        if kind not in ("l1", "l2"):
            raise ValueError(f"kind must be 'l1' or 'l2', got {kind!r}.")
        if not 0 < coefficient < math.inf:
            raise ValueError(
                f"coefficient must be a positive number, got {coefficient!r}; without a penalty leave it out."
            )
        self.kind, self.coefficient = kind, coefficient
        chosen = _choose(model, parameters, exclude)
        self._pairs = [(parameter, parameter.detach().clone()) for parameter in chosen.values()]
        self.names = list(chosen)

    def penalty(self) -> Tensor:
        """The penalty, a float32 scalar, to be added to the loss of one step."""
        total = torch.zeros((), device=self._pairs[0][0].device)
        for parameter, seed in self._pairs:
            change = parameter.float() - seed.float()
            total = total + (change.abs() if self.kind == "l1" else change.square()).sum().to(total.device)
        return self.coefficient * total

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to every .grad, as `(loss + penalty()).backward()` would, but without a graph.

        Call it after the backward pass and before clipping, once a step: besides the seed it needs memory for one
        tensor at a time. A component at its seed has the l1 gradient 0; one beside it is thrown across by a step that
        is too long, so l1 brings few components back exactly.
        """
        for parameter, seed in self._pairs:
            change = parameter.float() - seed.float()
            pull = change.sign_() if self.kind == "l1" else change.mul_(2)
            pull = pull.mul_(self.coefficient).to(parameter.dtype)
            if parameter.grad is None:
                parameter.grad = pull
            else:
                parameter.grad.add_(pull)


def _choose(model: nn.Module, names: Iterable[str] | None, exclude: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters to penalise, by name."""
    known = dict(model.named_parameters())
    if names is not None:
        names = list(names)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"the model has no parameter {unknown[0]!r}; parameters takes full names.")
        known = {name: known[name] for name in names}
    known = {name: parameter for name, parameter in known.items() if parameter.requires_grad}
    for part in exclude:
        matches = {name for name in known if f".{part}." in f".{name}."}
        if not matches:
            raise ValueError(f"exclude names {part!r}, but no trainable parameter or module above one is called so.")
        known = {name: parameter for name, parameter in known.items() if name not in matches}
    if not known:
        raise ValueError("no trainable parameter is left to penalise; name fewer in exclude, or unfreeze the model.")
    return known
