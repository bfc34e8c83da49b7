"""What a finished run left: its trained model, and its body as where another run begins."""

from __future__ import annotations

from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from .models import Seed, load_seed
from .options import Recipe
from .record import ADAPTER, MODEL, RESULTS, recipe_of
from .tasks import Task, make_task


def saved(folder: Path) -> Path:
    """Where a run leaves what it trained."""
    return folder / (ADAPTER if (folder / ADAPTER).is_dir() else MODEL)


def predictions_file(folder: Path, split: str) -> Path:
    """Where a run leaves what it answered on a split."""
    return folder / f"predictions_{split}.jsonl"


def without_predictions(recipe: Recipe, record: Mapping[str, Any], folder: Path) -> list[str]:
    """The splits whose predictions are wanted of a finished run, and could be had, but are not there."""
    if not recipe.evaluation.predictions or not saved(folder).is_dir():
        return []
    return [split for split in record["metrics"] if not predictions_file(folder, split).is_file()]


def load_trained(seed: Seed, folder: Path) -> nn.Module:
    """The model as a finished run left it.

    Args:
        seed: the run's own; it is changed, or thrown away.
        folder: of the run.

    Raises:
        ValueError: if what was trained is there no longer.
    """
    if not saved(folder).is_dir():
        raise ValueError(f"{folder} no longer has what was trained; remove its {RESULTS} to train it again.")
    if saved(folder).name == ADAPTER:
        return PeftModel.from_pretrained(seed.model, folder / ADAPTER)
    config: Any = seed.model.config
    kind = type(seed.model)
    return kind.from_pretrained(folder / MODEL, config=config, dtype=config.dtype)  # type: ignore[attr-defined]


def seed_of(recipe: Recipe, task: Task) -> Seed:
    """The seed that a recipe begins with, on the CPU: pretrained, or with the body of the run that it names.

    Args:
        recipe: the recipe.
        task: its task, with its data loaded.

    Raises:
        ValueError: for a module that the model does not have, or a run that cannot be begun from.
    """
    seed = load_seed(recipe.model, task, recipe.seed)
    if recipe.model.tuned:
        _put(seed, _tuned_body(_run(recipe.model.tuned, recipe.seed)), recipe.model.tuned)
    return seed


def _run(tuned: str, seed: int) -> Path:
    """The folder that model.tuned names for a seed.

    Raises:
        ValueError: if it is a pattern that not exactly one finished run fits.
    """
    name = tuned.replace("{seed}", str(seed))
    if Path(name).exists() or not set("*?[") & set(name):
        return Path(name)
    # Of what a search only tried there are no weights.
    found = [folder for folder in map(Path, sorted(glob(name))) if saved(folder).is_dir()]
    if len(found) != 1:
        there = f" ({', '.join(map(str, found[:3]))}, …)" if found else ""
        raise ValueError(
            f"model.tuned={tuned} must stand for one finished run; for seed {seed} there are {len(found)}{there}."
        )
    return found[0]


def _tuned_body(folder: Path) -> dict[str, Tensor]:
    """The body that a finished run left, by the names that it has without its head.

    Raises:
        ValueError: if the run is not finished, or its method leaves the body as it is.
    """
    recipe = recipe_of(folder)
    if recipe.method.name in ("prompt_tuning", "head_only"):
        raise ValueError(
            f"{folder} is a run of {recipe.method.name}, which changes no weight of the body. To begin with the pretrained "
            "one, set model.tuned=null."
        )
    task = make_task(recipe.task)
    # How many outputs the head has is known from the data.
    task.load()
    model: Any = load_trained(seed_of(recipe, task), folder)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    return {name: tensor.detach() for name, tensor in model.base_model.state_dict().items()}


def _put(seed: Seed, body: dict[str, Tensor], where: str) -> None:
    """Another run's body into this model's, parameter by parameter; a head of this task stays as it is."""
    model: Any = seed.model
    prefix = f"{model.base_model_prefix}."
    own = {name: tensor for name, tensor in model.base_model.state_dict().items() if not seed.in_head(prefix + name)}
    fitting = {name: tensor for name, tensor in body.items() if name in own and own[name].shape == tensor.shape}
    if lacking := own.keys() - fitting.keys():
        raise ValueError(f"model.tuned={where} has another body: there is no {sorted(lacking)[0]} of the right shape.")
    model.base_model.load_state_dict(fitting, strict=False)
