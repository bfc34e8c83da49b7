"""The adapter's safetensors file: the metadata that makes it readable without its adapter_config.json."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .records import FORMAT_VERSION


WEIGHTS_NAME = "adapter_model.safetensors"


def stamp(directory: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write the format version and the given fields into the metadata of an adapter file, if there is one.

    The file is replaced in one step: at any moment either the old or the new one is there, whole.

    Args:
        directory: where `adapter_model.safetensors` may stand.
        fields: name → JSON value; safetensors metadata holds strings, so each is stored as JSON under `dst_<name>`.
    """
    path = Path(directory) / WEIGHTS_NAME
    if not path.is_file():
        return
    metadata = {f"dst_{name}": json.dumps(value, separators=(",", ":")) for name, value in fields.items()}
    metadata |= {"format": "pt", "dst_format_version": str(FORMAT_VERSION)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        save_file(load_file(path), temporary, metadata=metadata)
        # mkstemp's file is private; the adapter keeps the permissions it was saved with.
        os.chmod(temporary, path.stat().st_mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields that `stamp` wrote, without the prefix; empty for a file without them."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return {key.removeprefix("dst_"): json.loads(value) for key, value in metadata.items() if key.startswith("dst_")}
