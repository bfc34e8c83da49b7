"""What Trainer and its users do besides training: retries, scalers, compilers, searches. Each run beside its dense twin."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from peft_dst import DSTCallback, DSTConfig, DSTOptimizer
from tests.models import CHECKPOINTING, assert_same, batch, logits, loss, native, trainable, tuned_model, weights
from tests.training.test_trainer import Rows, arguments, make
from tests.training.twins import Dense, Project, differing


class RaggedRows(Rows):
    """The same rows, of all lengths from one to seven."""

    def __getitem__(self, index: int):
        row = self.rows[index]
        return {**row, "input_ids": row["input_ids"][: 1 + index % 7]}


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    tokens = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": tokens, "attention_mask": tokens != 0, "labels": torch.stack([row["labels"] for row in rows])}


def equal_to_the_twin(
    build: Callable[[str], nn.Module],
    folder: Path,
    name: str = "bert",
    callbacks: Callable[[], list[TrainerCallback]] = list,
    options: dict[str, Any] | None = None,
    prepare: Callable[[Trainer], object] = lambda trainer: None,
    **settings: Any,
) -> tuple[Trainer, Trainer]:
    """Train a DST model and its dense twin, which end up the same; the one differs from the seed by its budget."""
    model, seed = make(build, name, **(options or {}))
    settings = {"data_collator": None, "train_dataset": Rows(name), "eval_dataset": Rows(name), **settings}
    arguments_only = {
        k: settings.pop(k) for k in list(settings) if k not in ("data_collator", "train_dataset", "eval_dataset")
    }
    twin = Dense(build(name), model.constraint())
    trainers = []
    for network, projection in ((model, []), (twin.model, [Project(twin)])):
        trainer = Trainer(
            network, arguments(folder, **arguments_only), callbacks=[*projection, *callbacks()], **settings
        )
        prepare(trainer)
        trainer.train()
        trainers.append(trainer)
    assert_same(weights(model.get_base_model()), weights(twin.model))
    assert differing(model, seed) == model.constraint().budget
    with model.disable_adapter():
        assert_same(weights(model.get_base_model()), seed)
    return trainers[0], trainers[1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim": "adamw_torch"},
        {"eval_strategy": "steps", "eval_steps": 3},
        {"eval_strategy": "steps", "eval_steps": 2, "bf16": True, "bf16_full_eval": False},
        {"gradient_accumulation_steps": 4},
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
        {"neftune_noise_alpha": 5},
        {"train_sampling_strategy": "group_by_length", "train_dataset": RaggedRows("bert"), "data_collator": padded},
    ],
    ids=lambda s: "-".join(map(str, s)) or "plain",
)
def test_trainer_equals_the_dense_twin(settings, build, tmp_path):
    one, other = equal_to_the_twin(build, tmp_path, **settings)
    evaluated = [[log["eval_loss"] for log in t.state.log_history if "eval_loss" in log] for t in (one, other)]
    assert evaluated[0] == evaluated[1]
    assert bool(evaluated[0]) == ("eval_strategy" in settings)


class OutOfMemory(TrainerCallback):
    """Once, after a step."""

    def __init__(self, step: int):
        self.step: int | None = step

    def on_step_end(self, args, state, control, **unused):
        if state.global_step == self.step:
            self.step = None
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_auto_find_batch_size(build, tmp_path):
    """The second attempt goes on from the weights and the optimizer of the first, as Trainer has it with any model."""
    one, other = equal_to_the_twin(build, tmp_path, callbacks=lambda: [OutOfMemory(2)], auto_find_batch_size=True)
    assert one._train_batch_size == other._train_batch_size == 3
    assert one.state.global_step == 16
    assert one.model.constraint().steps == 2 + 16


def test_auto_find_batch_size_with_a_static_subset(build, tmp_path):
    model, seed = make(build, "bert", selection="random")
    positions = {weight.name: weight.indices.clone() for weight in model.constraint().weights}
    trainer = Trainer(
        model,
        arguments(tmp_path, auto_find_batch_size=True),
        train_dataset=Rows("bert"),
        callbacks=[OutOfMemory(2), DSTCallback()],
    )
    trainer.train()
    assert trainer._train_batch_size == 3
    assert {weight.name: weight.indices.tolist() for weight in model.constraint().weights} == {
        name: at.tolist() for name, at in positions.items()
    }
    with model.disable_adapter():
        assert_same(weights(model.get_base_model()), seed)


class OutOfMemoryInBackward(nn.Module):
    """In the place of a module: passes on what it gets, and once runs out of memory on the way back."""

    def __init__(self, inner: nn.Module, call: int):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        self.call -= 1
        if self.call == 0:
            output.register_hook(_run_out)
        return output


def _run_out(gradient: Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


class Begun(TrainerCallback):
    """Notes the weights that every attempt begins with."""

    def __init__(self, model: nn.Module):
        self.model, self.found = model, []

    def on_train_begin(self, args, state, control, **unused):
        self.found.append(weights(self.model.get_base_model()))


@pytest.mark.parametrize("callback", [True, False])
def test_memory_that_runs_out_within_released_gradients(callback, build, tmp_path):
    """Half of the silos have stepped by then: they go back, or training is refused. DSTCallback knows in time."""
    attempts = []
    for released in (False, True) if callback else (True,):
        model, _ = make(build, "bert")
        begun = Begun(model)
        optimizer = DSTOptimizer(trainable(model), lr=1e-2, weight_decay=0.0, release_gradients=released)
        embeddings = model.get_base_model().bert.embeddings
        model.get_base_model().bert.embeddings = OutOfMemoryInBackward(embeddings, 3)
        trainer = Trainer(
            model,
            arguments(tmp_path, auto_find_batch_size=True, max_grad_norm=0.0),
            train_dataset=Rows("bert"),
            optimizers=(optimizer, None),
            callbacks=[DSTCallback(), begun] if callback else [begun],
        )
        if released and not callback:
            with pytest.raises(RuntimeError, match="got a second gradient"):
                trainer.train()
            return
        trainer.train()
        assert trainer._train_batch_size == 3
        attempts.append(begun.found)
    assert [len(found) for found in attempts] == [2, 2]
    # Of the optimizer's state the moments have moved: neither is that put back when a step fails.
    assert_same(attempts[0][1], attempts[1][1])


# Which checkpoint is kept


@pytest.mark.parametrize("kind", ["hook", "silo_by_silo", "silo_by_silo-bf16", "static", "static-bf16"])
def test_the_best_of_few_checkpoints(kind, build, tmp_path):
    base = build("bert").to(torch.bfloat16 if kind.endswith("bf16") else torch.float32)
    seed = weights(base)
    selection = "magnitude" if kind.startswith("static") else "dynamic"
    model = get_peft_model(base, DSTConfig(epsilon=0.02, selection=selection, modules_to_save=["classifier"]))
    args = arguments(
        tmp_path, save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3,
        load_best_model_at_end=True, save_total_limit=2, learning_rate=0.1, greater_is_better=True,
    )  # fmt: skip
    optimizer = torch.optim.AdamW if kind == "static" else DSTOptimizer
    trainer = Trainer(
        model,
        args,
        train_dataset=Rows("bert"),
        eval_dataset=Rows("bert"),
        **({} if kind == "hook" else {"optimizer_cls_and_kwargs": (optimizer, {"lr": 0.1})}),
    )
    trainer.train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    evaluated = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    # The worst, to be another one than the last.
    best = max(evaluated, key=evaluated.__getitem__)
    assert trainer.state.best_global_step == best != trainer.state.global_step
    assert trainer.evaluate()["eval_loss"] == evaluated[best]
    fresh = PeftModel.from_pretrained(
        build("bert").to(base.dtype), trainer.state.best_model_checkpoint, torch_dtype=base.dtype
    )
    assert_same(weights(model.get_base_model()), weights(fresh.get_base_model()))
    assert torch.equal(logits(model, "bert"), logits(fresh, "bert"))
    with model.disable_adapter():
        now = {name.replace(".original_module", ""): t for name, t in weights(model.get_base_model()).items()}
        assert_same(now, seed)


# Loss scaling

SCALED = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "silo_by_silo": lambda p: DSTOptimizer(p, lr=1e-2, fused=True),
}
SCALED_OPTIONS = [
    {},
    {"selection": "random"},
    {"selection": "first_step"},
    {"churn_interval": 2},
    {"threshold": "iterative"},
]


@pytest.mark.parametrize("options", SCALED_OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "plain")
@pytest.mark.parametrize("kind", SCALED)
def test_a_skipped_step_is_no_step(kind, options, build):
    """A GradScaler skips steps with infinite gradients; fused optimizers are called, and change nothing."""

    def run(skipped: set[int]) -> tuple[dict[str, Tensor], list[float]]:
        model, _ = make(build, "bert", **options)
        optimizer = SCALED[kind](trainable(model))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, backoff_factor=1.0 - 1e-9)
        for step in range(5):
            if step in skipped:
                before, constraint = weights(model.get_base_model()), model.constraint()
                subset = [weight.indices.clone() for weight in constraint.weights]
                steps, thresholds = constraint.steps, [float(silo.threshold) for silo in constraint.silos]
                scaler.scale(loss(model, "bert", step) * torch.inf).backward()
                scaler.step(optimizer)
                scaler.update(1024.0)
                optimizer.zero_grad()
                assert_same(weights(model.get_base_model()), before)
                assert all(torch.equal(w.indices, at) for w, at in zip(constraint.weights, subset, strict=True))
                assert (constraint.steps, [float(silo.threshold) for silo in constraint.silos]) == (steps, thresholds)
            scaler.scale(loss(model, "bert", step)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return weights(model.get_base_model()), [float(silo.threshold) for silo in model.constraint().silos]

    one, other = run(set()), run({0, 1, 3})
    assert_same(one[0], other[0])
    assert one[1] == other[1]


class Overflows(TrainerCallback):
    """Makes the gradients of some steps infinite."""

    def __init__(self, scaler: torch.amp.GradScaler, calls: set[int]):
        self.scaler, self.calls, self.call = scaler, calls, itertools.count()

    def on_step_begin(self, args, state, control, **unused):
        if next(self.call) in self.calls:
            self.scaler.update(torch.inf)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_loss_scaling_under_trainer(optim, build, tmp_path):
    """As with fp16=True, which Trainer keeps for GPUs: steps are skipped, by Accelerate's word the schedule's too."""
    skipped = []

    def prepare(trainer: Trainer) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))
        trainer.accelerator.scaler = scaler
        trainer.add_callback(Overflows(scaler, {0, 4}))
        trainer.add_callback(Note(trainer))

    class Note(TrainerCallback):
        def __init__(self, trainer: Trainer):
            self.trainer = trainer

        def on_step_end(self, args, state, control, **unused):
            skipped.append(self.trainer.optimizer.step_was_skipped)
            self.trainer.accelerator.scaler.update(1024.0)

    trainer, _ = equal_to_the_twin(build, tmp_path, prepare=prepare, optim=optim, max_grad_norm=0.0)
    # A fused optimizer is called all the same, and Accelerate does not know better.
    assert [i for i, was in enumerate(skipped) if was] == ([0, 4, 12, 16] if optim == "adamw_torch" else [])
    assert trainer.model.constraint().steps == 10


# torch.compile


def test_torch_compile_in_trainer(build, tmp_path):
    torch.compiler.reset()
    trained = []
    for compiled in (False, True):
        model, seed = make(build, "bert", modules_to_save=["classifier"])
        settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        args = arguments(
            tmp_path, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True, **settings
        )
        Trainer(model, args, train_dataset=Rows("bert"), eval_dataset=Rows("bert")).train()
        trained.append(dict(model.state_dict()))
        assert differing(model, seed) == model.constraint().budget
    assert_same(*trained)


@pytest.mark.parametrize(
    ("make_optimizer", "options"),
    [(torch.optim.AdamW, {}), (torch.optim.AdamW, {"selection": "random"}), (DSTOptimizer, {})],
    ids=["hook", "static", "silo_by_silo"],
)
def test_torch_compile_sees_every_change_of_the_weights(make_optimizer, options, build):
    """One graph, which reads the live weights: after steps, disabled, and with another adapter."""
    torch.compiler.reset()
    trained = []
    for compiled in (False, True):
        model, _ = make(build, "llama", **options)
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = make_optimizer(trainable(model), lr=1e-2)
        losses = []
        for step in range(3):
            found = called(**batch("llama", step)).loss
            found.backward()
            optimizer.step()
            optimizer.zero_grad()
            with model.disable_adapter():
                losses += [found.item(), called(**batch("llama")).loss.item()]
        assert len({*losses[1::2]}) == 1
        trained.append((losses, weights(model.get_base_model())))
    assert trained[0][0] == trained[1][0]
    assert_same(trained[0][1], trained[1][1])


def test_torch_compile_of_a_model_loaded_by_transformers(build, tmp_path):
    """Its adapter is written into the weights at the first forward pass."""
    torch.compiler.reset()
    load = native(tmp_path)
    model, outputs = tuned_model(build)
    model.save_pretrained(tmp_path / "adapter")
    base = load()
    base.load_adapter(str(tmp_path / "adapter"))
    called = torch.compile(base.eval(), backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(called(**batch("bert")).logits, outputs["default"])


# Generation while training


@pytest.mark.parametrize("selection", ["dynamic", "random"])
def test_predict_with_generate_while_training(selection, build, tmp_path):
    runs = []
    for evaluated in (False, True):
        model, seed = make(build, "t5", selection=selection, task_type="SEQ_2_SEQ_LM")
        settings = {"eval_strategy": "steps", "eval_steps": 4} if evaluated else {}
        trainer = Seq2SeqTrainer(
            model,
            arguments(tmp_path, seq2seq=True, predict_with_generate=True, generation_max_length=5, **settings),
            train_dataset=Rows("t5"),
            eval_dataset=Rows("t5"),
            compute_metrics=lambda prediction: {"length": float(prediction.predictions.shape[1])},
        )
        trainer.train()
        runs.append(weights(model.get_base_model()))
        assert sum("eval_length" in log for log in trainer.state.log_history) == (3 if evaluated else 0)
        with model.disable_adapter():
            assert_same(weights(model.get_base_model()), seed)
    assert_same(*runs)


# Search


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_hyperparameter_search(build, tmp_path):
    """Every trial starts from the seed, and has a budget of its own."""
    models: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def model_init(trial: optuna.Trial | None) -> nn.Module:
        epsilon = trial.suggest_categorical("epsilon", [0.01, 0.03]) if trial is not None else 0.02
        models.append(make(build, "bert", epsilon=epsilon))
        return models[-1][0]

    def trainer(folder: Path, init: Any, **settings: Any) -> Trainer:
        return Trainer(
            model_init=init,
            args=arguments(folder, eval_strategy="epoch", num_train_epochs=1, **settings),
            train_dataset=Rows("bert"),
            eval_dataset=Rows("bert"),
            callbacks=[DSTCallback()],
        )

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = trainer(tmp_path / "search", model_init).hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)},
        n_trials=3,
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    # The first one is Trainer's own.
    assert len(models) == 4
    for model, seed in models[1:]:
        budget = model.constraint().budget
        assert differing(model, seed) == budget
        with model.disable_adapter():
            assert_same(weights(model.get_base_model()), seed)
    assert {model.constraint().budget for model, _ in models[1:]} == {
        make(build, "bert", epsilon=epsilon)[0].constraint().budget for epsilon in (0.01, 0.03)
    }

    best = dict(found.hyperparameters)
    epsilon = best.pop("epsilon")
    again = trainer(tmp_path / "again", lambda: make(build, "bert", epsilon=epsilon)[0], **best)
    again.train()
    assert again.evaluate()["eval_loss"] == found.objective
