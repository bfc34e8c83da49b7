"""DSTModel: the tuner. Finds the target parameters, places the marker children, and owns the adapters' constraints."""

from __future__ import annotations

import contextlib
import copy
import sys
from typing import Any, ClassVar, Literal

import torch
from peft import PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core import Constraint, SparseWeight
from ..core.shards import check_held_alone
from ..delta import MARKER
from ..mixing import check_length, check_not_compiled, check_placeholders
from ..tables import text_table
from . import exchange, settling, static, weighted
from .bare import forget_loading, watch_loading
from .constraints import constraints, in_all_processes
from .layer import CONSTRAINTS, SparseLayer, markers
from .mixed import copies_of, mixed_batch
from .overlay import OverlayWeight
from .parallel import forget_forward, watch_forward
from .plan import Plan, make_plan, warn_of_unchecked
from .targets import is_excluded, is_targeted


# What TRL calls the frozen copy of an adapter that it trains further, and that adapter.
REFERENCE, REFERRED_TO = "ref", "default"


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
        found = constraints(self.model)
        if adapter_name not in found:
            raise ValueError(f"adapter {adapter_name!r} does not exist; there are {', '.join(found) or 'none'}.")
        return found[adapter_name]

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
        weights = [weight for _, marker in markers(self.model) for weight in marker.weights.values()]
        constrained: set[SparseWeight] = set()
        free = 0
        for constraint in constraints(self.model).values():
            active = constraint.adapter in self.active_adapters
            for silo in constraint.silos:
                constrained.update(silo.weights)
                if active and any(w.parameter.requires_grad for w in silo.weights):
                    chosen = [w.free.numel() for w in silo.weights if w.free is not None]
                    free += sum(chosen) if chosen else silo.budget
        # What the model says its parameters are, which need not be `weight.parameter`.
        found = {id(weight.registered): weight for weight in weights}
        records = {id(p) for _, marker in markers(self.model) for p in marker.parameters()}
        everything = 0
        for parameter in self.model.parameters():
            weight = found.get(id(parameter))
            if id(parameter) not in records:
                # Quantised weights may be packed, and of what is divided over processes there may be a part here.
                everything += parameter.numel() if weight is None else weight.shape.numel()
                if parameter.requires_grad and weight not in constrained:
                    free += parameter.numel()
        return free, everything

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: weighted.Combination = "linear",
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add a new adapter that combines others. It can be activated, saved, loaded and merged like any other.

        What is combined are the differences of each adapter's values to the seed, in float64; a component that an adapter
        does not change differs by zero.

        Args:
            adapters: names of the adapters to combine.
            weights: a factor for each; negative ones subtract.
            adapter_name: name of the new adapter.
            combination_type: "linear" adds the weighted differences, also where several adapters change one component;
                since a sum of sparse differences is sparse, it is exact, and "cat" and "union" (LoRA's exact way) are other
                names for it. "magnitude_prune" and "dare_linear" let each adapter first keep only a share of its entries,
                the largest or random ones (which are scaled up by 1 / density). "ties" and "dare_ties" do the same, then
                elect a sign for each component, and average the weighted differences of that sign.
            density: that share, 0 < density <= 1, of all entries of an adapter. (For PEFT's LoRA it is a share of dense
                matrices; most of a delta is zero already.)
            majority_sign_method: what TIES elects a sign by: the sum of the differences ("total") or their number
                ("frequency").

        Raises:
            ValueError: for bad arguments, if the adapters have different dense copies of a module (modules_to_save), if a
                value would not be finite, or if no entry is left; nothing has been changed by then.
            NotImplementedError: if several processes hold the model together; likewise.
        """
        check_held_alone(
            (weight.parameter for _, marker in markers(self.model) for weight in marker.weights.values()),
            "add_weighted_adapter",
            "Combine the saved adapters on a model that one process holds, and save the result.",
        )
        weighted.check(self.model, adapters, weights, adapter_name, combination_type, density, majority_sign_method)
        settling.check_loaded(self.model, set(adapters))
        records = weighted.combined_records(
            self.model, adapters, weights, combination_type, density, majority_sign_method
        )
        if not records:
            raise ValueError("the combination leaves no entry: it is the seed. Check weights and density.")
        config = weighted.combined_config([self.peft_config[name] for name in adapters], records)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        constraint = self.constraint(adapter_name)
        empty = torch.empty(0, dtype=torch.int64, device="cpu")
        positions = {w.name: records[w.name].indices if w.name in records else empty for w in constraint.weights}
        static.take_over(constraint, config, positions)
        static.place(self.model, constraint, positions, {name: record.values for name, record in records.items()})
        weighted.take_copies(self.model, adapters, adapter_name)

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
        if config.records is not None:
            # They are used up by loading; the caller's config may be loaded with again.
            self.peft_config[adapter_name] = config = copy.copy(config)
        plan = make_plan(model, config, adapter_name, self._refers(adapter_name))
        if adapter_name in constraints(model):
            # The model was wrapped before (a notebook's cell run again), of which PEFT has warned: start anew.
            _remove_adapter(model, adapter_name)
        if state_dict is not None:
            # PEFT finds the hosts in a state dict by cutting its keys at the prefix; the marker is not a host.
            state_dict = {key.replace(f".{MARKER}.", "."): value for key, value in state_dict.items()}
        required = {target.name: model.get_parameter(target.path).requires_grad for target in plan.targets}
        trainable = {marker: marker.is_trainable for _, marker in markers(model)}
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._placing = plan
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        self._mark_the_rest(model, adapter_name, required)
        if adapter_name not in self.active_adapters:
            _train_as_before(trainable, flags)
        constraint = self._constrain(model, adapter_name, plan)
        self._start(model, constraint, plan, low_cpu_mem_usage)

    def _mark_the_rest(self, model: nn.Module, adapter_name: str, required: dict[str, bool]) -> None:
        """PEFT does not visit the model itself, nor the first owner of a parameter that was targeted by another name."""
        plan = self._placing
        for name in plan.hosts:
            host = model.get_submodule(name)
            before = getattr(host, MARKER, None)
            if before is not None and adapter_name in before.tuned:
                continue
            known = set() if before is None else set(before.weights)
            marker = self._mark(host, name, adapter_name)
            for weight in marker.weights.values():
                if weight.attribute not in known:
                    # By now PEFT has frozen it.
                    weight.requires_grad_before = required[weight.name]
            marker.set_adapter(self.active_adapters, inference_mode=plan.config.inference_mode)
        for target in plan.targets:
            marker = getattr(model.get_submodule(target.host), MARKER)
            if target.aliases:
                owners = [(model.get_submodule(alias.host), alias.parameter) for alias in target.aliases]
                marker.share(target.parameter, owners)
        self.targeted_module_names = [marker.name for _, marker in markers(model) if marker.name]

    def _refers(self, adapter_name: str) -> bool:
        """Whether an adapter is the frozen copy that TRL refers to while it trains `default` further (DPO, GRPO).

        It is added with the other's own config object.
        """
        return adapter_name == REFERENCE and self.peft_config[REFERENCE] is self.peft_config.get(REFERRED_TO)

    def _constrain(self, model: nn.Module, adapter_name: str, plan: Plan) -> Constraint:
        """Put the adapter's weights under its constraint, and say of the markers what it is."""
        found = [marker for _, marker in markers(model)]
        weights = {weight.name: weight for marker in found for weight in marker.weights.values()}
        constraint = plan.constraint(adapter_name, weights)
        model.__dict__.setdefault(CONSTRAINTS, {})[adapter_name] = constraint
        if any(target.quantised for target in plan.targets):
            warn_of_unchecked(plan, adapter_name)
            for marker in found:
                marker.served |= {adapter_name} & marker.tuned.keys()
        watch_forward(model)
        watch_loading(model)
        if plan.config.fixed:
            for marker in found:
                marker.static |= {adapter_name} & marker.tuned.keys()
        return constraint

    def _start(self, model: nn.Module, constraint: Constraint, plan: Plan, low_cpu_mem_usage: bool) -> None:
        """Choose what a subset by seed is, place a start that is wanted, or wait for what is to be loaded."""
        config = plan.config
        if config.records is not None:
            settling.settle_before_forward(model)
        elif self._refers(constraint.adapter):
            # TRL copies values, but no positions.
            static.make_room(model, constraint, REFERRED_TO, config.fixed)
        elif low_cpu_mem_usage:
            # Its tensors are on no device: they are to be loaded, a fixed subset with them.
            pass
        elif not config.init_weights:
            start = static.choose_by_seed(config, constraint) or static.choose_at_random(config, constraint)
            static.place(model, constraint, start, static.moved_at_random(constraint, start), config.fixed)
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
        if host in self._placing.hosts:
            self._mark(target, host, adapter_name)

    def _mark(self, host: nn.Module, name: str, adapter_name: str) -> SparseLayer:
        """Give a host its marker, and the marker this adapter."""
        if not hasattr(host, MARKER):
            host.add_module(MARKER, SparseLayer(host, name, self.model))
        marker = getattr(host, MARKER)
        if adapter_name not in marker.tuned:
            marker.add_adapter(adapter_name, self._placing.hosts[name], self._placing.summaries_of(name))
        return marker

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
        settling.settle(self.model)

    # Serving

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        # PEFT calls this around forward and generate, with their arguments.
        names = kwargs.get("adapter_names")
        if names is None:
            return contextlib.nullcontext()
        check_not_compiled()
        check_held_alone(
            (weight.parameter for _, marker in markers(self.model) for weight in marker.weights.values()),
            "a batch of several adapters (adapter_names)",
            "Activate one adapter after the other, with set_adapter(name).",
        )
        check_length(names, (args, kwargs))
        check_placeholders(self.model, names, args, kwargs)
        return mixed_batch(self.model, names, copies_of(kwargs))

    # Removal and switching

    def delete_adapter(self, adapter_name: str) -> None:
        self._check_memory()
        super().delete_adapter(adapter_name)
        if not any(marker.awaited for _, marker in markers(self.model)):
            settling.forget_to_settle(self.model)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self._check_memory()
        if merge:
            self._check_editable()
        names = self._check_mergeable(adapter_names, safe_merge and merge)
        found = list(markers(self.model))
        for _, marker in found:
            marker.unmerge_silently()
            marker.enable_adapters(merge)
            if merge:
                marker.merge(safe_merge=safe_merge, adapter_names=names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        settling.forget_to_settle(model)
        forget_forward(model)
        forget_loading(model)
        for _, marker in found:
            marker.detach()
        for constraint in model.__dict__.pop(CONSTRAINTS).values():
            constraint.retire()
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Only PEFT's wrappers around dense copies are replaced, and what they wrap need not have a weight of its own.
        setattr(parent, child_name, new_module)

    def _check_memory(self) -> None:
        """Check that everything can be switched, before anything is."""
        for _, marker in markers(self.model):
            marker.check_memory()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self._check_memory()
        super()._enable_adapter_layers(enabled)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self._check_memory()
        super().set_adapter(adapter_name, inference_mode)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_memory()
        self._check_editable()
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> list[str]:
        """The adapters to merge, found to exist and (if asked) to be finite before any of the markers merges them."""
        names = list(self.active_adapters) if adapter_names is None else adapter_names
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"adapter {name!r} does not exist; there are {', '.join(self.peft_config)}.")
        if safe_merge:
            with in_all_processes(self.model, "merging"):
                for _, marker in markers(self.model):
                    marker.check_finite(names)
        return names

    def _check_editable(self) -> None:
        for _, marker in markers(self.model):
            for weight in marker.weights.values():
                if isinstance(weight, OverlayWeight):
                    raise ValueError(
                        f"{weight.name!r} is quantised: what an adapter changes is added to its layer's output, and cannot "
                        "be merged into it. Merge into the base model in float32, bfloat16 or float16, and quantise that."
                    )

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
        if any(isinstance(tensor, DTensor) for tensor in state_dict.values()):
            return exchange.collect_divided(model, adapter_name, state_dict)
        return exchange.collect(model, config, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # PEFT leaves out what has another shape only afterwards, and does not hand on whether it is to.
        ignored = sys._getframe(1).f_locals.get("ignore_mismatched_sizes", False)
        return exchange.check_and_name(model, config, adapter_name, state_dict, ignored)


def take_back(model: PeftModel, adapter_name: str, made: bool) -> None:
    """After a load that failed, take away the adapter that was added for it.

    Args:
        model: the model.
        adapter_name: the adapter.
        made: whether the model was made for it, too. Then nothing is left on a base that has no other adapter.
    """
    if adapter_name not in constraints(model):
        return
    if made and len(model.peft_config) == 1:
        model.base_model.unload()
    else:
        model.delete_adapter(adapter_name)


def _train_as_before(trainable: dict[SparseLayer, bool], flags: list[tuple[nn.Parameter, bool]]) -> None:
    """Have the active adapters trained, or not, as they were before another one was added.

    PEFT activates them again, trainable if the new one is. What it puts back afterwards leaves out the parameters with the
    new adapter's name in theirs (an adapter "encoder"), and what it does not visit.

    Args:
        trainable: what each marker said of it.
        flags: requires_grad of each parameter.
    """
    for marker, before in trainable.items():
        marker.is_trainable = before
        marker.sync()
    for parameter, required in flags:
        parameter.requires_grad_(required)


def _remove_adapter(model: nn.Module, adapter_name: str) -> None:
    for _, marker in list(markers(model)):
        if adapter_name in marker.tuned:
            marker.unmerge_silently()
            others = [name for name in marker.active_adapters if name != adapter_name]
            marker.set_adapter(others)
            marker.delete_adapter(adapter_name)
            if not marker.tuned:
                marker.detach()
