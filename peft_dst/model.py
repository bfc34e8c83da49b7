"""DSTModel: the tuner. Finds the target parameters, places the marker children, and owns the adapters' constraints."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from . import exchange, static
from .config import DSTConfig
from .core import Constraint, Silo, partition
from .core.silos import compile_silo_patterns, read_names
from .delta import MARKER, DeltaError, Record, Summary, check_shape, parse_summaries
from .layer import SparseLayer, markers
from .tables import text_table
from .targets import find_targets, is_excluded, is_saved_densely, is_targeted


def active_constraints(model: nn.Module) -> list[Constraint]:
    """The constraints of a model's active adapters."""
    found = exchange.constraints(model).values()
    return [c for c in found if any(c.adapter in weight.adapters for weight in c.weights)]


def set_training_steps(model: nn.Module, steps: int) -> None:
    """Say how many optimizer steps the whole training has, for a `churn_stop` that is a fraction of it.

    DSTCallback does this under Trainer.

    Args:
        model: a model with DST adapters, of which all are told.
        steps: the number.
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}.")
    for constraint in exchange.constraints(model).values():
        constraint.total_steps = steps


class DSTModel(BaseTuner):
    """Creates a Dynamic Subset Tuning model from a pretrained one; `get_peft_model` makes it.

    The base model is edited in place: its forward pass, its parameters' names and its memory stay what they were. While
    an adapter is active the base's own weights are the tuned ones, also in `get_base_model().state_dict()`.

    Several active adapters add up: a component that one of them changes takes its value, one that several change takes
    seed + Σ (value − seed). Training wants exactly one active adapter.
    """

    prefix = "dst_"
    tuner_layer_cls = SparseLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    # What users ask

    def constraint(self, adapter_name: str = "default") -> Constraint:
        """The constraint that one adapter is trained under: silos, budgets, thresholds, churn."""
        constraints = exchange.constraints(self.model)
        if adapter_name not in constraints:
            raise ValueError(f"adapter {adapter_name!r} does not exist; there are {', '.join(constraints) or 'none'}.")
        return constraints[adapter_name]

    def silos(self, adapter_name: str = "default") -> dict[str, list[str]]:
        """The partition of an adapter: silo's name → its parameters' names, in model order."""
        return {silo.name: [w.name for w in silo.weights] for silo in self.constraint(adapter_name).silos}

    def print_silos(self, adapter_name: str = "default") -> None:
        """Print the partition as a table: silo, tensors, size, budget."""
        constraint = self.constraint(adapter_name)
        rows = [(s.name, f"{len(s.weights)}", f"{s.size:,}", f"{s.budget:,}") for s in constraint.silos]
        tensors, size = sum(len(s.weights) for s in constraint.silos), sum(s.size for s in constraint.silos)
        total = ("total", f"{tensors}", f"{size:,}", f"{constraint.budget:,}")
        header = ("silo", "tensors", "size", "budget")
        print("\n".join(text_table(header, rows, [total])))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(free parameters, all parameters): the budget of what is under the constraint, the size of what is not.

        Everything under the constraint gets a gradient, but only the budget can end up different from the seed.
        """
        constrained: set[int] = set()
        free = 0
        for constraint in exchange.constraints(self.model).values():
            active = constraint.adapter in self.active_adapters
            for silo in constraint.silos:
                constrained.update(id(w.parameter) for w in silo.weights)
                if active and any(w.parameter.requires_grad for w in silo.weights):
                    chosen = [w.free.numel() for w in silo.weights if w.free is not None]
                    free += sum(chosen) if chosen else silo.budget
        records = {id(p) for _, marker in markers(self.model) for p in marker.parameters()}
        everything = 0
        for parameter in self.model.parameters():
            if id(parameter) not in records:
                everything += parameter.numel()
                if parameter.requires_grad and id(parameter) not in constrained:
                    free += parameter.numel()
        return free, everything

    # Injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        config = self.peft_config[adapter_name]
        # Everything that can be wrong with config and base is found here, before the model is touched.
        config = _maybe_include_all_linear_layers(config, model)
        targets = find_targets(model, config)
        silos = _silo_sizes(model, config, [target.name for target in targets])
        budgets = static.budgets(config, silos)
        _check_no_copies(model, config, adapter_name)
        summaries = parse_summaries(config.records)
        _check_summaries(summaries, {target.name: model.get_parameter(target.name).shape for target in targets})

        if adapter_name in exchange.constraints(model):
            # The model was wrapped before (a notebook's cell run again), of which PEFT has warned: start anew.
            _remove_adapter(model, adapter_name)
        self._placing: dict[str, list[str]] = {}
        for target in targets:
            self._placing.setdefault(target.host, []).append(target.parameter)
        self._entries = None if config.records is None else {name: s.entries for name, s in summaries.items()}
        if state_dict is not None:
            # PEFT finds the hosts in a state dict by cutting its keys at the prefix; the marker is not a host.
            state_dict = {key.replace(f".{MARKER}.", "."): value for key, value in state_dict.items()}
        # PEFT freezes what is active while it adds a frozen adapter, and thaws the parameters afterwards.
        trainable = {marker: marker.is_trainable for _, marker in markers(model)}
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        for marker, before in trainable.items():
            if adapter_name not in marker.active_adapters:
                marker.is_trainable = before
        for name in self._placing:
            # PEFT does not visit the model itself, nor the first owner of a parameter that was targeted by another name.
            host = model.get_submodule(name)
            if adapter_name not in getattr(getattr(host, MARKER, None), "tuned", ()):
                self._mark(host, name, adapter_name)
                getattr(host, MARKER).set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        for target in targets:
            marker = getattr(model.get_submodule(target.host), MARKER)
            for alias in target.aliases if adapter_name == next(iter(marker.tuned)) else ():
                marker.share(target.parameter, model.get_submodule(alias.host), alias.parameter)
        found = dict(markers(model))
        self.targeted_module_names = [m.name for m in found.values() if m.name]

        weights = {w.name: w for marker in found.values() for w in marker.weights.values()}
        constraint = Constraint(
            adapter_name,
            [Silo(s, [weights[n] for n in sizes], k) for (s, sizes), k in zip(silos.items(), budgets, strict=True)],
            config.distance,
            read_names([*weights], compile_silo_patterns(config.silo_pattern)),
            config.tracking,
            config.schedule,
            config.distance_normalization,
            config.fixed,
        )
        model.__dict__.setdefault(exchange.CONSTRAINTS, {})[adapter_name] = constraint
        _keep_from_ddp(model)
        if not config.init_weights:
            _start_at_random(found, constraint)
        if config.fixed:
            exchange.watch_before_forward(model)
            for marker in found.values():
                marker.static |= {adapter_name} & marker.tuned.keys()
        if config.records is not None:
            exchange.settle_before_forward(model)
        elif (positions := static.choose_by_seed(config, constraint)) is not None:
            static.place(model, constraint, positions)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        host = current_key if parameter_name is None else current_key.rpartition(".")[0]
        if host in self._placing:
            self._mark(target, host, adapter_name)

    def _mark(self, host: nn.Module, name: str, adapter_name: str) -> None:
        """Give a host its marker, and the marker this adapter."""
        if not hasattr(host, MARKER):
            host.add_module(MARKER, SparseLayer(host, name))
        prefix = f"{name}." if name else ""
        parameters = self._placing[name]
        entries = None
        if self._entries is not None:
            entries = {p: self._entries[prefix + p] for p in parameters if prefix + p in self._entries}
        marker = getattr(host, MARKER)
        if adapter_name not in marker.tuned:
            marker.add_adapter(adapter_name, parameters, entries)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool | _ExcludedModule:
        return _ExcludedModule() if is_excluded(peft_config, key) else is_targeted(peft_config, key)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        # target_modules=None has a meaning of its own, so there is nothing to fill in by architecture.
        return peft_config

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        # Tied weights edited in place stay tied. Only a dense copy of one of them unties it.
        if any(m.split(".")[-1] in EMBEDDING_LAYER_NAMES for m in peft_config.modules_to_save or []):
            super()._check_tied_modules(model, peft_config)

    def _check_merge_allowed(self) -> None:
        # For the same reason merging is always possible.
        return

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # The markers have set the parameters they tune; modules_to_save take care of their own; the rest is frozen.
        handled = {id(w.parameter) for _, marker in markers(model) for w in marker.weights.values()}
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                handled.update(id(parameter) for parameter in module.parameters())
        for parameter in model.parameters():
            if id(parameter) not in handled:
                parameter.requires_grad = False

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Values stay in the base's dtype. PEFT calls this after loading: the loaded values go into the weights.
        exchange.settle(self.model)

    # Removal

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        exchange.constraints(self.model).pop(adapter_name).retire()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        names = self._check_mergeable(adapter_names, safe_merge and merge)
        found = list(markers(self.model))
        for _, marker in found:
            marker.unmerge_silently()
            marker.enable_adapters(merge)
            if merge:
                marker.merge(safe_merge=safe_merge, adapter_names=names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        exchange.forget_to_settle(model)
        for _, marker in found:
            marker.detach()
        for constraint in model.__dict__.pop(exchange.CONSTRAINTS).values():
            constraint.retire()
        return model

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> list[str]:
        """The adapters to merge, found to exist and (if asked) to be finite before any of the markers merges them."""
        names = list(self.active_adapters) if adapter_names is None else adapter_names
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"adapter {name!r} does not exist; there are {', '.join(self.peft_config)}.")
        if safe_merge:
            for _, marker in markers(self.model):
                marker.check_finite(names)
        return names

    # State dicts

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        return exchange.collect(model, config, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        try:
            return exchange.check_and_name(model, config, adapter_name, state_dict)
        except DeltaError:
            # An adapter that was added for this file is taken away again.
            if isinstance(model, PeftModel) and any(adapter_name in marker.awaited for _, marker in markers(model)):
                if len(model.peft_config) > 1:
                    model.delete_adapter(adapter_name)
                else:
                    model.base_model.unload()
            raise


def _silo_sizes(model: nn.Module, config: DSTConfig, names: list[str]) -> dict[str, dict[str, int]]:
    """Silo → its parameters' names → their sizes."""
    if not names:
        if config.target_modules is None and not config.target_parameters:
            raise NoMatchingPeftModuleError(
                "No parameter of the base model is left to tune. Check exclude_modules, layers_to_transform and "
                "modules_to_save."
            )
        raise NoMatchingPeftModuleError(
            f"Target modules {config.target_modules} not found in the base model, or excluded, and likewise "
            f"target_parameters {config.target_parameters}. Check their names, exclude_modules and layers_to_transform."
        )
    silos = partition(names, config.siloing, compile_silo_patterns(config.silo_pattern))
    return {silo: {name: model.get_parameter(name).numel() for name in members} for silo, members in silos.items()}


def _check_summaries(summaries: dict[str, Summary], shapes: dict[str, torch.Size]) -> None:
    """A saved adapter's record sizes come from a file: refuse them before any memory is taken for them."""
    for name, summary in summaries.items():
        if name not in shapes:
            raise DeltaError(
                f"the adapter has entries for {name!r}, which the model does not have or the adapter's config does not "
                "tune. Load it onto the base named in adapter_config.json."
            )
        check_shape(name, summary, shapes[name])


def _check_no_copies(model: nn.Module, config: DSTConfig, adapter_name: str) -> None:
    """Refuse to keep a dense copy of a module that another adapter tunes in place."""
    for _, marker in markers(model):
        others = [name for name in marker.tuned if name != adapter_name]
        if others and is_saved_densely(config, marker.name):
            raise ValueError(
                f"this adapter keeps a dense copy of {marker.name!r} (modules_to_save), but adapter {others[0]!r} "
                "tunes it in place. Give both adapters the same modules_to_save, or load them onto two models."
            )


def _remove_adapter(model: nn.Module, adapter_name: str) -> None:
    exchange.constraints(model).pop(adapter_name).retire()
    for _, marker in list(markers(model)):
        if adapter_name in marker.tuned:
            marker.unmerge_silently()
            others = [name for name in marker.active_adapters if name != adapter_name]
            marker.set_adapter(others)
            marker.delete_adapter(adapter_name)
            if not marker.tuned:
                marker.detach()


def _keep_from_ddp(model: nn.Module) -> None:
    """Keep DistributedDataParallel from broadcasting records: their sizes change where a rank has looked at them.

    Every rank has the same ones by itself. DDP looks for this attribute on the module it wraps; PeftModel finds it here.
    """
    attribute = "_ddp_params_and_buffers_to_ignore"
    names = {
        f"{name}.{part}.{adapter}.{parameter}"
        for name, marker in markers(model)
        for part in ("dst_indices", "dst_values")
        for adapter, parameters in marker.tuned.items()
        for parameter in parameters
    }
    already = getattr(model, attribute, ())
    setattr(model, attribute, {*already, *names, *(f"base_model.model.{name}" for name in names)})


def _start_at_random(found: dict[str, SparseLayer], constraint: Constraint) -> None:
    """Fill every budget with random entries, moved by a standard normal (PEFT's tests need a non-trivial adapter)."""
    owner = {id(w): (marker, p) for marker in found.values() for p, w in marker.weights.items()}
    for silo in constraint.silos:
        chosen = torch.randperm(silo.size)[: silo.budget].sort().values
        start = 0
        for weight in silo.weights:
            marker, parameter = owner[id(weight)]
            end = start + weight.data.numel()
            indices = (chosen[(chosen >= start) & (chosen < end)] - start).to(weight.data.device)
            seeds = weight.seeds_at(indices)
            marker.write_record(constraint.adapter, parameter, Record(indices.int(), seeds + torch.randn_like(seeds)))
            start = end
    for marker in found.values():
        marker.sync()
