"""The adapter's files: the metadata that makes its tensors readable by themselves, and reading records without a model."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .records import FORMAT_VERSION, DeltaError, Record, Summary, check_entries, check_record


WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
# The child module of a host under which a PEFT model's state dict has its records.
MARKER = "_sparse"
PARTS = ("dst_indices", "dst_values")
PEFT_PREFIX = "base_model.model."
# A record's key without PEFT's prefix and without the adapter's name, which a file does not hold either.
RECORD_KEY = re.compile(rf"(?P<host>(?:.*\.)?){MARKER}\.(?P<part>{'|'.join(PARTS)})\.(?P<parameter>[^.]+)")


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


def read_records(folder: str | os.PathLike[str]) -> dict[str, Record]:
    """Read a saved adapter's records without its base model.

    Everything is checked that can be without it: the form of each record, that positions ascend, that values are finite,
    and that the tensors are those that adapter_config.json describes. Whether positions lie within the base's tensors, and
    the base is the right one, only loading can tell. Dense copies (modules_to_save) are not read.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.

    Returns:
        Parameter's name in the base model → its record, for those that have entries.

    Raises:
        DeltaError: if the folder holds no DST adapter, or a damaged one.
    """
    folder = Path(folder)
    summaries = read_summaries(folder)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise DeltaError(
            f"{folder} holds no {WEIGHTS_NAME}. An adapter that was saved otherwise (safe_serialization=False) can be "
            "loaded with PEFT and saved again."
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DeltaError(f"{path} cannot be read ({error}). It is damaged; save or download it again.") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(PEFT_PREFIX) and (match := RECORD_KEY.fullmatch(key.removeprefix(PEFT_PREFIX))):
            found.setdefault(match["host"] + match["parameter"], {})[match["part"]] = tensor
    if found.keys() != summaries.keys():
        name = min(found.keys() ^ summaries.keys())
        one, other = (WEIGHTS_NAME, CONFIG_NAME) if name in found else (CONFIG_NAME, WEIGHTS_NAME)
        raise DeltaError(
            f"{name!r} has entries in {one} of {folder} but none in {other}. The two files come from different saves; copy "
            "or download both again."
        )
    records = {}
    for name, parts in found.items():
        if parts.keys() != set(PARTS):
            raise DeltaError(
                f"{name!r} has no {min(set(PARTS) - parts.keys())} in {path}. It is damaged; save it again."
            )
        records[name] = Record(*(parts[part] for part in PARTS))
        # Without the base every position that its dtype may hold is a good one.
        indices, values = records[name]
        largest = torch.empty(1, dtype=values.dtype, device="meta").expand(_largest(indices.dtype))
        check_record(name, largest, records[name])
        check_entries(name, summaries[name], records[name])
    return records


def parse_summaries(records: Mapping[str, Any]) -> dict[str, Summary]:
    """The same from `records` as they stand in a config.

    Raises:
        DeltaError: if an entry is malformed.
    """
    return {name: Summary.parse(name, raw) for name, raw in records.items()}


def _largest(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).max if dtype in (torch.int32, torch.int64) else 0


def read_summaries(folder: str | os.PathLike[str]) -> dict[str, Summary]:
    """What a saved adapter's config says of its records, by name of the parameter.

    Raises:
        DeltaError: if the folder's adapter_config.json is not one of a DST adapter, or damaged.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DeltaError(f"{path} cannot be read ({error}). Give the folder of a saved adapter.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "DST":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise DeltaError(f"{path} describes an adapter of type {kind!r}, not 'DST'. Only DST adapters hold records.")
    if config.get("format_version") != FORMAT_VERSION:
        raise DeltaError(
            f"{path} has format version {config.get('format_version')!r}; this peft_dst reads version {FORMAT_VERSION}. "
            "Install a peft_dst that writes that version, or save the adapter again with this one."
        )
    records = config.get("records") or {}
    if not isinstance(records, dict):
        raise DeltaError(f"{path} has malformed `records`: {records!r:.80}. The file was damaged or edited.")
    return parse_summaries(records)
