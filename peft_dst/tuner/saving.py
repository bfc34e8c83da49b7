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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.distributed.tensor import DTensor

from ..delta import CONFIG_NAME, WEIGHTS_NAME
from .exchange import processes_of


_CARD = "README.md"
_PICKLE = "adapter_model.bin"


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
    if processes is not None and call.arguments.setdefault("kwargs", {}).get("state_dict") is None:
        with processes.all_or_none("save_pretrained"):
            if call.arguments.get("is_main_process", True) and processes.is_first:
                # What would fail before the others are asked for their parts.
                Path(save_directory).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=save_directory, prefix=".saving-"):
                    pass
        # Without the dense weights, which nobody needs.
        embeddings = call.arguments.get("save_embedding_layers", "auto") is True
        call.arguments["kwargs"]["state_dict"] = _gathered(model, embeddings)
        call.arguments["is_main_process"] = call.arguments.get("is_main_process", True) and processes.is_first
        with processes.all_or_none("save_pretrained"):
            _save(original, call)
    else:
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


def _gathered(model: PeftModel, embeddings: bool) -> dict[str, Any]:
    """The state dict of a model that several processes hold together, of which only what an adapter's file holds is
    gathered: its dense copies, and where it is asked for the embeddings.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()] if embeddings else []
    wanted = [f"{name}." for name, module in model.named_modules() if any(module is end for end in ends)]
    gathered = {}
    for key, tensor in model.state_dict().items():
        if not isinstance(tensor, DTensor):
            gathered[key] = tensor
        elif ".modules_to_save." in key or key.startswith(tuple(wanted)):
            gathered[key] = tensor.full_tensor()
    return gathered


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
