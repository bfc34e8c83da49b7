"""Rows of a data set, from the hub or from a folder of JSON lines."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, ReadInstruction, load_dataset


# The folder in which relative folders are looked for, too.
VARIABLE = "PEFT_DST_DATA"


def local_folder(name: str, holding: str) -> Path | None:
    """The folder that a name stands for, here or inside $PEFT_DST_DATA, if there is one with such a file in it.

    Args:
        name: relative or absolute.
        holding: name of a file, or a pattern of names.
    """
    root = os.environ.get(VARIABLE)
    candidates = [Path(name), *([Path(root) / name] if root else [])]
    return next((folder for folder in candidates if folder.is_dir() and any(folder.glob(holding))), None)


def find_folder(data: str) -> Path | None:
    """The local folder of a data set, if there is one."""
    return local_folder(data, "*.jsonl")


def load_rows(data: str, split: str, subset: str | None = None) -> Dataset:
    """Rows of a split, or of a part of it.

    Args:
        data: hub id; or a folder with `<split>.jsonl`, as it is or inside $PEFT_DST_DATA.
        split: as `datasets` writes it: train, train[:1000], train+validation[:50%].
        subset: name of the configuration, on the hub; of a folder the one inside it, if it is there.

    Raises:
        ValueError: if there is no such data set or split, or a file is empty or broken.
    """
    folder = find_folder(f"{data}/{subset}" if subset else data) or find_folder(data)
    if folder is None and Path(data).is_dir():
        raise ValueError(
            f"{data} has no files of JSON lines (train.jsonl, …){f', nor has {subset} in it' if subset else ''}."
        )
    if folder is None:
        try:
            return load_dataset(data, subset, split=split)
        except Exception as error:  # of the hub, the network, or the split's name
            raise ValueError(
                f"{data!r} is no folder with JSON lines here or in {VARIABLE}, and as a hub id it cannot be read: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from None
    files = {path.stem: str(path) for path in sorted(folder.glob("*.jsonl"))}
    wanted = [re.split(r"\[", part.strip())[0] for part in split.split("+")]
    for name in wanted:
        if name not in files:
            raise ValueError(f"{folder} has no {name}.jsonl; its splits are {', '.join(files)}.")
    for name in wanted:
        if not Path(files[name]).stat().st_size:
            raise ValueError(f"{files[name]} is empty; give it rows, or name another split.")
    try:
        return load_dataset("json", data_files={name: files[name] for name in wanted}, split=split)
    except Exception as error:  # of the reader, which does not say where
        wrong = next((place for name in wanted if (place := _broken(Path(files[name])))), None)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(wrong or f"{folder}: the split {split} cannot be read: {reason}") from None


def source_of(data: str, subset: str | None) -> tuple[str, str | None]:
    """What is read of a data set: equal for two ways to write one folder."""
    inner = find_folder(f"{data}/{subset}") if subset else None
    folder = inner or local_folder(data, "*")
    return (str(folder.resolve()), None) if folder else (data, subset)


def rows_in_common(one: Dataset, part: str, other: Dataset, others_part: str) -> bool:
    """Whether two parts of one data set, as `load_rows` gave them, have rows in common."""
    return any(
        a[0] == b[0] and max(a[1], b[1]) < min(a[2], b[2])
        for a in _ranges(one, part)
        for b in _ranges(other, others_part)
    )


def _ranges(data: Dataset, part: str) -> list[tuple[str, int, int]]:
    """Name of a split, first row and end of each piece of `part`."""
    # None of a data set that was made of rows in memory.
    sizes = {name: split.num_examples for name, split in (data.info.splits or {}).items()}
    if not sizes:
        return []
    pieces = ReadInstruction.from_spec(part).to_absolute(sizes)
    return [(piece.splitname, piece.from_, piece.to) for piece in pieces]


def _broken(file: Path) -> str | None:
    """The first line of a file that is no JSON object, in words."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError as error:
                return f"{file}, line {number} is no JSON: {error}."
            if not isinstance(row, dict):
                return f"{file}, line {number} holds {line.strip()[:40]!r}; each line must be an object, with columns."
    return None


def named(value: Any, names: Sequence[str]) -> str:
    """The name of a label that is given as a number.

    Raises:
        ValueError: if there is none: test sets without public labels have -1.
    """
    if not isinstance(value, int) or not 0 <= value < len(names):
        hidden = "; this split has no public labels, use another, such as validation" if value == -1 else ""
        raise ValueError(f"a label is {value!r}, but labels go from 0 to {len(names) - 1}{hidden}.")
    return names[value]


def text_of(value: Any, name: str) -> str:
    """A value that must be text.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {str(value)[:40]}; set task.columns={{{name}: COLUMN}}.")
    return value


def first_rows(data: str, split: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a split, `count` at most; of the hub's data sets no more than these is fetched.

    Raises:
        ValueError: if there is no such data set or split.
    """
    if find_folder(data) is None and not Path(data).is_dir():
        try:
            return list(islice(load_dataset(data, split=split, streaming=True), count))
        except Exception:  # said below, with where it was looked for
            pass
    return list(islice(load_rows(data, split), count))


def pick(row: Mapping[str, Any], name: str, columns: Mapping[str, str], usual: Sequence[str] = ()) -> Any:
    """A row's value of a name: of the column that the options give, or else of the first usual one that is there.

    Raises:
        ValueError: if there is none.
    """
    candidates = (columns[name],) if name in columns else (name, *usual)
    for column in candidates:
        value: Any = row
        for part in column.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    if empty := [column for column in candidates if column in row]:
        raise ValueError(f"{empty[0]} is null; leave that row out, or set task.columns={{{name}: COLUMN}}.")
    raise ValueError(
        f"the data has no column for {name!r} ({' or '.join(candidates)}); it has {', '.join(map(str, row))}. Set "
        f"task.columns={{{name}: COLUMN}}."
    )
