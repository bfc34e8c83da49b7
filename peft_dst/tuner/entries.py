"""Where the tensors of one adapter live in a host: records, and float32 copies of their values while they are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn


class Entries(nn.Module):
    """Tensors of one adapter by the host's parameters' names, which are free in a bare module as they are in the host.

    (A ParameterDict or BufferDict has attributes of its own, `keys` and `values` for example, that they could not have.)

    Attributes:
        shown: what state dicts get of each tensor: all of it, an empty one in its place, or nothing.
        keeps_dtype: whether they keep their dtypes where the model is cast.
    """

    shown: Literal["all", "empty", "nothing"] = "all"
    keeps_dtype = False

    def __init__(self) -> None:
        super().__init__()
        # What was put, twice over the same memory: as it stands in the module, and as nobody finds it who casts what
        # stands there (`for p in model.parameters(): p.data = p.to(dtype)`), as if it were a weight that has a seed.
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def put(self, parameter: str, tensor: Tensor) -> None:
        """Add or replace one: a frozen parameter if it is floating, which is what PEFT looks for, else a buffer."""
        if not tensor.dtype.is_floating_point:
            self.register_buffer(parameter, tensor)
        elif parameter in self._parameters:
            self.replace(parameter, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_parameter(parameter, nn.Parameter(tensor, requires_grad=False))
        self._kept[parameter] = self._found()[parameter], tensor.detach()

    def replace(self, parameter: str, value: nn.Parameter) -> None:
        """Add or replace a parameter as it is, also where PEFT makes new ones on "meta" (low_cpu_mem_usage)."""
        self._parameters[parameter] = value

    def tensors(self) -> dict[str, Tensor]:
        """All of them, in the dtypes in which they were put."""
        found = self._found()
        for name, (own, kept) in self._kept.items():
            if found.get(name) is own and own.dtype != kept.dtype:
                own.data = kept.to(own.device)
        return {name: tensor.data for name, tensor in found.items()}

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles would have the memory twice.
        self.tensors()
        return {**self.__dict__, "_kept": [name for name, tensor in self._found().items() if name in self._kept]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        found = self._found()
        self._kept = {name: (found[name], found[name].detach()) for name in state["_kept"]}

    def _found(self) -> dict[str, Tensor]:
        everything = [*self._parameters.items(), *self._buffers.items()]
        return {name: tensor for name, tensor in everything if tensor is not None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.shown == "all":
            self.tensors()
            super()._save_to_state_dict(destination, prefix, keep_vars)
        elif self.shown == "empty":
            destination |= {f"{prefix}{name}": tensor[:0] for name, tensor in self.tensors().items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Entries:
        # They go where the model goes, but keep what they hold where it comes to have no memory, or new and empty one
        # (`to_empty`): their weights are about to be loaded, and they may have been already.
        for name, tensor in self.tensors().items():
            like = fn(tensor[:0])
            # `module.type(dtype)` casts whatever there is, positions too.
            dtype = like.dtype if tensor.is_floating_point() and not self.keeps_dtype else tensor.dtype
            if tensor.is_meta:
                self.put(name, fn(tensor).to(dtype))
            elif not like.is_meta:
                self.put(name, tensor.to(like.device, dtype))
        return self


class Notes(nn.Module):
    """Stands for what a marker writes into state dicts and reads from them by itself: PEFT takes keys that no child of the
    marker is named by for the base model's, and torch.distributed.checkpoint looks for an attribute of every key.
    """

    def name(self, key: str) -> None:
        """Announce a key."""
        if not hasattr(self, key):
            self.__dict__[key] = None

    def drop(self, key: str) -> None:
        """Announce it no longer."""
        if self.__dict__.get(key, self) is None:
            del self.__dict__[key]

    def _load_from_state_dict(self, *unused: Any) -> None:
        return


class FreeValues(Entries):
    """What is trained of one adapter whose subset is fixed: a float32 copy of its values.

    The records are what is saved and loaded; these follow the live weights.
    """

    def _save_to_state_dict(self, *unused: Any) -> None:
        return

    def _load_from_state_dict(self, *unused: Any) -> None:
        return

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FreeValues:
        # They go where the model goes, but keep their precision.
        for parameter in self.parameters():
            parameter.data = parameter.data.to(fn(parameter.data[:0]).device)
            if parameter.grad is not None:
                parameter.grad = parameter.grad.to(parameter.device)
        return self
