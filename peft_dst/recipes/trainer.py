"""transformers' Trainer, as runs need it: penalties, answers measured in between, seconds, checkpoints that are whole."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import ProgressCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..baselines import SeedPenalty
from .record import write


# In a checkpoint.
SECONDS = "seconds.json"
# transformers' older name of it is `gradient_checkpointing`.
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in Seq2SeqTrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"


def last_checkpoint(folder: Path) -> str | None:
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


def seconds_of(checkpoint: Path) -> tuple[float, float]:
    """How long training had taken at a checkpoint, and measuring in between; 0 of one that does not say it."""
    try:
        training, measuring = json.loads((checkpoint / SECONDS).read_text())
        return float(training), float(measuring)
    except (OSError, ValueError, TypeError):
        return 0.0, 0.0


class Bar(ProgressCallback):
    """Trainer's progress bar, with the loss in it instead of printed over it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class Clock(TrainerCallback):
    """Writes into each checkpoint how long it took to come there: training, and measuring."""

    def __init__(self, seconds: Callable[[], tuple[float, float]]) -> None:
        self.seconds = seconds

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        write(Path(args.output_dir) / f"checkpoint-{state.global_step}" / SECONDS, self.seconds())


class RunTrainer(Seq2SeqTrainer):
    """Trainer with a penalty on the distance from the seed; answers without the questions before them."""

    penalty: SeedPenalty | None = None
    # What is measured in the middle of training, and the seconds that it took.
    measure: Callable[[], dict[str, float]] | None = None
    measuring = 0.0
    # Seconds that training took before it was interrupted, and measuring.
    earlier, measured_earlier = 0.0, 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Bytes of the accelerator, allocated and reserved, after each backward pass.
        self.memory: list[tuple[int, int]] = []
        self.begin = time.perf_counter()

    def seconds(self) -> float:
        """How long training has taken, what was measured in between aside."""
        return self.earlier + time.perf_counter() - self.begin - self.measuring

    def clock(self) -> tuple[float, float]:
        """Seconds of training and of measuring, those before an interruption included."""
        return self.seconds(), self.measured_earlier + self.measuring

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
        logs["measuring_seconds"] = self.measured_earlier + self.measuring
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
