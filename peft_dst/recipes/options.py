"""The options of an experiment. Each is explained once, in its field here; `config` reads and checks them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from ..config import SELECTIONS, DSTConfig


METHODS = (*SELECTIONS, "pruning", "lora", "prompt_tuning", "head_only", "full", "l1", "l2")
TASKS = ("classification", "tagging", "translation", "question_answering", "maths", "superglue", "masked_words")
OPTIMIZERS = ("adamw", "adafactor", "sgd")
DTYPES = ("float32", "bfloat16", "float16")
SPLITS = ("train", "validation", "test")
# A learning rate by a rule.
AUTO = "auto"
_OF_DST = {entry.name: entry.metadata["help"] for entry in fields(DSTConfig) if "help" in entry.metadata}


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _dst_option(name: str, more: str = "") -> Any:
    """An option of DSTConfig, explained there; null is its default."""
    return _option(None, f"{_OF_DST[name]} {more}".rstrip())


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
        None,
        "Folder of a finished run whose tuned body is put onto the model first (probes, secondary tasks), or a pattern "
        "that one run fits; {seed} stands for the seed: runs/methods/runs/random,*seed={seed},*.",
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
    siloing: str | None = _dst_option(
        "siloing", "null: module_and_layer where distances choose, none where scores do (second paper)."
    )
    silo_pattern: str | None = _dst_option("silo_pattern")
    distance: str | None = _dst_option("distance")
    distance_normalization: str | None = _dst_option("distance_normalization")
    churn_interval: int | None = _dst_option("churn_interval")
    churn_stop: int | float | None = _dst_option("churn_stop")
    threshold: str | None = _dst_option("threshold")
    threshold_iterations: int | None = _dst_option("threshold_iterations")
    threshold_range: float | None = _dst_option("threshold_range")
    target_modules: list[str] | None = _option(None, "Of DST and LoRA; null: the whole body, or all linear layers.")
    exclude_modules: list[str] | None = _dst_option("exclude_modules")
    packed: bool | None = _dst_option("packed")
    rank: int | None = _option(None, "LoRA's rank; null: what comes nearest to the budget.")
    lora_alpha: float | None = _option(None, "LoRA's alpha; null: PEFT's default.")
    lora_dropout: float = _option(0.0, "LoRA's dropout.")
    virtual_tokens: int | None = _option(None, "Length of the prompt; null: what comes nearest to the budget.")
    coefficient: float = _option(0.01, "Of the penalty on the distance from the seed (l1, l2, pruning, diff_pruning).")
    pruning_learning_rate: float | None = _option(
        None,
        "Of the full fine-tuning that diff_pruning prunes; null: training.learning_rate, or, if that is auto, full's.",
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
    learning_rate: Any = _option(
        AUTO,
        "Of the body: the subset, the low-rank layers, or all of it. auto: by method and epsilon (docs/choosing.md).",
    )
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
    release_gradients: bool = _option(
        False,
        "Step each silo in the backward pass, as soon as its gradients are there, and free them: DSTOptimizer's; without "
        "clipping and accumulation.",
    )
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
    at: dict[str, Any] = _option(
        {},
        "Options that are otherwise in the trials, by their dotted names: {model.tuned: null} chooses on the pretrained "
        "model, once for all points that differ in nothing else.",
    )


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
