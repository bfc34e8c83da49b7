"""What the stages of one run share: data encoded once, the seed with its trained head, and Trainer, set up the same way."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import SequentialSampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..baselines import SeedPenalty
from ..delta.files import replace_file
from .config import digest
from .metrics import bleurt, check_bleurt
from .models import Seed, load_seed, load_tokenizer
from .options import Recipe
from .record import ADAPTER, CACHE, CHECKPOINTS, MODEL, RESULTS, recipe_of, write
from .tasks import make_task
from .tasks.base import Features


# In a checkpoint.
SECONDS = "seconds.json"
# What a head that is trained first depends on.
OF_HEAD = (
    "model.",
    "task.",
    "seed",
    "training.head_first.",
    *(f"training.{name}" for name in ("group_by_length", "schedule", "warmup", "max_grad_norm", "bf16")),
)
# transformers' older name of it is `gradient_checkpointing`.
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in Seq2SeqTrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"


def _last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint in a folder. What a killed process left half-written beside it is removed.

    Trainer writes into a checkpoint's final place, its own state last, and removes the one before after that.
    """
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))):
        try:
            TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME))
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(last)
        else:
            return last
    return None


def _seconds(checkpoint: Path) -> float:
    """How long training had taken at a checkpoint; 0 of one that does not say it."""
    try:
        return float(json.loads((checkpoint / SECONDS).read_text()))
    except (OSError, ValueError, TypeError):
        return 0.0


@dataclass(frozen=True)
class Plan:
    """How long and how fast one training goes; the rest is the recipe's. The batch is that of a device."""

    epochs: float
    batch_size: int
    max_steps: int | None = None
    accumulation: int = 1
    resumable: bool = False


@dataclass
class Training:
    """What came of a training.

    Seconds leave out what was measured in between; `earlier` are those of them before an interruption. Memory is in bytes,
    of an accelerator; tokens are those of the inputs, and counted only where something is measured in between.
    """

    steps: int
    seconds: float
    history: list[dict[str, Any]]
    tokens: int = 0
    memory: dict[str, int] | None = None
    earlier: float = 0.0


class _Bar(ProgressCallback):
    """Trainer's progress bar, with the loss in it instead of printed over it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class _Clock(TrainerCallback):
    """Writes into each checkpoint how long it took to come there."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self.seconds = seconds

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        write(Path(args.output_dir) / f"checkpoint-{state.global_step}" / SECONDS, self.seconds())


class _Trainer(Seq2SeqTrainer):
    """Trainer with a penalty on the distance from the seed; answers without the questions before them."""

    penalty: SeedPenalty | None = None
    # What is measured in the middle of training, and the seconds that it took.
    measure: Callable[[], dict[str, float]] | None = None
    measuring = 0.0
    # Seconds that training took before it was interrupted.
    earlier = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Bytes of the accelerator, allocated and reserved, after each backward pass.
        self.memory: list[tuple[int, int]] = []
        self.begin = time.perf_counter()

    def seconds(self) -> float:
        """How long training has taken, what was measured in between aside."""
        return self.earlier + time.perf_counter() - self.begin - self.measuring

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        # Once a step, before Trainer clips.
        if self.penalty is not None and self.accelerator.sync_gradients:
            self.penalty.add_gradient()
        if torch.cuda.is_available():
            self.memory.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        return loss

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler | None:
        """In order: Trainer would sort examples to evaluate by their length where it does those to train on."""
        # Several processes divide them by themselves.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """In the middle of training: figures of answers, where Trainer would take the loss."""
        assert self.measure is not None
        seconds, begin = self.seconds(), time.perf_counter()
        figures = {f"validation_{name}": figure for name, figure in self.measure().items()}
        logs = {**figures, "training_seconds": seconds}
        self.measuring += time.perf_counter() - begin
        logs["measuring_seconds"] = self.measuring
        if self.memory:
            since = self.memory[-self.args.eval_steps * self.args.gradient_accumulation_steps :]
            allocated, reserved = zip(*since, strict=True)
            logs |= {"memory_allocated": statistics.fmean(allocated), "memory_reserved": statistics.fmean(reserved)}
        self.log(logs)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not self.args.predict_with_generate:
            return super().prediction_step(model, inputs, *args, **kwargs)
        # transformers writes its defaults into the model's own settings, and then warns that they are set.
        own = vars(self.model.generation_config)
        before = dict(own)
        loss, found, labels = super().prediction_step(model, inputs, *args, **kwargs)
        own.clear()
        own.update(before)
        if found is not None and not self.model.config.is_encoder_decoder:
            found = found[:, inputs["input_ids"].shape[1] :]
        return loss, found, labels


class Lab:
    """One recipe's data and seed.

    Args:
        recipe: the recipe.
        folder: where checkpoints go; made when something is written.
        progress: show bars.
        cache: folder of what several runs share, such as scores; if not given, one in the run's folder.

    Raises:
        ValueError: if the data or the model do not fit the recipe.
    """

    def __init__(self, recipe: Recipe, folder: Path, progress: bool = False, cache: Path | None = None) -> None:
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.cache = cache or folder / CACHE
        if recipe.evaluation.bleurt:
            check_bleurt()
        self.task = make_task(recipe.task)
        self.rows = self.task.load()
        self.tokenizer = load_tokenizer(recipe.model)
        self.collate = self.task.collator(self.tokenizer)
        self._train: list[Features] | None = None

    @property
    def train_features(self) -> list[Features]:
        """The training examples, encoded once; a model must have been made before."""
        if self._train is None:
            self._train = self.task.encode(self.rows.train, self.tokenizer, training=True)
        return self._train

    @contextmanager
    def shared(self, name: str, options: Sequence[str], **training: Any) -> Iterator[Path]:
        """The file of something that is made once for all recipes that agree in some options; others wait meanwhile.

        Args:
            name: of what is made.
            options: beginnings of the names of the options that it depends on.
            **training: options of training that are otherwise.
        """
        recipe = replace(self.recipe, training=replace(self.recipe.training, **training))
        self.cache.mkdir(parents=True, exist_ok=True)
        file = self.cache / f"{name}-{digest(recipe, options)}.safetensors"
        with FileLock(file.with_suffix(".lock")):
            yield file

    def bare(self) -> Seed:
        """The seed with a fresh head: always the same one."""
        seed = load_seed(self.recipe.model, self.task, self.recipe.seed)
        if self.recipe.model.tuned:
            _put(seed, tuned_body(Path(self.recipe.model.tuned)), self.recipe.model.tuned)
        # Before anything remembers values of it (penalties) or is made from its parameters (optimizers).
        seed.model.to(PartialState().device)
        return seed

    def start(self, head_epochs: float | None = None) -> Seed:
        """The seed with its head trained over the frozen body, where the recipe says so (second paper, Table 4).

        Args:
            head_epochs: for how long, if not as the recipe says.
        """
        epochs = self.recipe.training.head_first.epochs if head_epochs is None else head_epochs
        seed = self.bare()
        if epochs and seed.head:
            with self.shared(f"head-{epochs:g}", OF_HEAD) as file:
                if not file.is_file():
                    self._train_head(seed, epochs, file)
                    # What was trained is put onto a model that knows of no training.
                    seed = self.bare()
                seed.model.load_state_dict(load_file(file), strict=False)
        # The order of the examples is the same for every method.
        set_seed(self.recipe.seed)
        return seed

    def _train_head(self, seed: Seed, epochs: float, file: Path) -> None:
        options = self.recipe.training.head_first
        for name, parameter in seed.model.named_parameters():
            parameter.requires_grad_(seed.in_head(name))
        head = {name: p for name, p in seed.model.named_parameters() if p.requires_grad}
        set_seed(self.recipe.seed)
        optimizer = torch.optim.AdamW(head.values(), lr=options.learning_rate, weight_decay=0.0, fused=True)
        self.fit(seed.model, optimizer, Plan(epochs, options.batch_size))
        head = {name: t for name, t in seed.model.state_dict().items() if seed.in_head(name)}
        replace_file(file, head, {})

    @property
    def plan(self) -> Plan:
        """The recipe's own training."""
        options = self.recipe.training
        return Plan(options.epochs, options.batch_size, options.max_steps, options.accumulation)

    def fit(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        plan: Plan,
        penalty: SeedPenalty | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> Training:
        """Train on the training examples; a resumable training goes on from its last checkpoint."""
        trainer = self._trainer(model, plan, optimizer, callbacks)
        trainer.penalty = penalty
        trainer.measure = lambda: self._answered(trainer, "validation")[0]
        last = _last_checkpoint(self.folder / CHECKPOINTS) if plan.resumable else None
        if plan.resumable:
            trainer.add_callback(_Clock(trainer.seconds))
        if last is not None:
            trainer.earlier = _seconds(Path(last))
        output = trainer.train(resume_from_checkpoint=last)
        seconds = trainer.earlier + float(output.metrics["train_runtime"]) - trainer.measuring
        reserved = [size for _, size in trainer.memory]
        memory = None
        if reserved:
            highest = torch.tensor(reserved, dtype=torch.float64).quantile(0.99)
            memory = {"reserved": int(statistics.fmean(reserved)), "reserved_99th": int(highest)}
        return Training(
            output.global_step,
            seconds,
            trainer.state.log_history,
            trainer.state.num_input_tokens_seen,
            memory,
            trainer.earlier,
        )

    def predict(self, model: nn.Module, split: str) -> tuple[dict[str, float], list[Any]]:
        """Figures and answers on a split."""
        found = self._answered(self._trainer(model, self.plan), split)
        with suppress(OSError):
            # Trainer makes it, whatever it is for; one with checkpoints stays.
            (self.folder / CHECKPOINTS).rmdir()
        return found

    def _answered(self, trainer: _Trainer, split: str) -> tuple[dict[str, float], list[Any]]:
        rows = self.rows[split]
        if split == "train":
            rows = rows[: self.recipe.evaluation.train_examples]
        features = self.task.encode(rows, self.tokenizer, training=False)
        output = trainer.predict(features, **(self._generation() if self.task.generates else {}))
        answers = self.task.answers(rows, features, output.predictions, self.tokenizer)
        figures = self.task.metrics(rows, answers)
        if self.recipe.evaluation.bleurt:
            figures["bleurt"] = bleurt(answers, [row["references"][0] for row in rows], self.recipe.evaluation.bleurt)
        return figures, answers

    def _generation(self) -> dict[str, Any]:
        options = self.recipe.evaluation
        return {
            "max_new_tokens": options.max_new_tokens or self.recipe.task.max_target_length,
            "num_beams": options.beams,
            "do_sample": False,
            # A model's own settings for sampling mean nothing here, and warn.
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def _trainer(
        self,
        model: nn.Module,
        plan: Plan,
        optimizer: Optimizer | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> _Trainer:
        options = self.recipe.training
        # Only in the recipe's own training, not in what comes before it.
        every = self.recipe.evaluation.every if plan.resumable else None
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(self.folder / CHECKPOINTS),
            num_train_epochs=plan.epochs,
            max_steps=plan.max_steps or -1,
            per_device_train_batch_size=plan.batch_size,
            per_device_eval_batch_size=options.evaluation_batch_size,
            gradient_accumulation_steps=plan.accumulation,
            train_sampling_strategy="group_by_length" if options.group_by_length else "random",
            lr_scheduler_type=options.schedule,
            warmup_steps=options.warmup,
            max_grad_norm=options.max_grad_norm,
            bf16=options.bf16,
            **({CHECKPOINTING: True} if options.activation_checkpointing else {}),
            logging_steps=options.logging_steps,
            save_strategy="steps" if plan.resumable else "no",
            save_steps=options.save_steps,
            save_total_limit=1,
            eval_strategy="no" if every is None else "steps",
            eval_steps=every,
            include_num_input_tokens_seen="no" if every is None else "non_padding",
            torch_empty_cache_steps=options.empty_cache_steps,
            predict_with_generate=self.task.generates,
            # Rows are lists of what the model takes.
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=not self.progress,
            report_to=[],
            seed=self.recipe.seed,
        )
        trainer = _Trainer(
            model,
            arguments,
            data_collator=self.collate,
            train_dataset=self.train_features if optimizer is not None else None,
            # Trainer wants one; `measure` takes the rows that it is about.
            eval_dataset=None if every is None else [],
            processing_class=self.tokenizer,
            optimizers=(optimizer, None),
            callbacks=list(callbacks),
            preprocess_logits_for_metrics=None if self.task.generates else self.task.reduce,
        )
        trainer.remove_callback(PrinterCallback)
        if self.progress:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(_Bar)
        return trainer


def load_trained(lab: Lab, folder: Path) -> nn.Module:
    """The model as a finished run left it."""
    if not saved(folder).is_dir():
        raise ValueError(f"{folder} no longer has what was trained; remove its {RESULTS} to train it again.")
    seed = lab.bare()
    if saved(folder).name == ADAPTER:
        return PeftModel.from_pretrained(seed.model, folder / ADAPTER)
    config = seed.model.config
    kind = type(seed.model)
    return kind.from_pretrained(folder / MODEL, config=config, dtype=config.dtype)  # type: ignore[attr-defined]


def tuned_body(folder: Path) -> dict[str, Tensor]:
    """The body that a finished run left, by the names that it has without its head.

    Raises:
        ValueError: if the run is not finished, or its method leaves the body as it is.
    """
    recipe = recipe_of(folder)
    if recipe.method.name == "prompt_tuning":
        raise ValueError(f"{folder} is a run of prompt tuning, which changes no weight of the body.")
    model: Any = load_trained(Lab(recipe, folder), folder)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    return {name: tensor.detach() for name, tensor in model.base_model.state_dict().items()}


def saved(folder: Path) -> Path:
    """Where a run leaves what it trained."""
    return folder / (ADAPTER if (folder / ADAPTER).is_dir() else MODEL)


def _put(seed: Seed, body: dict[str, Tensor], where: str) -> None:
    """Another run's body into this model's, parameter by parameter; a head of this task stays as it is."""
    model: Any = seed.model
    own = model.base_model.state_dict()
    fitting = {name: tensor for name, tensor in body.items() if name in own and own[name].shape == tensor.shape}
    prefix = f"{model.base_model_prefix}."
    lacking = [name for name in own.keys() - fitting.keys() if not seed.in_head(prefix + name)]
    if lacking:
        raise ValueError(f"model.tuned={where} has another body: there is no {sorted(lacking)[0]} of the right shape.")
    model.base_model.load_state_dict(fitting, strict=False)
