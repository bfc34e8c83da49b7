"""What is written down of a run: with what, on what, how long, how large, how well."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..delta.files import replace_text
from .config import load_recipe
from .options import Recipe


PACKAGES = (
    "peft-dst",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "sacrebleu",
    "seqeval",
    "scikit-learn",
)
CONFIG, RESULTS = "config.yaml", "results.json"
# What was trained: an adapter, or where all weights were tuned the model.
ADAPTER, MODEL = "adapter", "model"
# From which an interrupted run goes on.
CHECKPOINTS, CACHE = "checkpoints", "cache"
# In a run's folder before it is one; and what marks a run that a search made only to choose by.
LOCK, LOG, ERROR, TRIAL = ".lock", "log.txt", "error.txt", ".trial"


# Of `surroundings`.
SURROUNDINGS = ("commit", "versions", "machine")


def surroundings() -> dict[str, Any]:
    """The commit of the package (null if it is no checkout), versions, and the machine's kind."""
    return {
        "commit": _commit(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def peak_memory() -> dict[str, Any]:
    """Bytes at the peak: what tensors took on the accelerator, and what was reserved for them.

    Without one, what the process had resident, which counts all that it did before.
    """
    if torch.cuda.is_available():
        reserved = torch.cuda.max_memory_reserved()
        return {"bytes": torch.cuda.max_memory_allocated(), "reserved": reserved, "of": "accelerator"}
    try:
        import resource
    except ImportError:  # Windows
        return {"bytes": None, "of": "process"}
    unit = 1 if platform.system() == "Darwin" else 1024
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of": "process"}


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of tensors below a folder, by its path in it."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*.safetensors"))}


def write(path: Path, value: Any) -> None:
    """JSON that appears when it is whole."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def results(folder: str | Path) -> dict[str, Any] | None:
    """What stands in a run's results.json; None if it is not finished.

    Raises:
        ValueError: if the file is damaged.
    """
    file = Path(folder) / RESULTS
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); remove it to run this again.") from None
    if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
        raise ValueError(f"{file} is damaged (it holds no metrics); remove it to run this again.")
    return record


def lacking(recipe: Recipe, record: Mapping[str, Any]) -> list[str]:
    """The splits of a recipe on which a finished run has not been measured."""
    wanted = ["metrics", *(["metrics_after_head"] if recipe.evaluation.after_head else [])]
    return [s for s in recipe.evaluation.splits if any(s not in record.get(name, {}) for name in wanted)]


def recipe_of(folder: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a finished run.

    Args:
        folder: of the run.
        overrides: `option=value` each, for options that are to be otherwise.

    Raises:
        ValueError: if the folder holds none, or an override does not fit.
    """
    if results(folder) is None or not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no finished run; peft-dst train makes one.")
    return load_recipe(folder / CONFIG, overrides)


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    # Without its tags: of a tagged commit it would give the tag's name.
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
