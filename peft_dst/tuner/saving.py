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

from ..delta import CONFIG_NAME, WEIGHTS_NAME


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
    given = inspect.signature(original).bind(model, save_directory, *args, **kwargs).arguments
    if not given.get("is_main_process", True) or os.path.isfile(save_directory):
        original(model, save_directory, *args, **kwargs)
        return
    target = Path(save_directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as folder:
        if (target / _CARD).is_file():
            # What a person wrote into it is kept.
            shutil.copyfile(target / _CARD, Path(folder) / _CARD)
        original(model, folder, *args, **kwargs)
        _move(Path(folder), target)


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
