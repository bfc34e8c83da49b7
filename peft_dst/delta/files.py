"""The adapter's files: docs/format.md, read and written.

Files come from strangers: whatever is read is checked as far as it can be without the base, before anything is made of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .packed import DESCRIPTION, describe, is_packed, unpack
from .records import FORMAT_VERSION, DeltaError, Record, Summary, check_entries, check_name, check_record


WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
# The metadata of a file's own, each with "dst_" before it.
_FIELDS = ("format_version", "config", "records")
# The child module of a host under which a PEFT model's state dict has its records.
MARKER = "_sparse"
PARTS = ("dst_indices", "dst_values")
PEFT_PREFIX = "base_model.model."
# A record's key without PEFT's prefix and without the adapter's name, which a file does not hold either.
RECORD_KEY = re.compile(rf"(?P<host>(?:.*\.)?){MARKER}\.(?P<part>{'|'.join(PARTS)})\.(?P<parameter>[^.]+)")
# Lists and maps within one another that a config may have. What goes through them is recursive, as Python's copies are.
_DEEPEST = 50
# What wrappers of torch's put into the names of what they wrap: compiled modules, activation checkpointing, FSDP1.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def plain_name(name: str) -> str:
    """The name of a module, parameter or tensor as it is without wrappers of torch's around any part of the model.

    A file has no others: what was trained compiled loads onto a base that is not, and the other way round.
    """
    return _WRAPPERS.sub("", name)


class Contents(NamedTuple):
    """What a file says, checked as far as can be without the base.

    Attributes:
        records: parameter's name → its record.
        summaries: the same names → what the file says of them.
        dense: dense tensors, by their keys.
        config: adapter_config.json without `records`.
    """

    records: dict[str, Record]
    summaries: dict[str, Summary]
    dense: dict[str, Tensor]
    config: dict[str, Any]


def stamp(directory: str | os.PathLike[str]) -> None:
    """Write what adapter_config.json says into the metadata of the adapter_model.safetensors beside it, if there is one.

    So the tensors can be read by themselves. The file is replaced in one step: at any moment either the old or the new one
    is there, whole.
    """
    path = Path(directory) / WEIGHTS_NAME
    if path.is_file():
        config = json.loads((Path(directory) / CONFIG_NAME).read_text())
        records = config.pop("records", None) or {}
        tensors = load_file(path)
        kept = {key: tensor for key, tensor in tensors.items() if not is_wrapper_s_copy(key, tensors)}
        write_file(path, kept, config, records)


def describes(records: Any, directory: str | os.PathLike[str]) -> bool:
    """Whether `records` of a config may be of the tensors in a folder: they are, or there is no adapter_model.safetensors.

    Raises:
        DeltaError: if they, or the tensors, are malformed.
    """
    path = Path(directory) / WEIGHTS_NAME
    if not path.is_file():
        return True
    summaries, (found, _) = parse_summaries(records), find_records(_tensors(path))
    if found.keys() != summaries.keys():
        return False
    try:
        for name, parts in found.items():
            check_entries(name, summaries[name], pair(name, parts))
    except DeltaError:
        return False
    return True


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DeltaError(f"{path} cannot be read ({error}). It is damaged; save or download it again.") from error


def is_wrapper_s_copy(key: str, tensors: Mapping[str, Tensor], adapter: str = "") -> bool:
    """Whether a key is what PEFT saves a second and a third time of an embedding in modules_to_save that was resized.

    It adds everything below such an embedding: besides the dense copy the wrapper's own names for that, and for the base's.

    Args:
        key: the key.
        tensors: all keys that stand beside it.
        adapter: the adapter's name, if keys hold it already.
    """
    for part in (".modules_to_save.", ".original_module."):
        host, found, parameter = key.rpartition(part)
        if found and not (adapter and parameter.startswith(f"{adapter}.")):
            own = f".modules_to_save.{adapter}." if adapter else "."
            return f"{host}{own}{parameter}" in tensors
    return False


def write_file(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Mapping[str, Any], records: Mapping[str, Any]
) -> None:
    """Write tensors and what describes them, in one step: a kill at any moment leaves the old file or the new one.

    Args:
        path: the file.
        tensors: key → tensor.
        config: adapter_config.json without `records`.
        records: parameter's name → Summary, or its JSON. Packed tensors bring it along.
    """
    path = Path(path)
    fields = {"format_version": FORMAT_VERSION, "config": dict(config)}
    if DESCRIPTION not in tensors:
        fields["records"] = records
    replace_file(
        path, tensors, {f"dst_{key}": json.dumps(value, separators=(",", ":")) for key, value in fields.items()}
    )


def replace_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file beside its place, and rename it when it is whole."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    # mkstemp's would be private.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            temporary,
            metadata={"format": "pt", **metadata},
        )
        if path.exists():
            # The adapter keeps the permissions it was saved with.
            temporary.chmod(path.stat().st_mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink()
        raise


def write_config(folder: str | os.PathLike[str], config: Mapping[str, Any], records: Mapping[str, Any]) -> None:
    """Write adapter_config.json, in one step."""
    replace_text(Path(folder) / CONFIG_NAME, json.dumps({**config, "records": records}, indent=2, sort_keys=True))


def replace_text(path: Path, text: str) -> None:
    """Write a text beside its place, and rename it when it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of itself: `format_version`, `config`, `records`; empty for one of another kind.

    Raises:
        DeltaError: if the file cannot be read, or its metadata are broken.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            packed = {key: file.get_tensor(key) for key in file.keys() if key == DESCRIPTION}  # noqa: SIM118
        # What a later version may add is ignored.
        found = {name: json.loads(metadata[f"dst_{name}"]) for name in _FIELDS if f"dst_{name}" in metadata}
        if found:
            _check_version(path, found)
        found |= {"records": describe(packed)} if packed else {}
        check_depth(path, found)
        return found
    except (SafetensorError, OSError) as error:
        raise DeltaError(f"{path} cannot be read ({error}). It is damaged; save or download it again.") from error
    except DeltaError:
        raise
    except (ValueError, RecursionError) as error:
        raise DeltaError(f"{path} has broken metadata ({error}). It is damaged; save or download it again.") from error


def reconcile(config: dict[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What adapter_config.json says, or, where that describes other tensors than those beside it, what they say themselves.

    A save that was cut short leaves new tensors beside the old config.
    """
    records = metadata.get("records")
    if records is None or records == config.get("records"):
        return config
    said = metadata.get("config")
    return {**(config if said is None else _checked(WEIGHTS_NAME, said)), "records": records}


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the adapter_config.json of a DST adapter.

    Raises:
        DeltaError: if there is none, or it is damaged or of another kind.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DeltaError(f"{path} cannot be read ({error}). Give the folder of a saved adapter.") from error
    check_depth(path, config)
    return _checked(path, config)


def check_depth(path: object, found: object) -> None:
    """Check, without recursion, that what was read from JSON is not nested without reason.

    Args:
        path: where it was read from.
        found: what was read.

    Raises:
        DeltaError: if it is.
    """
    level = [found]
    for _ in range(_DEEPEST + 1):
        maps = [inner for one in level if isinstance(one, dict) for inner in one.values()]
        level = maps + [inner for one in level if isinstance(one, list) for inner in one]
        if not level:
            return
    raise DeltaError(f"{path} is nested more than {_DEEPEST} levels deep. It is damaged; save or download it again.")


def parse_summaries(records: object, path: object = CONFIG_NAME) -> dict[str, Summary]:
    """Read `records` as they stand in a config: parameter's name → what is said of its record.

    Raises:
        DeltaError: if an entry is malformed.
    """
    if records is None:
        return {}
    if not isinstance(records, dict):
        raise DeltaError(f"{path} has malformed `records`: {records!r:.80}. The file was damaged or edited.")
    return {name: Summary.parse(name, raw) for name, raw in records.items()}


def _checked(path: object, config: Any) -> dict[str, Any]:
    if not isinstance(config, dict) or config.get("peft_type") != "DST":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise DeltaError(f"{path} describes an adapter of type {kind!r}, not 'DST'. Only DST adapters hold records.")
    _check_version(path, config)
    kept = config.get("modules_to_save")
    if kept is not None and not (isinstance(kept, list) and all(isinstance(name, str) and name for name in kept)):
        raise DeltaError(f"{path} has malformed `modules_to_save`: {kept!r:.80}. It is a list of modules' names.")
    return config


def _check_version(path: object, said: Mapping[str, Any]) -> None:
    if said.get("format_version") != FORMAT_VERSION:
        raise DeltaError(
            f"{path} has format version {said.get('format_version')!r}; this peft_dst reads version {FORMAT_VERSION}. "
            "Install a peft_dst that writes that version, or save the adapter again with this one."
        )


def read(path: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> Contents:
    """Read an adapter without its base model.

    Everything is checked that can be without it: form, order and range of positions, that values are finite, and that the
    tensors are those that were described. Whether the base is the right one only the base can tell.

    Args:
        path: the folder of an adapter, or its safetensors file alone.
        allow_nonfinite: take NaN and infinite values.

    Raises:
        DeltaError: if it is no DST adapter, or a damaged one.
    """
    path = Path(path)
    if path.is_dir():
        config = read_config(path)
        path = path / WEIGHTS_NAME
        if not path.is_file():
            raise DeltaError(
                f"{path.parent} holds no {WEIGHTS_NAME}. An adapter that was saved otherwise (safe_serialization=False) "
                "can be loaded with PEFT and saved again."
            )
        metadata = read_metadata(path)
        config = reconcile(config, metadata)
    else:
        metadata = read_metadata(path)
        config = {**_checked(path, metadata.get("config")), "records": metadata.get("records")}
    summaries = parse_summaries(config.pop("records", None), path)
    found, dense = find_records(_tensors(path))
    if found.keys() != summaries.keys():
        name = min(found.keys() ^ summaries.keys())
        wrong = (
            ("has entries for", "does not describe them") if name in found else ("describes entries for", "has none")
        )
        raise DeltaError(
            f"{path} {wrong[0]} {name!r}, but {wrong[1]}. It was edited, or adapter_config.json comes from another save; "
            "copy or download both again."
        )
    records = {}
    for name, parts in found.items():
        records[name] = record = pair(name, parts)
        numel = math.prod(summaries[name].shape)
        check_record(name, numel, record.values.dtype, record, allow_nonfinite=allow_nonfinite)
        check_entries(name, summaries[name], record)
    for key, tensor in () if allow_nonfinite else dense.items():
        check_dense_values(key, tensor)
    return Contents(records, summaries, dense, config)


def check_dense_values(key: str, tensor: Tensor) -> None:
    """Check that a dense tensor is finite.

    Raises:
        DeltaError: if not.
    """
    # Of eight bits: torch knows what is finite of wider ones.
    wide = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    if wide.is_floating_point() and not wide.isfinite().all():
        at = int((~wide.isfinite()).reshape(-1).nonzero()[0])
        raise DeltaError(f"{key!r} is not finite at position {at}. An adapter may not bring non-finite weights.")


def name_records(records: Mapping[str, Record]) -> dict[str, Tensor]:
    """The tensors of plain records, by their keys in a file."""
    tensors = {}
    for name, record in records.items():
        host, _, parameter = name.rpartition(".")
        marker = f"{host}.{MARKER}" if host else MARKER
        for part, entries in zip(PARTS, record, strict=True):
            key = f"{marker}.{part}.{parameter}"
            if not RECORD_KEY.fullmatch(key):
                raise DeltaError(
                    f"{name!r} is no name of a parameter that a file can hold: it is empty, or has a line break."
                )
            tensors[PEFT_PREFIX + key] = entries.contiguous()
    return tensors


def find_records(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Part a file's tensors into those of records, plain or packed, and dense ones.

    Args:
        tensors: key → tensor.

    Returns:
        Parameter's name → part → tensor; key → dense tensor.

    Raises:
        DeltaError: if packed records are damaged, or a key is none of a model's.
    """
    found: dict[str, dict[str, Tensor]] = {}
    dense, packed = {}, {}
    for key, tensor in tensors.items():
        check_name(key)
        if match := RECORD_KEY.fullmatch(key.removeprefix(PEFT_PREFIX)):
            found.setdefault(match["host"] + match["parameter"], {})[match["part"]] = tensor
        elif is_packed(key):
            packed[key] = tensor
        else:
            dense[key] = tensor
    if packed:
        if found:
            raise DeltaError("the file has plain and packed records. It is damaged or edited; save it again.")
        found = {name: dict(zip(PARTS, record, strict=True)) for name, record in unpack(packed).items()}
    return found, dense


def pair(name: str, parts: Mapping[str, Tensor]) -> Record:
    """A record from its two parts.

    Raises:
        DeltaError: if one is missing.
    """
    if missing := set(PARTS) - parts.keys():
        raise DeltaError(f"{name!r} has no {min(missing)} in the adapter file. It is damaged; save it again.")
    return Record(*(parts[part] for part in PARTS))
