"""An adapter that is about to be added: what it tunes, in which silos, with which budgets, and what is wrong with it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..config import BY_SEED, DSTConfig
from ..core import Constraint, Silo, SparseWeight, partition
from ..core.silos import compile_silo_patterns, read_names
from ..delta import DeltaError, Summary, check_shape, parse_summaries
from . import static
from .layer import markers
from .targets import Target, find_targets, is_saved_densely


@dataclass(frozen=True)
class Plan:
    """An adapter that is about to be added, all of it checked.

    Attributes:
        config: its config.
        targets: what it tunes.
        silos: silo → parameter's name → number of components.
        budgets: number of free parameters of each silo.
        summaries: what a saved adapter's config says of its records.
    """

    config: DSTConfig
    targets: list[Target]
    silos: dict[str, dict[str, int]]
    budgets: list[int]
    summaries: dict[str, Summary]

    @functools.cached_property
    def hosts(self) -> dict[str, list[str]]:
        """Host's name → its own names of the parameters that are tuned there."""
        found: dict[str, list[str]] = {}
        for target in self.targets:
            found.setdefault(target.host, []).append(target.parameter)
        return found

    def summaries_of(self, host: str) -> dict[str, Summary] | None:
        """What is said of each parameter of a host that a saved adapter has entries in; None for a new adapter."""
        if self.config.records is None:
            return None
        names = {parameter: Target(host, parameter).name for parameter in self.hosts[host]}
        return {parameter: self.summaries[name] for parameter, name in names.items() if name in self.summaries}

    def constraint(self, adapter_name: str, weights: Mapping[str, SparseWeight]) -> Constraint:
        """The constraint that the adapter is trained under.

        Args:
            adapter_name: the adapter's name.
            weights: the weights of the model's markers by name, those that it tunes among them.
        """
        config = self.config
        return Constraint(
            adapter_name,
            [
                Silo(name, [weights[parameter] for parameter in sizes], budget)
                for (name, sizes), budget in zip(self.silos.items(), self.budgets, strict=True)
            ],
            config.distance,
            # Of its own parameters alone: what a name means depends on those beside it.
            read_names([p for sizes in self.silos.values() for p in sizes], compile_silo_patterns(config.silo_pattern)),
            config.tracking,
            config.schedule,
            config.distance_normalization,
            config.fixed,
        )


def make_plan(model: nn.Module, config: DSTConfig, adapter_name: str, gives: bool) -> Plan:
    """Find everything that can be wrong with an adapter's config and the base, before the model is touched.

    Args:
        model: the base model.
        config: the adapter's config.
        adapter_name: its name.
        gives: whether a new adapter will be given a subset of another one's.
    """
    config = _maybe_include_all_linear_layers(config, model)
    targets = find_targets(model, config)
    plan = plan_of(model, config, targets)
    _check_no_copies(model, config, adapter_name)
    if config.selection in BY_SEED and config.records is None:
        static.check_memory(model.get_parameter(target.path) for target in targets)
    if config.records is None and (config.fixed or not config.init_weights or gives):
        static.check_undivided(model.get_parameter(target.path) for target in targets)
    return plan


def plan_of(model: nn.Module, config: DSTConfig, targets: list[Target]) -> Plan:
    """The plan for an adapter that tunes these targets."""
    silos = _silo_sizes(model, config, targets)
    summaries = parse_summaries(config.records)
    _check_summaries(summaries, targets)
    return Plan(config, targets, silos, static.budgets(config, silos), summaries)


def _silo_sizes(model: nn.Module, config: DSTConfig, targets: list[Target]) -> dict[str, dict[str, int]]:
    """Silo → its parameters' names → their sizes."""
    if not targets:
        if config.target_modules is None and not config.target_parameters:
            raise NoMatchingPeftModuleError(
                "No parameter of the base model is left to tune. Check exclude_modules, layers_to_transform and "
                "modules_to_save."
            )
        raise NoMatchingPeftModuleError(
            f"Target modules {config.target_modules} not found in the base model, or excluded, and likewise "
            f"target_parameters {config.target_parameters}. Check their names, exclude_modules and layers_to_transform."
        )
    sizes = {target.name: target.size for target in targets}
    silos = partition([*sizes], config.siloing, compile_silo_patterns(config.silo_pattern))
    return {silo: {name: sizes[name] for name in members} for silo, members in silos.items()}


def _check_summaries(summaries: dict[str, Summary], targets: list[Target]) -> None:
    """A saved adapter's record sizes come from a file: refuse them before any memory is taken for them."""
    shapes = {target.name: target.shape for target in targets}
    for name, summary in summaries.items():
        if name not in shapes:
            raise DeltaError(
                f"the adapter has entries for {name!r}, which the model does not have or the adapter's config does not "
                "tune. Load it onto the base named in adapter_config.json."
            )
        check_shape(name, shapes[name], summary.shape, summary.entries)


def warn_of_unchecked(plan: Plan, adapter_name: str) -> None:
    """Say what loading onto a quantised base leaves open."""
    quantised = sum(target.quantised and target.name in plan.summaries for target in plan.targets)
    if quantised:
        warnings.warn(
            f"{quantised} of the {len(plan.summaries)} tensors that adapter {adapter_name!r} changes are quantised here. "
            "Their layers' outputs are corrected instead, for inference only; and whether they come from the base that the "
            "adapter was trained on cannot be checked, as it is for the others.",
            stacklevel=3,
        )


def _check_no_copies(model: nn.Module, config: DSTConfig, adapter_name: str) -> None:
    """Refuse to keep a dense copy of a module that another adapter tunes in place."""
    for _, marker in markers(model):
        others = [name for name in marker.tuned if name != adapter_name]
        if others and is_saved_densely(config, marker.name):
            raise ValueError(
                f"this adapter keeps a dense copy of {marker.name!r} (modules_to_save), but adapter {others[0]!r} "
                "tunes it in place. Give both adapters the same modules_to_save, or load them onto two models."
            )
