"""Running a recipe: train, evaluate, and write down what came of it.

A run is a folder: `config.yaml` (the whole recipe), `adapter` (or `model`, where all weights were tuned), `results.json`
when it is finished, and until then `checkpoints`. A folder holds one recipe; a finished run is not run again, an
interrupted one goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from .config import Recipe, differences, load_recipe, to_dict, to_yaml
from .lab import CHECKPOINTS, Lab, Training
from .methods import prepare
from .models import Seed
from .record import CONFIG, RESULTS, file_sizes, peak_memory, surroundings, write


ADAPTER, MODEL = "adapter", "model"
Metrics = dict[str, dict[str, float]]


def train(recipe: Recipe, folder: str | Path, *, progress: bool = False) -> dict[str, Any]:
    """Run a recipe, or go on with it.

    Args:
        recipe: what to do; its sweep is not looked at.
        folder: of the run.
        progress: show bars.

    Returns:
        What stands in results.json; of a finished run, without running it again.

    Raises:
        ValueError: if the folder belongs to another recipe, or the recipe does not fit its data or model.
    """
    folder = Path(folder)
    if finished := claim(recipe, folder):
        return finished
    begin = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    lab = Lab(recipe, folder, progress)
    after_head = _after_head(lab) if recipe.evaluation.after_head else {}
    prepared = prepare(lab)
    ready = time.perf_counter()
    training = Training(0, 0.0, [])
    if prepared.optimizer is not None:
        plan = replace(lab.plan, resumable=True)
        training = lab.fit(prepared.model, prepared.optimizer, plan, prepared.penalty, prepared.callbacks)
    memory = peak_memory()
    _save(prepared.model, folder)
    evaluating = time.perf_counter()
    metrics = _metrics(lab, prepared.model, recipe.evaluation.splits, folder)
    done = time.perf_counter()
    record = {
        "recipe": to_dict(recipe),
        "metrics": metrics,
        **({"metrics_after_head": after_head} if after_head else {}),
        "free_parameters": prepared.free_parameters,
        **_sizes(lab.bare()),
        "file_sizes": file_sizes(_saved(folder)),
        "examples": {name: len(lab.rows[name]) for name in ("train", "validation", "test")},
        "steps": training.steps,
        "seconds": {
            "preparation": round(ready - begin, 2),
            "training": round(training.seconds, 2),
            "evaluation": round(done - evaluating, 2),
            "all": round(done - begin, 2),
        },
        "peak_memory": memory,
        **surroundings(),
        "history": training.history,
    }
    write(folder / RESULTS, record)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return record


def only_own_bars() -> None:
    """In a program: no bars and reports of every little loading, so that training's own can be seen."""
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")


def claim(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """Make the folder this recipe's.

    Returns:
        Its results, if it has been run to its end.

    Raises:
        ValueError: if it is another's, or holds something else.
    """
    file = folder / CONFIG
    if not file.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty, and holds no run; give another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        # Title and sweep say nothing of a single run.
        file.write_text(to_yaml(recipe))
        return None
    there = load_recipe(file)
    if other := differences(there, recipe):
        was, now = (_value(to_dict(r), other[0]) for r in (there, recipe))
        raise ValueError(
            f"{folder} holds a run with {other[0]} = {was!r}, not {now!r}"
            + (f" (and {len(other) - 1} more options that differ)" if len(other) > 1 else "")
            + "; give another folder, or remove that one."
        )
    return results(folder)


def results(folder: str | Path) -> dict[str, Any] | None:
    """What stands in a run's results.json; None if it is not finished."""
    file = Path(folder) / RESULTS
    return json.loads(file.read_text()) if file.is_file() else None


def evaluate(folder: str | Path, splits: Iterable[str] = ("test",), *, progress: bool = False) -> Metrics:
    """Load what a finished run saved, and measure it again; written to evaluation.json in the folder.

    Args:
        folder: of the run.
        splits: of train, validation and test.
        progress: show bars.

    Raises:
        ValueError: if the folder holds no finished run, or for a split of another name.
    """
    folder, splits = Path(folder), list(splits)
    unknown = [split for split in splits if split not in ("train", "validation", "test")]
    if unknown:
        raise ValueError(f"there is no split {unknown[0]!r}; use train, validation or test.")
    lab = Lab(_recipe_of(folder), folder, progress)
    metrics = _metrics(lab, load_trained(lab, folder), splits, folder)
    write(folder / "evaluation.json", {"metrics": metrics, **surroundings()})
    return metrics


def load_trained(lab: Lab, folder: Path) -> nn.Module:
    """The model as a finished run left it."""
    seed = lab.bare()
    if _saved(folder).name == ADAPTER:
        return PeftModel.from_pretrained(seed.model, folder / ADAPTER)
    config = seed.model.config
    kind = type(seed.model)
    return kind.from_pretrained(folder / MODEL, config=config, dtype=config.dtype)  # type: ignore[attr-defined]


def tuned_body(folder: Path) -> dict[str, Tensor]:
    """The body that a finished run left, by the names that it has without its head.

    Raises:
        ValueError: if the run is not finished, or its method leaves the body as it is.
    """
    recipe = _recipe_of(folder)
    if recipe.method.name == "prompt_tuning":
        raise ValueError(f"{folder} is a run of prompt tuning, which changes no weight of the body.")
    model: Any = load_trained(Lab(recipe, folder), folder)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    return {name: tensor.detach() for name, tensor in model.base_model.state_dict().items()}


def _recipe_of(folder: Path) -> Recipe:
    if results(folder) is None or not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no finished run; peft-dst train makes one.")
    return load_recipe(folder / CONFIG)


def _after_head(lab: Lab) -> Metrics:
    if not lab.recipe.training.head_first.epochs:
        raise ValueError("evaluation.after_head needs a head that is trained first: set training.head_first.epochs.")
    return _metrics(lab, lab.start().model, lab.recipe.evaluation.splits, None)


def _metrics(lab: Lab, model: nn.Module, splits: Iterable[str], folder: Path | None) -> Metrics:
    found = {}
    for split in splits:
        found[split], answers = lab.predict(model, split)
        if folder is not None and lab.recipe.evaluation.predictions:
            lines = [json.dumps({"answer": answer}, ensure_ascii=False) for answer in answers]
            (folder / f"predictions_{split}.jsonl").write_text("\n".join(lines) + "\n")
    return found


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder / (ADAPTER if isinstance(model, PeftModel) else MODEL))


def _saved(folder: Path) -> Path:
    return folder / (ADAPTER if (folder / ADAPTER).is_dir() else MODEL)


def _sizes(seed: Seed) -> dict[str, int]:
    body = sum(tensor.numel() for tensor in seed.body().values())
    return {"body_parameters": body, "head_parameters": sum(p.numel() for p in seed.model.parameters()) - body}


def _value(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
