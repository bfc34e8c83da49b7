"""The tuned model's modules over the base's tensors: what PEFT needs to make an adapter, without a copy of a weight.

A checkpoint holds tensors; which of them are parameters, in what order, which are tied, and which modules they belong to
is known to the model class only. It is built on the meta device, or taken from a model that is already loaded, and copied
with its parameters replaced by the base's tensors. So `get_peft_model` finds targets, silos, budgets and dense copies as
it does for any model, and `save_pretrained` writes the adapter. Names are without those of torch's wrappers (`plain_name`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..delta import Checkpoint, Layout, plain_name


Source: TypeAlias = "str | PathLike[str] | nn.Module | Mapping[str, Tensor]"
_PASS_MODELS = (
    "Names in a checkpoint may be older than the model's, and transformers renames and joins tensors while it loads them: "
    "load both models with from_pretrained and pass these instead of folders."
)


@dataclass(frozen=True)
class Parameters:
    """A source's tensors under the names of the model's parameters.

    Attributes:
        found: first name of each parameter → its tensor, in model order; those that the source has.
        unused: names in the source of what is neither a parameter nor a buffer of the model.
        buffers: persistent buffers by name.
    """

    found: dict[str, Tensor]
    unused: tuple[str, ...]
    buffers: dict[str, Tensor]


def unwrapped(source: Source) -> Source:
    """The model inside a compiled one; anything else as it is."""
    while isinstance(source, nn.Module) and isinstance(inner := getattr(source, "_orig_mod", None), nn.Module):
        source = inner
    return source


def tensors_of(source: Source, which: str) -> Mapping[str, Tensor]:
    """The tensors of a folder, a model or a state dict.

    Args:
        source: what the user gave.
        which: "base" or "tuned", for messages.

    Raises:
        ValueError: if it is no checkpoint, still has adapters, or holds no data.
    """
    if isinstance(source, nn.Module):
        if hasattr(source, "peft_config") or any(isinstance(module, BaseTunerLayer) for module in source.modules()):
            raise ValueError(
                f"the {which} model has PEFT adapters. Pass the model without them: merge_and_unload() if they belong to "
                "the weights, else unload()."
            )
        tensors: Mapping[str, Tensor] = {plain_name(name): tensor for name, tensor in source.state_dict().items()}
    elif isinstance(source, Mapping):
        tensors = {plain_name(name): t.detach() for name, t in source.items() if isinstance(t, Tensor)}
    else:
        if not Path(source).is_dir():
            raise ValueError(
                f"{which}={str(source)!r} is not a folder. Give a folder (of a Hub id, what "
                "huggingface_hub.snapshot_download returns), a loaded model, or a state dict."
            )
        return _read_folder(Path(source))
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(
                f"{which}: {name!r} is on the meta device, without data. Load the model without offloading."
            )
    return tensors


def _read_folder(folder: Path) -> Mapping[str, Tensor]:
    """A checkpoint's tensors, by the names that their parameters have today as far as these can be told."""
    checkpoint = Checkpoint(folder)
    try:
        names = layout_of(folder).names
    except ValueError:
        return checkpoint
    return {names.get(key, key): tensor for key, tensor in checkpoint.items()}


def structure_of(base: Source, tuned: Source, model_class: Callable[[Any], nn.Module] | None) -> nn.Module:
    """A model whose modules and names are the tuned one's; its tensors are of no use, and often on the meta device.

    Raises:
        ValueError: if nothing says what the architecture is.
    """
    for source in (tuned, base):
        if isinstance(source, nn.Module):
            return source
        if not isinstance(source, Mapping):
            return _build_on_meta(Path(source), model_class)
    raise ValueError(
        "base and tuned are both state dicts, which do not say which modules their tensors belong to, nor which are tied. "
        "Give one of the two as a model or as a folder."
    )


def _build_on_meta(folder: Path, model_class: Callable[[Any], nn.Module] | None) -> nn.Module:
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # config classes check their options each in its own way
        raise ValueError(
            f"{folder} has no config.json that transformers can read ({error}). Load both models and pass them instead."
        ) from error
    if model_class is None:
        names = getattr(config, "architectures", None)
        model_class = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
        if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
            raise ValueError(
                f"config.json of {folder} names {names!r} as its architecture, which transformers does not have. Give "
                "its class as model_class, or load both models and pass them instead."
            )
    try:
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:  # whatever a class makes of options that it cannot use
        raise ValueError(
            f"config.json of {folder} describes no {model_class.__name__} ({type(error).__name__}: {error}). It is "
            "damaged; save or download it again."
        ) from error


def layout_of(folder: str | PathLike[str]) -> Layout:
    """What the class that a checkpoint's config.json names knows of it: tied parameters, and how names have changed.

    Raises:
        ValueError: if nothing says what the architecture is, or the folder holds no checkpoint.
    """
    model = _build_on_meta(Path(folder), None)
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    there = model.state_dict()
    names = {}
    for key in Checkpoint(folder):
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, there)
        if name not in there and key in there:
            # Saved by its name of today.
            names[key] = key
        elif converted is None:
            names[key] = name
    return Layout(names, [aliases for aliases in names_of(model).values() if len(aliases) > 1])


def names_of(structure: nn.Module) -> dict[str, list[str]]:
    """First name of every parameter, in model order → all its names; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in structure.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    return {aliases[0]: aliases for aliases in names.values()}


def read(structure: nn.Module, tensors: Mapping[str, Tensor], which: str) -> Parameters:
    """Find a model's parameters among a checkpoint's tensors.

    As in `from_pretrained`, a checkpoint of the model without its head, or with another one, may lack the prefix of the
    body's names (`bert.`), or have it where the model does not.

    Raises:
        ValueError: if tied parameters are stored with different values.
    """
    prefix = getattr(structure, "base_model_prefix", "") or ""
    names = names_of(structure)
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for first, aliases in names.items():
        keys = [alias for alias in aliases if alias in tensors]
        keys = keys or [key for alias in aliases for key in _other_spellings(alias, prefix) if key in tensors]
        if keys:
            found[first] = tensors[keys[0]]
            used.update(keys)
            for key in keys[1:]:
                _check_tied(found[first], tensors[key], keys[0], key, which)
    persistent = {plain_name(name) for name in structure.state_dict()}
    buffers = {}
    for name in sorted(persistent - {alias for aliases in names.values() for alias in aliases}):
        for key in [key for key in (name, *_other_spellings(name, prefix)) if key in tensors][:1]:
            buffers[name] = tensors[key]
            used.add(key)
    known = used | {plain_name(name) for name, _ in structure.named_buffers()}
    return Parameters(found, tuple(key for key in tensors if key not in known), buffers)


def _other_spellings(name: str, prefix: str) -> Iterator[str]:
    if prefix:
        yield name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}"


def _check_tied(one: Tensor, other: Tensor, name: str, twin: str, which: str) -> None:
    if one.data_ptr() == other.data_ptr() and one.shape == other.shape:
        return
    if one.shape != other.shape or one.dtype != other.dtype or not torch.equal(one, other):
        raise ValueError(
            f"{which}: {name!r} and {twin!r} are tied in the model, but have different values in the checkpoint. Set "
            "tie_word_embeddings=False in the tuned model's config if they were tuned apart, or save the models again."
        )


def check_complete(structure: nn.Module, tuned: Parameters, own: bool) -> None:
    """Check that every parameter of the model has a tuned tensor, and that no tuned tensor would be lost unseen.

    Args:
        structure: the model.
        tuned: what was found of it.
        own: whether the model is the tuned one's own, which alone may say that a tensor is of no use.

    Raises:
        ValueError: if not.
    """
    if missing := [name for name in names_of(structure) if name not in tuned.found]:
        raise ValueError(
            f"the tuned checkpoint has no tensor for {_some(missing)} of {type(structure).__name__}"
            + (f", but holds {_some(tuned.unused)}, which that model does not have. " if tuned.unused else ". ")
            + _PASS_MODELS
        )
    if tuned.unused and not own:
        raise ValueError(
            f"the tuned state dict holds {_some(tuned.unused)}, which the base model does not have. Pass the tuned model "
            "itself, or its folder, and name what is new in modules_to_save."
        )


def check_dense(stand_ins: Mapping[str, str], dense: set[str], base: Parameters) -> None:
    """Check that what the base does not have, or has in another shape, is kept whole.

    Args:
        stand_ins: parameters for which the base has no tensor to compare with → "" or what shapes the two have.
        dense: parameters below modules_to_save.
        base: what was found of the base.

    Raises:
        ValueError: naming those that are not, and the remedy.
    """
    loose = {name: shapes for name, shapes in stand_ins.items() if name not in dense}
    if shaped := {name: shapes for name, shapes in loose.items() if shapes}:
        name, shapes = next(iter(shaped.items()))
        raise ValueError(
            f"{name!r} is {shapes}: positions in one mean nothing in the other ({len(shaped)} such tensors). Resize the "
            "base as the tuned model was resized (resize_token_embeddings) and pass that, or keep the module whole with "
            "modules_to_save."
        )
    if loose:
        modules = sorted({name.rpartition(".")[0] for name in loose})
        text = (
            f"{_some([*loose])} of the tuned model are not in the base. What is new, such as a fresh head, goes into the "
            f"adapter whole: name its modules in the config's modules_to_save ({_some(modules)})."
        )
        if base.unused:
            text += f" The base holds {_some(base.unused)} instead; if that is the same by another name: {_PASS_MODELS}"
        raise ValueError(text)


def _some(names: list[str] | tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def build(
    structure: nn.Module, seeds: Mapping[str, Tensor], buffers: Mapping[str, Tensor], name: str | None
) -> nn.Module:
    """Copy a model's modules, with other tensors for its parameters and buffers; no tensor is copied.

    Args:
        structure: the model, which stays as it is.
        seeds: first name of every parameter → its tensor here.
        buffers: name → tensor; other buffers are shared with the structure.
        name: what the adapter's config says of the base (`base_model_name_or_path`).
    """
    memo: dict[int, Any] = {}
    for key, parameter in structure.named_parameters():
        memo[id(parameter)] = nn.Parameter(seeds[plain_name(key)], requires_grad=False)
    for key, buffer in structure.named_buffers():
        memo[id(buffer)] = buffers.get(plain_name(key), buffer)
    skeleton = copy.deepcopy(structure, memo)
    # Where the adapter's config and its model card read it.
    skeleton.__dict__["name_or_path"] = name
    if hasattr(skeleton, "config"):
        skeleton.config.__dict__["_name_or_path"] = name or ""
    return skeleton
