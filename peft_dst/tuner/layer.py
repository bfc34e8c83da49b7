"""The marker child: PEFT's layer contract over records of indices and values.

DST edits the base model's own weights in place, so nothing is wrapped and nothing is added to the forward pass. What
PEFT needs to find (adapters by name, their tensors in the state dict, merge, enable, delete) lives in one child module
called `_sparse` of every module that holds tuned parameters. How its records and the live weights follow one another is
the subject of `records`, how they get into state dicts and out of them that of `states`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..delta import MARKER
from .overlay import OverlayWeight
from .states import StatefulRecords


# Where a base model keeps its adapters' constraints: on the model itself, because transformers' own `load_adapter` and
# `add_adapter` keep the model that was injected into and drop the tuner.
CONSTRAINTS = "dst_constraints"


class Whole:
    """Stands for a model in what its modules hold: PEFT copies single ones (modules_to_save), not the model with them."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> Whole:
        return Whole(memo.get(id(self.model), self.model))


class SparseLayer(StatefulRecords, BaseTunerLayer):
    """Child of a host module; holds the records of all adapters for the host's own parameters, as PEFT's tuners have it.

    Args:
        host: the module whose direct parameters are tuned.
        name: the host's name in the base model, "" for the base model itself.
        model: the base model.
    """

    adapter_layer_names = ("dst_values",)
    other_param_names = ("dst_indices",)

    def __init__(self, host: nn.Module, name: str, model: nn.Module):
        super().__init__(host, name)
        #: Adapters that have values for quantised weights somewhere in the model, and so cannot be trained.
        self.served: set[str] = set()
        self._whole = Whole(model)

    def __repr__(self) -> str:
        return f"dst.{type(self).__name__}({', '.join(self.weights)})"

    def forward(self, x: Any) -> Any:
        """Hand on what an nn.Sequential, which calls all of its children in turn, has come to."""
        if not isinstance(self.host, nn.Sequential):
            raise TypeError(
                f"{self.name!r} is a {type(self.host).__name__} with parameters of its own, and its children were called "
                f"in turn. The one that marks tuned parameters, {MARKER!r}, cannot be: leave it out of the loop, or tune "
                "other modules (target_modules, exclude_modules)."
            )
        return x

    def get_base_layer(self) -> nn.Module:
        return self.host

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Records are stored where their weights are, each in the dtype of its own.
        return

    @property
    def in_features(self) -> int | None:
        """The host's, if it has any."""
        return getattr(self.host, "in_features", None)

    @property
    def out_features(self) -> int | None:
        """The host's, if it has any."""
        return getattr(self.host, "out_features", None)

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active_adapter)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters: their values go into the live weights, which become trainable unless `inference_mode`, or
        unless an adapter can only be served.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._active_adapter = names
        if not self.merged:
            self._merged_model = False
        inference_mode = inference_mode or not self.served.isdisjoint(names)
        self.is_trainable = not inference_mode
        for parameter, weight in self.weights.items():
            tuned = any(parameter in self.tuned.get(name, ()) for name in names)
            weight.parameter.requires_grad_(tuned and not inference_mode)
            if tuned and not inference_mode:
                weight.seed_checksum.watch()
        self.sync()

    def enable_adapters(self, enabled: bool) -> None:
        """Show the active adapters, or the seed. `requires_grad` stays as it is: a reference pass inside a training
        step must not disturb the graph or DDP's reducer.
        """
        self._disable_adapters = not enabled
        self.sync()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the parameters that the named adapters tune trainable or not, if such an adapter is active.

        Raises:
            ValueError: if one is to become trainable that has values for quantised weights.
        """
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        if requires_grad and (served := sorted(names & self.served)):
            raise ValueError(
                f"adapter {served[0]!r} has values for quantised weights, which cannot be trained. Train it on the base "
                "model in float32, bfloat16 or float16."
            )
        concerned = names.intersection(self.active_adapters)
        for parameter, weight in self.weights.items():
            if any(parameter in self.tuned.get(name, ()) for name in concerned):
                weight.parameter.requires_grad_(requires_grad)
                if requires_grad:
                    weight.seed_checksum.watch()
        if concerned:
            self.is_trainable = requires_grad
            self._train_fixed()

    def release(self, adapter: str) -> None:
        """Let the weights be trained as a whole again where the adapter's subset is no longer a fixed one."""
        if adapter in self.fixed - self.static:
            self.fixed.discard(adapter)
            self._forget_free(adapter)
            self.set_adapter(self.active_adapters, inference_mode=not self.is_trainable)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Declare adapters part of the base weights, where their values already stand or now come to stand.

        Raises:
            ValueError: if `safe_merge` and a value is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.tuned]
        if safe_merge:
            self.check_finite(names)
        self.merged_adapters.extend(names)
        self._merged_model = True
        self.sync()

    def check_finite(self, adapter_names: Sequence[str]) -> None:
        """Check that the named adapters' values here are finite.

        Raises:
            ValueError: if one is not.
        """
        for name in self.tuned.keys() & set(adapter_names):
            for parameter, record in self.records(name).items():
                if not torch.isfinite(record.values).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights: adapter {name!r} has non-finite values for "
                        f"{self.weights[parameter].name!r}. Nothing was merged."
                    )

    def unmerge(self) -> None:
        """Undo `merge`: the live weights are those of the active adapters again."""
        if not self._merged_model:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.unmerge_silently()

    def unmerge_silently(self) -> None:
        self.merged_adapters.clear()
        self._merged_model = False
        self.scale = self._next_scale

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, and with it its constraint: transformers asks the markers alone."""
        constraints = self._whole.model.__dict__.get(CONSTRAINTS, {})
        if adapter_name in constraints:
            constraints.pop(adapter_name).retire()
        left = self.drop_adapter(adapter_name)
        self.awaited.discard(adapter_name)
        self.fixed.discard(adapter_name)
        self.static.discard(adapter_name)
        self.served.discard(adapter_name)
        self._forget_free(adapter_name)
        for weight in self.weights.values():
            if isinstance(weight, OverlayWeight):
                weight.summaries.pop(adapter_name, None)
        super().delete_adapter(adapter_name)
        self.sync()
        for parameter in left:
            self.weights[parameter].let_go()


def markers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """The marker children of a model with their names in its state dict, in model order."""
    # torch's wrapper for activation checkpointing keeps its own name out of state dicts.
    return ((path.replace("_checkpoint_wrapped_module.", ""), marker) for path, marker in markers_by_path(model))


def markers_by_path(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """The same with where they are in the model."""
    for path, module in model.named_modules():
        # By name: after a second import of the package there are two classes of them.
        if path.rpartition(".")[2] == MARKER and isinstance(module, BaseTunerLayer):
            yield path, cast(SparseLayer, module)
