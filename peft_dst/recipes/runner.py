"""Running a recipe: train, evaluate, and write down what came of it.

A run is a folder: `config.yaml` (the whole recipe), `adapter` (or `model`, where all weights were tuned), `results.json`
when it is finished, and until then `checkpoints` and `cache`. A folder holds one recipe, and one process works in it; a
finished run is not run again, an interrupted one goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import datasets
import torch
from filelock import FileLock, Timeout
from peft import PeftModel
from torch import nn
from transformers.utils import logging as transformers_logging

from ..config import DSTConfig
from ..core.silos import compile_silo_patterns, read_names
from ..delta import SparseDelta
from ..delta.files import replace_text
from .config import differences, load_recipe, to_dict, to_yaml, value_of
from .finished import load_trained, predictions_file, saved, without_predictions
from .forgetting import text_loss
from .lab import Lab, Training
from .methods import prepare
from .models import Seed
from .options import SPLITS, Recipe
from .rates import settled
from .record import (
    ADAPTER,
    CACHE,
    CHECKPOINTS,
    CONFIG,
    ERROR,
    LOCK,
    LOG,
    MODEL,
    RESULTS,
    TRIAL,
    file_sizes,
    lacking,
    peak_memory,
    recipe_of,
    results,
    surroundings,
    write,
)
from .snapshots import SNAPSHOTS, shared


Metrics = dict[str, dict[str, float]]
# Options that change neither what is trained nor a figure.
NO_EFFECT = (
    "evaluation.predictions",
    *(f"training.{name}" for name in ("evaluation_batch_size", "save_steps", "logging_steps", "empty_cache_steps")),
)
# Options that may be otherwise when a run is measured again: of how, and where its model and data are now.
OF_EVALUATION = (
    *(f"evaluation.{name}" for name in ("train_examples", "beams", "max_new_tokens", "bleurt", "predictions")),
    "training.evaluation_batch_size",
    *("model.name", "model.tokenizer", "model.tuned", "task.data", "task.evaluation_data"),
)


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    progress: bool = False,
    cache: Path | None = None,
    wait: bool = False,
) -> dict[str, Any]:
    """Run a recipe, or go on with it.

    Of a finished run only the splits are measured that it has no figures of, and predictions written that are missing.

    Args:
        recipe: what to do; its sweep and search are not looked at.
        folder: of the run.
        progress: show bars.
        cache: folder of what several runs can share, such as scores; if not given, it is made anew, and removed again.
        wait: if another process works in the folder, wait for it.

    Returns:
        What stands in results.json.

    Raises:
        ValueError: if the folder belongs to another recipe or process, or the recipe does not fit its data or model.
    """
    folder, recipe = Path(folder), settled(recipe)
    with _claimed(recipe, folder, wait):
        record = results(folder)
        splits = lacking(recipe, record) if record is not None else []
        if record is None or (splits and not saved(folder).is_dir()):
            # A search keeps of what it tried the figures alone.
            record = _run(recipe, folder, progress, cache)
        elif splits:
            _add_splits(record, recipe, folder, splits, progress)
        if splits := without_predictions(recipe, record, folder):
            # Its figures stay those that were measured at its end.
            _measured(recipe, folder, splits, progress)
        _tidy(folder)
        return record


def _add_splits(record: dict[str, Any], recipe: Recipe, folder: Path, splits: list[str], progress: bool) -> None:
    lab = Lab(recipe, folder, progress)
    if recipe.evaluation.after_head:
        record["metrics_after_head"] = record.get("metrics_after_head", {}) | _after_head(lab, splits)
    record["metrics"] |= _metrics(lab, load_trained(lab.bare(), folder), splits, folder)
    record["recipe"]["evaluation"]["splits"] = list(record["metrics"])
    write(folder / RESULTS, record)


def _tidy(folder: Path) -> None:
    """Remove what a finished run needs no longer."""
    for left in (CHECKPOINTS, CACHE):
        shutil.rmtree(folder / left, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove from a finished run's folder what a process that was killed at its end left, if no other works in it."""
    if (folder / CHECKPOINTS).exists() or (folder / CACHE).exists():
        with suppress(Timeout), FileLock(folder / LOCK).acquire(blocking=False):
            _tidy(folder)


def _run(recipe: Recipe, folder: Path, progress: bool, cache: Path | None) -> dict[str, Any]:
    begin, now = time.perf_counter(), datetime.now(timezone.utc)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    lab = Lab(recipe, folder, progress, cache)
    after_head = _after_head(lab, recipe.evaluation.splits) if recipe.evaluation.after_head else {}
    prepared = prepare(lab)
    texts = {"before": text_loss(lab, prepared.model, seed=True)} if recipe.evaluation.text else {}
    ready = time.perf_counter()
    training = Training(0, 0.0, [])
    if prepared.optimizer is not None:
        plan = replace(lab.plan, resumable=True)
        training = lab.fit(prepared.model, prepared.optimizer, plan, prepared.penalty, prepared.callbacks)
    memory = peak_memory()
    _save(prepared.model, folder)
    evaluating = time.perf_counter()
    metrics = _metrics(lab, prepared.model, recipe.evaluation.splits, folder)
    if texts:
        texts["after"] = text_loss(lab, prepared.model)
    done = time.perf_counter()
    record = {
        "recipe": to_dict(recipe),
        "metrics": metrics,
        **({"metrics_after_head": after_head} if after_head else {}),
        **({"text_loss": texts} if texts else {}),
        "free_parameters": prepared.free_parameters,
        **_sizes(lab.bare()),
        "file_sizes": file_sizes(saved(folder)),
        **_subset(prepared.model, folder),
        "examples": {name: len(lab.rows[name]) for name in ("train", "validation", "test")},
        "steps": training.steps,
        **({"tokens": training.tokens} if training.tokens else {}),
        "seconds": {
            "preparation": round(ready - begin, 2),
            "training": round(training.seconds, 2),
            "evaluation": round(done - evaluating, 2),
            "all": round(training.earlier + done - begin, 2),
            **_switching(prepared.model),
        },
        "peak_memory": memory,
        **({"training_memory": training.memory} if training.memory else {}),
        "created_at": now.isoformat(timespec="seconds"),
        **surroundings(),
        "history": training.history,
    }
    write(folder / RESULTS, record)
    return record


def only_own_bars() -> None:
    """In a program: no bars and reports of every little loading, so that training's own can be seen."""
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    # PEFT says so whenever a model with a prompt generates.
    warnings.filterwarnings("ignore", "Position ids are not supported")


def _begun(folder: Path) -> bool:
    """Whether there is more in a folder than what a run that came to nothing leaves."""
    before = {LOCK, LOG, ERROR, TRIAL, CONFIG}
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if CONFIG in names:
        before |= {CACHE} if any((folder / CHECKPOINTS).glob("*")) else {CACHE, CHECKPOINTS}
    return any(not (name.startswith(f"{CONFIG}.") and name.endswith(".tmp")) for name in names - before)


@contextmanager
def _claimed(recipe: Recipe, folder: Path, wait: bool) -> Iterator[None]:
    """Make the folder this recipe's, and this process's.

    Raises:
        ValueError: if it is another's, or holds something else.
    """
    file = folder / CONFIG
    if not file.is_file() and _begun(folder):
        raise ValueError(f"{folder} is not empty, and holds no run; give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # The system releases it when the process ends, however it ends.
        lock = FileLock(folder / LOCK).acquire(blocking=wait)
    except Timeout:
        raise ValueError(f"another process works in {folder}; wait for it, or give another folder.") from None
    with lock:
        if not _begun(folder):
            # Nothing has come of another recipe that may stand there.
            replace_text(file, to_yaml(recipe))
        there = load_recipe(file)
        if other := [name for name in differences(there, recipe) if name not in NO_EFFECT]:
            was, now = (value_of(r, other[0]) for r in (there, recipe))
            of_evaluation = all(name in OF_EVALUATION and name.startswith("evaluation.") for name in other)
            remedy = "; peft-dst evaluate measures it again with other options of evaluation" if of_evaluation else ""
            raise ValueError(
                f"{folder} holds a run with {other[0]} = {was!r}, not {now!r}"
                + (f" (and {len(other) - 1} more options that differ)" if len(other) > 1 else "")
                + f"; give another folder, or remove that one{remedy}."
            )
        yield


def evaluate(
    folder: str | Path, splits: Iterable[str] = ("test",), overrides: Iterable[str] = (), *, progress: bool = False
) -> Metrics:
    """Load what a finished run saved, and measure it again; written to evaluation.json in the folder.

    Args:
        folder: of the run.
        splits: of train, validation and test.
        overrides: `option=value` each: options of evaluation, and where model and data are now.
        progress: show bars.

    Raises:
        ValueError: if the folder holds no finished run, for a split of another name, or another option.
    """
    overrides = list(overrides)
    for name in (override.partition("=")[0] for override in overrides):
        if name == "evaluation.splits":
            raise ValueError(
                f"{name} says what a run is measured on at its end; here the splits are given by themselves (--split)."
            )
        if name not in OF_EVALUATION:
            raise ValueError(f"{name} cannot be otherwise than it was in training; {', '.join(OF_EVALUATION)} can.")
    folder, splits = Path(folder), list(splits)
    unknown = [split for split in splits if split not in SPLITS]
    if unknown:
        raise ValueError(f"there is no split {unknown[0]!r}; there are {', '.join(SPLITS)}.")
    metrics = _measured(recipe_of(folder, overrides), folder, splits, progress)
    write(folder / "evaluation.json", {"metrics": metrics, **surroundings()})
    return metrics


def _measured(recipe: Recipe, folder: Path, splits: Iterable[str], progress: bool) -> Metrics:
    """Figures of what a run saved."""
    lab = Lab(recipe, folder, progress)
    return _metrics(lab, load_trained(lab.bare(), folder), splits, folder)


def _after_head(lab: Lab, splits: Iterable[str]) -> Metrics:
    if not lab.recipe.training.head_first.epochs:
        raise ValueError("evaluation.after_head needs a head that is trained first: set training.head_first.epochs.")
    return _metrics(lab, lab.start().model, splits, None)


def _metrics(lab: Lab, model: nn.Module, splits: Iterable[str], folder: Path | None) -> Metrics:
    found = {}
    for split in splits:
        found[split], answers = lab.predict(model, split)
        if folder is not None and lab.recipe.evaluation.predictions:
            lines = [json.dumps({"answer": answer}, ensure_ascii=False) for answer in answers]
            predictions_file(folder, split).write_text("\n".join(lines) + "\n")
    return found


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder / (ADAPTER if isinstance(model, PeftModel) else MODEL))


def _subset(model: Any, folder: Path) -> dict[str, Any]:
    """Where the entries of an adapter of this package are, by kind of module and layer; how they moved, if recorded."""
    if not _is_dst(model):
        return {}
    delta = SparseDelta.load(folder / ADAPTER)
    entries: dict[str, dict[str, int]] = {}
    for name, (layer, kind) in read_names(list(delta), compile_silo_patterns(delta.config.get("silo_pattern"))).items():
        of_kind = entries.setdefault(kind, {})
        of_kind[layer] = of_kind.get(layer, 0) + len(delta[name])
    found: dict[str, Any] = {"entries": entries}
    if (folder / SNAPSHOTS).is_dir():
        found["snapshots"] = shared(folder / SNAPSHOTS)
    return {"subset": found}


def _is_dst(model: Any) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.active_peft_config, DSTConfig)


def _switching(model: Any) -> dict[str, float]:
    """Seconds to put an adapter of this package into the weights, the median of 21 times."""
    if not _is_dst(model):
        return {}
    taken = []
    for _ in range(21):
        with model.disable_adapter():
            begin = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return {"switching": round(statistics.median(taken), 6)}


def _sizes(seed: Seed) -> dict[str, int]:
    body = sum(tensor.numel() for tensor in seed.body().values())
    return {"body_parameters": body, "head_parameters": sum(p.numel() for p in seed.model.parameters()) - body}
