"""What the stages of one run share: data encoded once, the seed with its trained head, and Trainer, set up the same way."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer
from transformers import PrinterCallback, ProgressCallback, Seq2SeqTrainingArguments, TrainerCallback, set_seed

from ..baselines import SeedPenalty
from ..delta.files import replace_file
from .config import digest
from .finished import seed_of
from .metrics import bleurt, check_bleurt
from .models import Seed, load_tokenizer
from .options import Recipe
from .record import CACHE, CHECKPOINTS
from .tasks import make_task
from .tasks.base import Features, Row
from .trainer import CHECKPOINTING, Bar, Clock, RunTrainer, last_checkpoint, seconds_of


# What a head that is trained first depends on.
OF_HEAD = (
    "model.",
    "task.",
    "seed",
    "training.head_first.",
    *(f"training.{name}" for name in ("group_by_length", "schedule", "warmup", "max_grad_norm", "bf16")),
)


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
        self._positions: int | None = None

    @property
    def train_features(self) -> list[Features]:
        """The training examples, encoded once; a model must have been made before."""
        if self._train is None:
            self._train = self._encoded(self.rows.train, training=True)
        return self._train

    def _encoded(self, rows: list[Row], training: bool) -> list[Features]:
        features = self.task.encode(rows, self.tokenizer, training=training)
        longest = max((len(feature["input_ids"]) for feature in features), default=0)
        if self._positions is not None and longest > self._positions:
            raise ValueError(
                f"task.max_length={self.recipe.task.max_length} leaves {longest} tokens, but {self.recipe.model.name} has "
                f"positions for {self._positions}; set task.max_length to that at most."
            )
        return features

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
        seed = seed_of(self.recipe, self.task)
        self._positions = seed.positions()
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
        # Each tensor once, under whatever names it has.
        tensors = [*seed.model.named_parameters(), *seed.model.named_buffers()]
        replace_file(file, {name: tensor.detach() for name, tensor in tensors if seed.in_head(name)}, {})

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
        last = last_checkpoint(self.folder / CHECKPOINTS) if plan.resumable else None
        if plan.resumable:
            trainer.add_callback(Clock(trainer.clock))
        if last is not None:
            trainer.earlier, trainer.measured_earlier = seconds_of(Path(last))
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

    def _answered(self, trainer: RunTrainer, split: str) -> tuple[dict[str, float], list[Any]]:
        rows = self.rows[split]
        if split == "train":
            rows = rows[: self.recipe.evaluation.train_examples]
        features = self._encoded(rows, training=False)
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
    ) -> RunTrainer:
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
        trainer = RunTrainer(
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
            trainer.add_callback(Bar)
        return trainer
