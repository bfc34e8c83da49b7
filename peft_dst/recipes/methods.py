"""From a method's name to a model ready to train: wrapped, with its optimizer, penalty and callbacks."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, TrainerCallback, set_seed
from transformers.optimization import Adafactor

from ..baselines import SeedPenalty, lora_config_for_budget, prompt_tuning_config_for_budget
from ..config import BY_SEED, DEFAULT_EPSILON, GIVEN, SELECTIONS, DSTConfig
from ..delta.files import replace_file
from ..extraction import extract
from ..subsets import change_scores, combined_scores, load_scores, score_parameters
from ..training import DSTCallback, DSTOptimizer, parameter_groups
from ..tuner.static import fix_subset
from .lab import OF_HEAD, Lab
from .models import Seed, source
from .options import MethodOptions
from .snapshots import SNAPSHOTS, Snapshots
from .tasks import load_rows


# Shorter paragraphs have little to be masked.
PARAGRAPH = 200
CONFIG_OPTIONS = (
    "silo_pattern",
    "distance",
    "distance_normalization",
    "churn_interval",
    "churn_stop",
    "threshold",
    "threshold_iterations",
    "threshold_range",
    "exclude_modules",
    "packed",
)


@dataclass
class Prepared:
    """A model with what trains it; without an optimizer it is trained already."""

    model: nn.Module
    free_parameters: int
    optimizer: Optimizer | None = None
    penalty: SeedPenalty | None = None
    callbacks: list[TrainerCallback] = field(default_factory=list)


def prepare(lab: Lab) -> Prepared:
    """The model of the recipe's method.

    Raises:
        ValueError: if the method's options do not go together, or do not fit the model.
    """
    name = lab.recipe.method.name
    if name in SELECTIONS:
        return _subset(lab)
    return {
        "pruning": _pruned,
        "lora": _lora,
        "prompt_tuning": _prompt_tuning,
        "head_only": _head_only,
        "full": _full,
        "l1": _full,
        "l2": _full,
    }[name](lab)


def budget(options: MethodOptions, seed: Seed) -> int:
    """Number of free parameters that the options ask for, of the body."""
    if options.num_free_parameters is not None:
        return options.num_free_parameters
    size = sum(tensor.numel() for tensor in seed.body().values())
    return max(1, round((DEFAULT_EPSILON if options.epsilon is None else options.epsilon) * size))


def dst_config(lab: Lab, head: list[str], **changes: Any) -> DSTConfig:
    """The recipe's options as a DSTConfig.

    Args:
        lab: the run.
        head: modules trained densely.
        **changes: options that are otherwise.
    """
    options = lab.recipe.method
    selection = options.name if options.name in SELECTIONS else "dynamic"
    given = {name: getattr(options, name) for name in CONFIG_OPTIONS if getattr(options, name) is not None}
    if selection != "bitfit":
        # The biases are as many as they are.
        given |= {"epsilon": options.epsilon, "num_free_parameters": options.num_free_parameters}
    if selection == "random":
        given["selection_seed"] = lab.recipe.seed
    by_distance = selection in ("dynamic", "first_step")
    return DSTConfig(
        **{
            "selection": selection,
            "siloing": options.siloing or ("module_and_layer" if by_distance else "none"),
            "target_modules": options.target_modules,
            "task_type": lab.task.task_type,
            "modules_to_save": list(head) or None,
            **given,
            **changes,
        }
    )


def _subset(lab: Lab) -> Prepared:
    options, training = lab.recipe.method, lab.recipe.training
    scores = _scores(lab) if options.name in GIVEN and options.name != "transfer" else None
    seed = lab.start()
    model = get_peft_model(seed.model, dst_config(lab, seed.head))
    if scores is not None:
        fix_subset(model, scores)
    elif options.name == "transfer":
        assert options.source is not None
        fix_subset(model, options.source)
    set_seed(lab.recipe.seed)
    groups = parameter_groups(
        model,
        lr=float(training.learning_rate),
        head_lr=training.head_learning_rate,
        weight_decay=training.weight_decay,
    )
    static = options.name in (*BY_SEED, *GIVEN)
    wrapped = training.dst_optimizer
    if wrapped is None:
        wrapped = (not static and lab.recipe.model.dtype != "float32") or training.release_gradients
    callbacks: list[TrainerCallback] = [] if static else [DSTCallback()]
    if training.snapshots and not static:
        callbacks.append(Snapshots(lab.folder / SNAPSHOTS, training.snapshots))
    return Prepared(
        model,
        model.constraint().budget,
        _optimizer(lab, groups, wrapped),
        callbacks=callbacks,
    )


def _full(lab: Lab) -> Prepared:
    name, dtype = lab.recipe.method.name, lab.recipe.model.dtype
    if dtype != "float32":
        warnings.warn(
            f"method.name={name} trains {dtype} weights as they are: steps below their precision are lost, as they are not "
            "with methods that keep float32 values. To compare them, set model.dtype=float32 training.bf16=true.",
            stacklevel=2,
        )
    seed = lab.start()
    size = sum(tensor.numel() for tensor in seed.body().values())
    penalty = _penalty(lab, seed, name) if name in ("l1", "l2") else None
    return Prepared(seed.model, size, _optimizer(lab, _two_rates(lab, seed, seed.model)), penalty)


def _head_only(lab: Lab) -> Prepared:
    seed = lab.start()
    if not seed.head:
        raise ValueError(
            "method.name=head_only trains nothing: the model has no fresh head. Name modules in model.head."
        )
    for name, parameter in seed.model.named_parameters():
        parameter.requires_grad_(seed.in_head(name))
    return Prepared(seed.model, 0, _optimizer(lab, _two_rates(lab, seed, seed.model)))


def _lora(lab: Lab) -> Prepared:
    options = lab.recipe.method
    given: dict[str, Any] = {"lora_dropout": options.lora_dropout}
    given |= {"lora_alpha": options.lora_alpha} if options.lora_alpha is not None else {}
    given |= {"target_modules": list(options.target_modules)} if options.target_modules else {}
    sized = partial(lora_config_for_budget, narrow=True)
    return _adapter(lab, LoraConfig, sized, {"r": options.rank}, given)


def _prompt_tuning(lab: Lab) -> Prepared:
    tokens = {"num_virtual_tokens": lab.recipe.method.virtual_tokens}
    return _adapter(
        lab, PromptTuningConfig, prompt_tuning_config_for_budget, tokens, {"prompt_tuning_init": "SAMPLE_VOCAB"}
    )


def _adapter(lab: Lab, kind: type, sized: Callable[..., Any], size: dict[str, int | None], given: dict) -> Prepared:
    """One of PEFT's methods: of the size that is given, or else of the budget's."""
    if lab.task.task_type is None and kind is PromptTuningConfig:
        raise ValueError(f"method.name=prompt_tuning: PEFT has none for the task {lab.recipe.task.name}.")
    seed = lab.start()
    given |= {"task_type": lab.task.task_type, "modules_to_save": list(seed.head) or None}
    if None in size.values():
        config, _ = sized(seed.model, budget(lab.recipe.method, seed), **given)
    else:
        if kind is LoraConfig:
            given = {"target_modules": "all-linear", **given}
        config = kind(**size, **given)
    model = get_peft_model(seed.model, config)
    groups = _two_rates(lab, seed, model)
    free = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not seed.in_head(n))
    return Prepared(model, free, _optimizer(lab, groups))


def _pruned(lab: Lab) -> Prepared:
    """Only the largest changes of a fully tuned model, put onto the seed; nothing is trained afterwards."""
    tuned, base = _penalised(lab), lab.start()
    config = dst_config(lab, base.head, distance=lab.recipe.method.distance or "absolute",
                        siloing=lab.recipe.method.siloing or "none")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        extract(base.model, tuned.model, folder, config, progress=False)
        model = PeftModel.from_pretrained(lab.start().model, folder)
    return Prepared(model, budget(lab.recipe.method, base))


def _penalised(lab: Lab) -> Seed:
    """The model that is pruned: fully tuned with an l1 penalty (second paper, Section 3.1)."""
    rate = lab.recipe.method.pruning_learning_rate or float(lab.recipe.training.learning_rate)
    depends = (*OF_HEAD, "training.", "method.coefficient")
    with lab.shared("penalised", depends, learning_rate=rate, snapshots=0) as file:
        if not file.is_file():
            seed = lab.start()
            groups = _two_rates(lab, seed, seed.model, rate)
            lab.fit(seed.model, _optimizer(lab, groups), lab.plan, _penalty(lab, seed, "l1"))
            replace_file(file, dict(seed.model.named_parameters()), {})
        seed = lab.start()
        seed.model.load_state_dict(load_file(file), strict=False)
    return seed


def _penalty(lab: Lab, seed: Seed, kind: Any) -> SeedPenalty:
    return SeedPenalty(seed.model, kind, lab.recipe.method.coefficient, exclude=seed.head)


def _scores(lab: Lab) -> dict[str, Tensor]:
    """What ranks the components: a file that is given, or made, once a run."""
    options = lab.recipe.method
    if options.source:
        return load_scores(options.source)
    if options.name == "diff_pruning":
        return change_scores(lab.start().body(), _penalised(lab).body())
    if options.name == "fisher":
        return _fisher(lab)
    if options.name == "fisher_pretraining":
        return _fisher_pretraining(lab)
    return combined_scores(_fisher(lab), _fisher_pretraining(lab))


def _fisher(lab: Lab) -> dict[str, Tensor]:
    """Squared gradients of the task's loss, under a head trained before: as the recipe says, or else for one epoch."""
    seed = lab.start(lab.recipe.training.head_first.epochs or 1.0)
    rows = lab.train_features[: lab.recipe.method.score_examples]
    with lab.shared("fisher", (*OF_HEAD, "method.score_")) as file:
        return _score(lab, seed.model, list(seed.body()), rows, lab.collate, file)


def _fisher_pretraining(lab: Lab) -> dict[str, Tensor]:
    """The same of pretraining: masked words of plain text, or of a causal model every word."""
    seed, options = lab.bare(), lab.recipe.method
    assert options.text is not None
    data = load_rows(options.text, options.text_split, options.text_subset)
    texts = [row["text"].strip() for row in data if len(row["text"]) > PARAGRAPH][: options.text_examples]
    if not texts:
        raise ValueError(f"method.text={options.text} has no paragraph of more than {PARAGRAPH} characters.")
    ids = lab.tokenizer(texts, truncation=True, max_length=lab.recipe.task.max_length)["input_ids"]
    if lab.task.task_type == "SEQ_2_SEQ_LM":
        raise ValueError(f"method.name={options.name} knows the pretraining of encoders and causal models only.")
    causal = lab.task.task_type == "CAUSAL_LM"
    model = seed.model
    if not causal:
        model = AutoModelForMaskedLM.from_pretrained(source(lab.recipe.model.name), revision=lab.recipe.model.revision)
    collate = DataCollatorForLanguageModeling(lab.tokenizer, mlm=not causal)
    set_seed(lab.recipe.seed)  # decides which words are masked
    shapes = {name: tensor.shape for name, tensor in seed.body().items()}
    known = dict(model.named_parameters())
    names = [name for name, shape in shapes.items() if name in known and known[name].shape == shape]
    depends = ("model.", "seed", "task.name", "task.max_length", "method.text", "method.score_definition")
    with lab.shared("fisher_pretraining", depends) as file:
        scores = _score(lab, model, names, [{"input_ids": i} for i in ids], collate, file)
    # What pretraining has no gradient for (a pooler) ranks last.
    return {name: scores[name] if name in scores else torch.zeros(shape) for name, shape in shapes.items()}


def _score(lab: Lab, model: nn.Module, names: list[str], rows: Any, collate: Any, cache: Path) -> dict[str, Tensor]:
    options = lab.recipe.method
    loader: DataLoader = DataLoader(
        rows, batch_size=1 if options.score_definition == "per_example" else 4, collate_fn=collate
    )
    return score_parameters(
        model.to(PartialState().device),
        loader,
        names=names,
        definition=options.score_definition,
        cache=cache,
        progress=lab.progress,
    )


def _two_rates(lab: Lab, seed: Seed, model: nn.Module, rate: float | None = None) -> list[dict[str, Any]]:
    """Optimizer groups of a method without a constraint: body and head."""
    training = lab.recipe.training
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    body = [parameter for name, parameter in named if not seed.in_head(name)]
    head = [parameter for name, parameter in named if seed.in_head(name)]
    rates = (float(training.learning_rate) if rate is None else rate, training.head_learning_rate)
    groups = zip((body, head), rates, strict=True)
    return [{"params": params, "lr": lr, "weight_decay": training.weight_decay} for params, lr in groups if params]


def _optimizer(lab: Lab, groups: list[dict[str, Any]], wrapped: bool = False) -> Optimizer:
    training = lab.recipe.training
    kind, options = {
        "adamw": (torch.optim.AdamW, {} if wrapped else {"fused": True}),
        # The papers' Adafactor: rates relative to the weights' size, no warm-up of its own.
        "adafactor": (Adafactor, {"scale_parameter": True, "relative_step": False}),
        "sgd": (torch.optim.SGD, {}),
    }[training.optimizer]
    if wrapped:
        return DSTOptimizer(groups, kind, release_gradients=training.release_gradients, **options)
    return kind(groups, lr=float(training.learning_rate), **options)
