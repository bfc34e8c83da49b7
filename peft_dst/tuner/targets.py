"""Which parameters of a base model an adapter tunes, checked before anything is changed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.parameter import is_lazy

from ..config import DSTConfig
from ..core.wrappers import check_whole
from ..delta import MARKER, plain_name
from .overlay import can_edit, can_overlay, original_shape


_REFUSAL = "DST edits weights in place, which quantised or integer weights do not allow."
_REMEDY = (
    "Load the base model in float32, bfloat16 or float16 (without a quantization_config), or leave the module out with "
    "target_modules or exclude_modules."
)
# Heads that PEFT adds to modules_to_save for a task, after it has placed the adapter; for SEQ_CLS it does so before.
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Target:
    """A parameter to tune: its host's name ("" for the model itself), its own, and the other owners of a shared one.

    A quantised one is a linear layer's matrix: a saved adapter is served over it, without editing it.
    """

    host: str
    parameter: str
    aliases: tuple[Target, ...] = ()
    shape: tuple[int, ...] = ()
    quantised: bool = False

    @property
    def path(self) -> str:
        """Where it is in the model."""
        return f"{self.host}.{self.parameter}" if self.host else self.parameter

    @property
    def name(self) -> str:
        return plain_name(self.path)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def is_targeted(config: DSTConfig, module_name: str) -> bool:
    """Whether the config tunes a module's own parameters: it or a module around it is targeted, and none excluded."""
    if module_name.split(".")[-1] == MARKER:
        return False
    if config.target_modules is None:
        if config.target_parameters:
            return False
        return not is_excluded(config, module_name) and _in_layers(config, module_name)
    return not is_excluded(config, module_name) and any(
        bool(check_target_module_exists(config, ancestor)) for ancestor in _ancestors(module_name)
    )


def _ancestors(module_name: str) -> Iterator[str]:
    """The module itself and every module around it."""
    parts = module_name.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])


def is_excluded(config: DSTConfig, module_name: str) -> bool:
    """Whether a module, or one around it, is excluded or trained densely (modules_to_save)."""
    if is_saved_densely(config, module_name):
        return True
    excluded = config.exclude_modules
    if not excluded:
        return False
    if isinstance(excluded, str):
        return any(re.fullmatch(excluded, ancestor) for ancestor in _ancestors(module_name))
    return any(a in excluded or any(a.endswith(f".{e}") for e in excluded) for a in _ancestors(module_name))


def is_saved_densely(config: DSTConfig, module_name: str) -> bool:
    """Whether modules_to_save names a module or one around it, by PEFT's rule: any module whose name ends so.

    So do the heads of a task, whether or not PEFT has added them to the config yet.
    """
    heads = _HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ())
    return any(a.endswith(name) for name in (*(config.modules_to_save or ()), *heads) for a in _ancestors(module_name))


def _in_layers(config: DSTConfig, module_name: str) -> bool:
    if config.layers_to_transform is None:
        return True
    wanted = [config.layers_to_transform] if isinstance(config.layers_to_transform, int) else config.layers_to_transform
    lists = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or [r"[^.]+"]
    for name in lists:
        if found := re.match(rf"(?:^|.*?\.){name}\.(\d+)(?:\.|$)", module_name):
            return int(found.group(1)) in wanted
    return False


def _is_parameter_targeted(config: DSTConfig, name: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in config.target_parameters or [])


def find_targets(model: nn.Module, config: DSTConfig) -> list[Target]:
    """The parameters that an adapter with this config tunes, in model order, a shared parameter once.

    Raises:
        ValueError: if one of them cannot be edited in place (quantised, integer or offloaded weights), or belongs to a
            module that another adapter replaces with a dense copy. A saved adapter that is loaded for inference need
            not edit the weights of linear layers.
        NotImplementedError: if DeepSpeed or FSDP1 has put something else in the place of one.
    """
    modules = {name: module for name, module in model.named_modules() if MARKER not in name.split(".")}
    copied = [name for name, module in modules.items() if isinstance(module, AuxiliaryTrainingWrapper)]
    # Every name of every parameter: a shared one is tuned under its first name, if any of them is targeted and none is
    # excluded.
    names: dict[int, list[Target]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for host, module in modules.items():
        for parameter, tensor in module.named_parameters(recurse=False):
            names.setdefault(id(tensor), []).append(Target(host, parameter))
            tensors[id(tensor)] = tensor
    targets: list[Target] = []
    for key, aliases in names.items():
        if not any(is_targeted(config, t.host) or _is_parameter_targeted(config, t.name) for t in aliases):
            continue
        if any(is_excluded(config, t.host) for t in aliases):
            continue
        target = aliases[0]
        wrapper = next((name for name in copied if f"{target.host}.".startswith(f"{name}.")), None)
        if wrapper is not None:
            raise ValueError(
                f"this adapter tunes {wrapper!r} in place, but another adapter of the model keeps a dense copy of it "
                f"(modules_to_save). Add {wrapper.rpartition('.')[-1]!r} to this adapter's modules_to_save, or to "
                "its exclude_modules."
            )
        tensor, host = tensors[key], modules[target.host]
        check_whole(target.name, tensor)
        _check_real(target.name, tensor)
        target = replace(target, aliases=tuple(aliases[1:]), shape=tuple(tensor.shape))
        if not can_edit(tensor):
            _check_servable(model, config, target, f"{type(tensor).__name__} of {tensor.dtype}")
            target = replace(target, shape=original_shape(host), quantised=True)
        if tensor.is_meta and is_offloaded(model, host):
            raise ValueError(
                f"{target.name!r} is offloaded: accelerate fetches it anew for every forward pass, so it cannot be edited "
                "in place. Load the base model whole onto the CPU or GPUs (a device_map without 'disk', nor 'cpu' beside "
                "GPUs), or tune other modules (target_modules, exclude_modules). To serve an adapter offloaded, merge "
                "it where the base fits (merge_and_unload), save that, and offload the merged model."
            )
        targets.append(target)
    for name, module in modules.items():
        if hasattr(module, "qweight") and is_targeted(config, name):
            raise ValueError(f"{name!r} is a {type(module).__name__}: {_REFUSAL} {_REMEDY}")
        own = module.named_parameters(recurse=False)
        if is_saved_densely(config, name) and any(not can_edit(p) and can_overlay(module, part) for part, p in own):
            raise ValueError(
                f"{name!r} is quantised, but the adapter keeps a dense copy of it (modules_to_save). Quantise the base "
                "model without it (bitsandbytes: llm_int8_skip_modules, torchao: modules_to_not_convert)."
            )
    return targets


def is_offloaded(model: nn.Module, module: nn.Module) -> bool:
    """Whether the parameters of a module that are on "meta" are kept elsewhere by accelerate."""
    hook = getattr(module, "_hf_hook", None)
    if any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ()))):
        return True
    # PEFT takes the hooks away before it adds the adapter, and puts them back after it was loaded.
    return bool({"cpu", "disk"} & {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()})


def _check_real(name: str, tensor: nn.Parameter) -> None:
    if is_lazy(tensor):
        raise ValueError(
            f"{name!r} has no shape yet. Call the base model once, on any batch, before adding the adapter."
        )
    if tensor.dtype.is_complex:
        raise ValueError(
            f"{name!r} is {tensor.dtype}: DST ranks real components, by distances that complex ones do not have. Leave it "
            "out with target_modules or exclude_modules, or keep it as real pairs (torch.view_as_real)."
        )


def _check_servable(model: nn.Module, config: DSTConfig, target: Target, what: str) -> None:
    """Check that a saved adapter can be served over a quantised parameter, and that this is what is wanted."""
    what = f"{target.name!r} is {what}"
    host = model.get_submodule(target.host)
    if not can_overlay(host, target.parameter):
        raise ValueError(
            f"{what}: {_REFUSAL} Nor is it the weight of a linear layer that bitsandbytes or torchao quantised, over "
            f"which a saved adapter could be served. {_REMEDY}"
        )
    if config.records is None or not config.inference_mode:
        raise ValueError(
            f"{what}: {_REFUSAL} Train the adapter on the base model in float32, bfloat16 or float16; once saved it loads "
            "onto this quantised one for inference (PeftModel.from_pretrained, is_trainable=False). Or leave quantised "
            "modules out with target_modules or exclude_modules."
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = host is head and getattr(model.config, "tie_word_embeddings", False)
    if tied or target.aliases:
        raise ValueError(
            f"{what}, and was one parameter with another module's before it was quantised, or is still. An adapter "
            "changes both, but has values for one. Quantise the base model without this module (bitsandbytes: "
            "llm_int8_skip_modules, torchao: modules_to_not_convert)."
        )
