"""What an experiment is: its options, read from YAML files and the command line, and checked before anything is loaded.

A file holds what differs from the files that its key `defaults` names (one, or a list; relative to it; later ones win).
Options on the command line come last: `training.learning_rate=1e-2`. Every option is explained once, in its field here.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


SELECTED = (
    "dynamic",
    "first_step",
    "random",
    "bitfit",
    "magnitude",
    "fisher",
    "fisher_pretraining",
    "combined",
    "diff_pruning",
    "transfer",
)
METHODS = (*SELECTED, "pruning", "lora", "prompt_tuning", "head_only", "full", "l1", "l2")
TASKS = ("classification", "tagging", "translation", "question_answering", "maths", "superglue", "masked_words")
OPTIMIZERS = ("adamw", "adafactor", "sgd")
DTYPES = ("float32", "bfloat16", "float16")


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class ModelOptions:
    name: str = _option(
        MISSING,
        "Hub id, folder (as it is, or inside the folder that PEFT_DST_DATA names), or package:NAME/PATH, a folder inside "
        "an installed Python package (which is not imported).",
    )
    revision: str | None = _option(None, "Branch, tag or commit on the hub.")
    tokenizer: str | None = _option(None, "Hub id or folder of the tokenizer, if not the model's own.")
    dtype: str = _option("float32", "Of the weights: float32, bfloat16 or float16.")
    dropout: float | None = _option(0.0, "Every dropout probability of the model; null leaves the model's own.")
    head: list[str] | None = _option(
        None, "Modules trained densely, at the head's own rate. null: what the checkpoint lacks, a fresh head."
    )
    fresh: list[str] = _option(
        [], "Modules of the head that are initialised anew though the checkpoint has them, and tied to nothing."
    )
    tuned: str | None = _option(
        None, "Folder of a finished run whose tuned body is put onto the model first (probes, secondary tasks)."
    )


@dataclass
class TaskOptions:
    name: str = _option(MISSING, f"Kind of task: {', '.join(TASKS)}.")
    data: str = _option(
        MISSING,
        "Hub id, or folder of JSON lines (train.jsonl, …): as it is, or inside the folder that PEFT_DST_DATA names.",
    )
    subset: str | None = _option(None, "Name of the configuration of a data set of the hub, e.g. de-en.")
    train: str = _option("train", "Training split, perhaps a part of it: train, train[:1000], train+validation[:50%].")
    validation: str | None = _option(
        None, "Validation split; null cuts validation_size examples from the training split."
    )
    test: str = _option("test", "Test split.")
    evaluation_data: str | None = _option(
        None, "Where the validation and test splits are, if not in data. A validation split that is cut is data's."
    )
    evaluation_subset: str | None = _option(None, "As subset, of evaluation_data.")
    columns: dict[str, str] = _option(
        {}, "Where the data has what under another name, e.g. {text: sentence}; dots go inside (translation.de)."
    )
    train_size: int | None = _option(None, "Training examples at most.")
    validation_size: int = _option(500, "Validation examples at most; as many are cut, but a fifth at most.")
    test_size: int | None = _option(None, "Test examples at most, the first ones.")
    data_seed: int = _option(0, "Decides the order of the training examples, and so which are taken and cut.")
    max_length: int = _option(128, "Tokens of an input at most.")
    max_target_length: int = _option(128, "Tokens of a target at most (generation).")
    prompt: str | None = _option(
        None, "Input of a generating model, with columns in braces, e.g. 'question: {question}'. null: the task's own."
    )
    max_characters: int | None = _option(
        None, "Training examples of more characters, input and target together, are left out (generation)."
    )
    train_inputs: bool = _option(False, "A causal model is trained on its inputs, too, not on the targets alone.")
    parts: list[str] = _option([], "The SuperGLUE tasks in the mix; empty means all eight.")
    mask_probability: float = _option(0.15, "Share of the words that are masked (masked_words).")


@dataclass
class MethodOptions:
    name: str = _option("dynamic", f"One of {', '.join(METHODS)}.")
    epsilon: float | None = _option(
        None, "Budget as a fraction of the body. LoRA and prompt tuning are sized to it; bitfit has a size of its own."
    )
    num_free_parameters: int | None = _option(None, "The budget as a number, instead of epsilon.")
    siloing: str | None = _option(
        None, "As DSTConfig's; null: module_and_layer where distances choose, none where scores do (second paper)."
    )
    silo_pattern: str | None = _option(None, "As DSTConfig's.")
    distance: str | None = _option(None, "As DSTConfig's.")
    distance_normalization: str | None = _option(None, "As DSTConfig's.")
    churn_interval: int | None = _option(None, "As DSTConfig's.")
    churn_stop: int | float | None = _option(None, "As DSTConfig's.")
    threshold: str | None = _option(None, "As DSTConfig's.")
    threshold_iterations: int | None = _option(None, "As DSTConfig's.")
    threshold_range: float | None = _option(None, "As DSTConfig's.")
    target_modules: list[str] | None = _option(None, "Of DST and LoRA; null: the whole body, or all linear layers.")
    exclude_modules: list[str] | None = _option(None, "As DSTConfig's.")
    packed: bool | None = _option(None, "As DSTConfig's.")
    rank: int | None = _option(None, "LoRA's rank; null: what comes nearest to the budget.")
    lora_alpha: float | None = _option(None, "LoRA's alpha; null: PEFT's default.")
    lora_dropout: float = _option(0.0, "LoRA's dropout.")
    virtual_tokens: int | None = _option(None, "Length of the prompt; null: what comes nearest to the budget.")
    coefficient: float = _option(0.01, "Of the penalty on the distance from the seed (l1, l2, pruning, diff_pruning).")
    pruning_learning_rate: float | None = _option(
        None, "Of the full fine-tuning that diff_pruning prunes; null: training.learning_rate."
    )
    source: str | None = _option(
        None, "transfer: folder of another adapter, whose subset is taken. Others with scores: a file of scores."
    )
    score_examples: int | None = _option(1000, "Training examples that fisher and combined look at; null: all.")
    score_definition: str = _option("per_example", "per_example or per_batch, as of score_parameters.")
    text: str | None = _option(None, "Plain text for fisher_pretraining and combined: hub id or folder, as task.data.")
    text_subset: str | None = _option(None, "As task.subset, of the text.")
    text_split: str = _option("train", "Split of the text.")
    text_examples: int = _option(1000, "Paragraphs of the text (of 200 characters or more).")


@dataclass
class HeadFirstOptions:
    epochs: float = _option(0.0, "First train only the head over the frozen body for so long; 0: not at all.")
    learning_rate: float = _option(4e-4, "Of that training (second paper, Table 4).")
    batch_size: int = _option(64, "Of that training.")


@dataclass
class TrainingOptions:
    learning_rate: Any = _option(1e-2, "Of the body: the subset, the low-rank layers, or all of it.")
    head_learning_rate: float = _option(1e-3, "Of the head.")
    epochs: float = _option(2.0, "Passes over the training examples.")
    max_steps: int | None = _option(None, "Steps, instead of epochs.")
    batch_size: int = _option(16, "Training examples a step and device.")
    evaluation_batch_size: int = _option(64, "Examples a step of evaluation.")
    accumulation: int = _option(1, "Batches a step.")
    group_by_length: bool = _option(
        False, "Batches of examples of about one length, still in random order: less padding."
    )
    optimizer: str = _option("adamw", f"One of {', '.join(OPTIMIZERS)}.")
    weight_decay: float = _option(0.0, "Of the body, for methods without a constraint; and of the head.")
    schedule: str = _option("linear", "Of the learning rate, transformers' name: linear, cosine, constant, …")
    warmup: float = _option(0.1, "Warm-up: a fraction of training, or a number of steps from 1 on.")
    max_grad_norm: float = _option(5.0, "Clipping; 0 for none.")
    dst_optimizer: bool | None = _option(
        None, "Step through DSTOptimizer; null: where a dynamic subset trains half precision weights."
    )
    release_gradients: bool = _option(False, "As DSTOptimizer's.")
    activation_checkpointing: bool = _option(False, "Recompute activations in the backward pass.")
    empty_cache_steps: int | None = _option(None, "Give unused memory of the accelerator back so often.")
    bf16: bool = _option(False, "Autocast to bfloat16.")
    save_steps: int = _option(500, "Steps between two checkpoints, from which an interrupted run goes on.")
    logging_steps: int = _option(50, "Steps between two entries of the history.")
    snapshots: int = _option(
        0, "Record a dynamic subset so many times, evenly over training, and how much any two have in common (churn)."
    )
    head_first: HeadFirstOptions = field(default_factory=HeadFirstOptions)


@dataclass
class EvaluationOptions:
    splits: list[str] = _option(["validation", "test"], "Of train, validation and test.")
    train_examples: int = _option(500, "How many of the training examples, where train is one of the splits.")
    every: int | None = _option(None, "Also measure the validation split after every so many steps of training.")
    text: str | None = _option(
        None, "Plain text (hub id or folder, as task.data) on which a causal model's loss is measured before and after."
    )
    text_split: str = _option("train", "Split of that text.")
    text_examples: int = _option(100, "Rows of that text, the first ones.")
    after_head: bool = _option(False, "Also evaluate after the head's own training.")
    beams: int = _option(1, "Beams of the search (generation); 1 is greedy.")
    max_new_tokens: int | None = _option(None, "Tokens of an answer at most; null: task.max_target_length.")
    bleurt: str | None = _option(None, "Folder of a BLEURT checkpoint; null: no BLEURT.")
    predictions: bool = _option(False, "Also write the predictions of each split, a JSON object a line.")


@dataclass
class SearchOptions:
    option: str | None = _option(
        None,
        "An option that a sweep chooses on the validation split, for each of its points, before anything is tested: e.g. "
        "training.learning_rate. Null: none.",
    )
    trials: int = _option(7, "Values tried at most, of the series 1, 2, 5, 10, outwards from the recipe's own.")
    seed: int = _option(0, "Seed of the trials.")


@dataclass
class Recipe:
    """One experiment."""

    model: ModelOptions = field(default_factory=ModelOptions)
    task: TaskOptions = field(default_factory=TaskOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    search: SearchOptions = field(default_factory=SearchOptions)
    seed: int = _option(0, "Of the head, the order of the batches, dropout, and random subsets.")
    title: str = _option("", "What this is, for people; of no effect.")
    sweep: Any = _option(
        None,
        "Options to vary: a mapping from names of options to lists of values (their product), or a list of such "
        "mappings (one after the other).",
    )


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `option=value` each, the option's name dotted, the value as in YAML.

    Raises:
        ValueError: for a file that is no such thing, an option that does not exist (with the nearest that does), a value
            of the wrong type or outside its choices, and an option that must be given.
    """
    return make_recipe(_read(Path(path), ()), overrides, str(path))


def make_recipe(values: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "the recipe") -> Recipe:
    """A recipe from nested mappings, as `load_recipe` makes it from files."""
    recipe = _merge(OmegaConf.structured(Recipe), values, where)
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not equals or not name:
            raise ValueError(f"{override!r} is no override; write option=value, e.g. training.learning_rate=1e-2.")
        try:
            given = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except Exception as error:  # whatever YAML has to say
            raise ValueError(f"{override!r} cannot be read: {error}") from None
        assert isinstance(given, dict)
        recipe = _merge(recipe, given, "the command line")
    return _finished(recipe, where)


def _finished(recipe: DictConfig, where: str) -> Recipe:
    """The recipe, checked."""
    try:
        OmegaConf.resolve(recipe)
        found = OmegaConf.to_object(recipe)
    except OmegaConfBaseException as error:
        name = error.full_key or "an option"
        raise ValueError(f"{where}: {name} must be given; add it to the file, or {name}=VALUE.") from None
    assert isinstance(found, Recipe)
    _check(found)
    return found


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """All options as nested mappings, of which `make_recipe` makes the same recipe."""
    return dataclasses.asdict(recipe)


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe as a YAML file, without defaults to look up."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(recipe)))


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Names of the options in which two recipes differ, those of no effect on a single training aside."""
    a, b = (_flat(to_dict(_trained(recipe))) for recipe in (one, other))
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def digest(recipe: Recipe, options: Iterable[str] | None = None) -> str:
    """Ten characters for what a recipe trains: those of two recipes are equal if `differences` finds none.

    Options at their defaults do not count, so that one which is added here later changes nothing.

    Args:
        recipe: any recipe.
        options: beginnings of the names of the options that count; all, if not given.
    """
    default = _flat(to_dict(Recipe()))
    given = {
        name: value
        for name, value in _flat(to_dict(_trained(recipe))).items()
        if value != default.get(name) and (options is None or name.startswith(tuple(options)))
    }
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:10]


def _trained(recipe: Recipe) -> Recipe:
    """The recipe with everything at its default that has no effect on what is trained."""
    evaluation = replace(recipe.evaluation, splits=[])
    return replace(recipe, title="", sweep=None, search=SearchOptions(), evaluation=evaluation)


def points(recipe: Recipe) -> list[dict[str, Any]]:
    """What a sweep varies: for each of its runs a mapping from options to values; [{}] if it varies nothing."""
    grids = _grids(recipe.sweep)
    product = [
        dict(zip(grid, values, strict=True))
        for grid in grids
        for values in itertools.product(*map(_listed, grid.values()))
    ]
    return product or [{}]


def at(recipe: Recipe, point: Mapping[str, Any]) -> Recipe:
    """The recipe of one run of a sweep.

    Raises:
        ValueError: for an option or value that does not exist.
    """
    values: dict[str, Any] = {}
    for name, value in point.items():
        values = _merged(values, _nested(name, value))
    return _finished(_merge(OmegaConf.structured(replace(recipe, sweep=None)), values, "the sweep"), "the sweep")


def value_of(recipe: Recipe, name: str) -> Any:
    """An option's value by its dotted name; None if there is no such option."""
    values: Any = to_dict(recipe)
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def option_names() -> dict[str, dataclasses.Field[Any]]:
    """Every option by its dotted name, with its field."""
    return _names(Recipe)


def _names(kind: type, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    found: dict[str, dataclasses.Field[Any]] = {}
    for entry in dataclasses.fields(kind):
        inner = entry.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            found |= _names(inner, f"{prefix}{entry.name}.")
        else:
            found[prefix + entry.name] = entry
    return found


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file over its defaults."""
    if path.resolve() in above:
        raise ValueError(f"{path} is among its own defaults.")
    try:
        # OmegaConf reads with YAML's safe loader: no file can make Python objects or run code.
        loaded = OmegaConf.load(path)
        values = OmegaConf.to_container(loaded)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # whatever YAML has to say
        raise ValueError(f"{path} is not a YAML file of options: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a list, not options by name.")
    merged: dict[str, Any] = {}
    for name in _listed(values.pop("defaults", [])):
        if not isinstance(name, str):
            raise ValueError(f"{path}: defaults must be a file or a list of files, got {name!r}.")
        merged = _merged(merged, _read(path.parent / name, (*above, path.resolve())))
    return _merged(merged, {str(key): value for key, value in values.items()})


def _merged(lower: Any, upper: Any) -> Any:
    if not (isinstance(lower, dict) and isinstance(upper, dict)):
        return upper
    return {key: _merged(lower[key], upper[key]) if key in lower and key in upper else upper.get(key, lower.get(key))
            for key in [*lower, *(k for k in upper if k not in lower)]}  # fmt: skip


def _merge(recipe: DictConfig, values: Mapping[str, Any], where: str) -> DictConfig:
    _check_names(values, Recipe, "", where)
    if "sweep" in values:
        # One sweep takes the place of another; a mapping would not merge with a list.
        recipe = OmegaConf.merge(recipe, {"sweep": None})
    try:
        merged = OmegaConf.merge(recipe, OmegaConf.create(dict(values)))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        entry = option_names().get(error.full_key or "")
        kind = f"; it takes {entry.type}" if entry else ""
        raise ValueError(f"{where}: {error.full_key}: {reason}{kind}.") from None
    assert isinstance(merged, DictConfig)
    return merged


def _check_names(values: Mapping[str, Any], kind: type, prefix: str, where: str) -> None:
    known = {entry.name: entry.default_factory for entry in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where} has an option {prefix}{key}, which does not exist{_nearest(prefix + str(key))}.")
        inner = known[key]
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: {prefix}{key} holds options, not {value!r}; name one of them.")
            _check_names(value, inner, f"{prefix}{key}.", where)


def _nearest(name: str) -> str:
    names = list(option_names())
    found = difflib.get_close_matches(name, names, 1)
    # The right name in the wrong place.
    found = found or [known for known in names if known.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean {found[0]}" if found else "; see docs/experiments.md"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _grids(sweep: Any) -> list[dict[str, Any]]:
    grids = _listed(sweep) if sweep else []
    for grid in grids:
        if not isinstance(grid, dict):
            raise ValueError(f"sweep takes options and their values, got {grid!r}; e.g. sweep: {{seed: [0, 1, 2]}}.")
    return grids


def _check(recipe: Recipe) -> None:
    """Choices and ranges, which types do not say."""
    for name, value, choices in (
        ("model.dtype", recipe.model.dtype, DTYPES),
        ("task.name", recipe.task.name, TASKS),
        ("method.name", recipe.method.name, METHODS),
        ("training.optimizer", recipe.training.optimizer, OPTIMIZERS),
    ):
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.{hint}")
    unknown = [split for split in recipe.evaluation.splits if split not in ("train", "validation", "test")]
    if unknown:
        raise ValueError(f"evaluation.splits are of train, validation and test; got {unknown[0]!r}.")
    rate = recipe.training.learning_rate
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
        raise ValueError(f"training.learning_rate must be a number of 0 or more, got {rate!r}.")
    for name, number in (
        ("evaluation.every", 1 if recipe.evaluation.every is None else recipe.evaluation.every),
        ("evaluation.text_examples", recipe.evaluation.text_examples),
        ("training.batch_size", recipe.training.batch_size),
        ("training.evaluation_batch_size", recipe.training.evaluation_batch_size),
        ("training.accumulation", recipe.training.accumulation),
        ("training.save_steps", recipe.training.save_steps),
        ("training.head_first.batch_size", recipe.training.head_first.batch_size),
        ("evaluation.beams", recipe.evaluation.beams),
        ("task.max_length", recipe.task.max_length),
        ("task.max_target_length", recipe.task.max_target_length),
        ("task.validation_size", recipe.task.validation_size),
        ("search.trials", recipe.search.trials),
    ):
        if number < 1:
            raise ValueError(f"{name} must be 1 or more, got {number}.")
    method = recipe.method
    if method.epsilon is not None and method.num_free_parameters is not None:
        raise ValueError(
            "method.epsilon and method.num_free_parameters are two ways to set one budget; give one of them."
        )
    if method.epsilon is not None and not 0 < method.epsilon <= 1:
        raise ValueError(f"method.epsilon must be a fraction with 0 < epsilon <= 1, got {method.epsilon}.")
    if method.name == "transfer" and not method.source:
        raise ValueError(
            "method.name=transfer takes over the subset of another adapter; set method.source to its folder."
        )
    if method.name in ("fisher_pretraining", "combined") and not (method.text or method.source):
        raise ValueError(f"method.name={method.name} scores on plain text; set method.text to a hub id or a folder.")
    if recipe.search.option is not None and recipe.search.option not in option_names():
        raise ValueError(
            f"search.option is {recipe.search.option}, which does not exist{_nearest(str(recipe.search.option))}."
        )
    for grid in _grids(recipe.sweep):
        for name in grid:
            if name not in option_names():
                raise ValueError(f"sweep varies {name}, which does not exist{_nearest(name)}.")
