"""An adapter's files take their places together: a save that is killed leaves the old adapter or the new one.

PEFT writes tensors, config and model card one after another over those that are there. Here it writes them into a folder
beside them, and each is then renamed into its place, the tensors first: what stands in their metadata counts until the
config has followed.
"""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import check_file_exists_on_hf_hub
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..delta import CONFIG_NAME, MARKER, WEIGHTS_NAME
from .constraints import processes_of
from .exchange import TOGETHER
from .states import EXTRA_STATE, expanded


_CARD = "README.md"
_PICKLE = "adapter_model.bin"
_BASE_CONFIG = "config.json"


def save_pretrained(
    original: Callable[..., None], model: PeftModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> None:
    """`PeftModel.save_pretrained` for DST's adapters: the same files, each whole at any moment.

    Args:
        original: PEFT's.
        model: whose adapters to save.
        save_directory: where to; made if it is not there.
        *args: as PEFT takes them.
        **kwargs: likewise.
    """
    call = inspect.signature(original).bind(model, save_directory, *args, **kwargs)
    processes = processes_of(model)
    given = call.arguments.setdefault("kwargs", {}).get("state_dict")
    if processes is not None and given is None:
        automatic, resized = call.arguments.get("save_embedding_layers", "auto") == "auto", False
        with processes.all_or_none("save_pretrained"):
            if call.arguments.get("is_main_process", True) and processes.is_first:
                # What would fail before the others are asked for their parts.
                Path(save_directory).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=save_directory, prefix=".saving-"):
                    pass
            if automatic and processes.is_first:
                resized = _was_resized(model)
        if automatic:
            # PEFT would decide it when it is too late to gather them, and each process by itself.
            call.arguments["save_embedding_layers"] = processes.any(resized)
        # Without the dense weights that nobody needs.
        call.arguments["kwargs"]["state_dict"] = _gathered(model, call.arguments["save_embedding_layers"])
        call.arguments["is_main_process"] = call.arguments.get("is_main_process", True) and processes.is_first
        with processes.all_or_none("save_pretrained"):
            _save(original, call)
    # Of a gathered state dict one process has all, and the others, which have none of it, have nothing to write.
    elif processes is None or (call.arguments.get("is_main_process", True) and (given or processes.is_first)):
        _save(original, call)


def _save(original: Callable[..., None], call: inspect.BoundArguments) -> None:
    save_directory = call.arguments["save_directory"]
    if not call.arguments.get("is_main_process", True) or os.path.isfile(save_directory):
        original(*call.args, **call.kwargs)
        return
    target = Path(save_directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as folder:
        if (target / _CARD).is_file():
            # What a person wrote into it is kept.
            shutil.copyfile(target / _CARD, Path(folder) / _CARD)
        call.arguments["save_directory"] = folder
        original(*call.args, **call.kwargs)
        _move(Path(folder), target)


def _was_resized(model: PeftModel) -> bool:
    """Whether the vocabulary was resized since the base was saved, by which PEFT decides to save the embeddings whole."""
    config: Any = getattr(model, "config", None)
    size, names = getattr(config, "vocab_size", None), {c.base_model_name_or_path for c in model.peft_config.values()}
    there = [n for n in names if n and (Path(n, _BASE_CONFIG).exists() or check_file_exists_on_hf_hub(n, _BASE_CONFIG))]
    if not size or all(type(config).from_pretrained(name).vocab_size == size for name in there):
        return False
    warnings.warn(
        "The vocabulary was resized since the base was saved, so the embeddings are saved whole.", stacklevel=3
    )
    return True


def _gathered(model: PeftModel, embeddings: bool) -> dict[str, Any]:
    """The state dict of a model that several processes hold together, of which only what an adapter's file holds is
    gathered: its dense copies, and where it is asked for the embeddings.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()] if embeddings else []
    wanted = [f"{name}." for name, module in model.named_modules() if any(module is end for end in ends)]
    gathered: dict[str, Any] = {}
    joined: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if key.endswith(f"{MARKER}.{EXTRA_STATE}"):
            joined |= expanded({key: tensor}, key.removesuffix(EXTRA_STATE))
        elif not isinstance(tensor, DTensor):
            gathered[key] = tensor
        elif ".modules_to_save." in key or key.startswith(tuple(wanted)):
            gathered[key] = tensor.full_tensor()
    # The records themselves are empty there.
    return {**gathered, **joined, TOGETHER: torch.empty(0)}


def _move(source: Path, target: Path) -> None:
    order = (WEIGHTS_NAME, _PICKLE, CONFIG_NAME)
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: order.index(path.name) if path.name in order else len(order)):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    for path in files:
        if path.name == _PICKLE:
            # PEFT would read the older one in its stead.
            (target / path.relative_to(source)).with_name(WEIGHTS_NAME).unlink(missing_ok=True)
