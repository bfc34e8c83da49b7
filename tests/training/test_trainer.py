"""Under transformers' Trainer, Accelerate and plain loops, with no callback; and what the callback adds."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from peft_dst import DSTCallback, DSTConfig, DSTOptimizer, create_dst_optimizer, parameter_groups
from peft_dst.core.reference import reference_step
from peft_dst.training import subset_metrics
from tests.models import CHECKPOINTING, assert_same, batch, logits, train, weights


class Rows(Dataset):
    """Twenty-four rows of one architecture's random batches."""

    def __init__(self, name: str):
        batches = [batch(name, step) for step in range(6)]
        self.rows = [{k: v[i] for k, v in b.items()} for b in batches for i in range(4)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.rows[index]


class Watch(TrainerCallback):
    """After every optimizer step: at most the budget differs, and everything else is the seed, bit for bit."""

    def __init__(self, model: nn.Module, seed: dict[str, torch.Tensor]):
        self.model, self.seed, self.counts = model, seed, []

    def on_optimizer_step(self, args, state, control, **kwargs):
        budget = {w.name: silo for silo in self.model.constraint().silos for w in silo.weights}
        differing: dict[str, int] = {}
        for name, now in weights(self.model.get_base_model()).items():
            name = name.replace(".original_module", "")
            if name in budget:
                silo = budget[name]
                differing[silo.name] = differing.get(silo.name, 0) + int((now != self.seed[name]).sum())
        for silo in self.model.constraint().silos:
            assert differing[silo.name] <= silo.budget
        self.counts.append(sum(differing.values()))


def arguments(folder: Path, seq2seq: bool = False, **options) -> TrainingArguments:
    options = {"num_train_epochs": 2, "learning_rate": 1e-2, "weight_decay": 0.0, **options}
    return (Seq2SeqTrainingArguments if seq2seq else TrainingArguments)(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=options.pop("report_to", []),
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        save_strategy=options.pop("save_strategy", "no"),
        **options,
    )


def make(build, name, **options):
    base = build(name)
    seed = weights(base)
    return get_peft_model(base, DSTConfig(**{"epsilon": 0.02, **options})), seed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 3},
        {"max_grad_norm": 0.01},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
    ],
    ids=lambda o: "-".join(map(str, o)) or "plain",
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_trainer_keeps_the_constraint(name, options, build, tmp_path):
    model, seed = make(build, name)
    watch = Watch(model, seed)
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=Rows(name), callbacks=[watch])
    trainer.train()
    assert len(watch.counts) == trainer.state.global_step >= 4
    assert watch.counts[-1] > 0.5 * model.constraint().budget
    with model.disable_adapter():
        assert_same(weights(model.get_base_model()), seed)


@pytest.mark.parametrize(
    ("name", "task_type", "head"),
    [
        ("bert", "SEQ_CLS", "classifier"),
        ("roberta", "TOKEN_CLS", "classifier"),
        ("llama", "CAUSAL_LM", "lm_head"),
        ("gpt2", "CAUSAL_LM", None),
        ("t5", "SEQ_2_SEQ_LM", None),
    ],
)
def test_task_types_with_dense_heads(name, task_type, head, build, tmp_path):
    model, seed = make(build, name, task_type=task_type, modules_to_save=[head] if head else None)
    before = model.get_base_model().get_submodule(head).state_dict() if head else {}
    before = {k: v.clone() for k, v in before.items() if "modules_to_save" in k}
    watch = Watch(model, seed)
    cls = Seq2SeqTrainer if name == "t5" else Trainer
    cls(model, arguments(tmp_path, name == "t5"), train_dataset=Rows(name), callbacks=[watch]).train()
    for key, value in before.items():
        # Every component of a head moves.
        assert (model.get_base_model().get_submodule(head).state_dict()[key] != value).all()
    output = logits(model, name)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(build(name), tmp_path / "adapter"), name), output)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_interrupted_and_resumed_equals_uninterrupted(optim, build, tmp_path):
    def run(folder, resume=None, stop=None):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == stop

        torch.manual_seed(3)
        model, seed = make(build, "bert", modules_to_save=["classifier"])
        args = arguments(folder, save_strategy="steps", save_steps=5, optim=optim, warmup_steps=3)
        trainer = Trainer(model, args, train_dataset=Rows("bert"), callbacks=[Stop()])
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer, seed

    whole, _, seed = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=5)
    resumed, trainer, _ = run(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-5"))
    assert trainer.state.global_step == 12
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    with resumed.disable_adapter():
        now = {n.replace(".original_module", ""): t for n, t in weights(resumed.get_base_model()).items()}
        assert_same(now, seed)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"optimizer_cls": torch.optim.Adafactor}, torch.bfloat16),
        ({"release_gradients": True}, torch.bfloat16),
    ],
    ids=["adamw", "adafactor-bf16", "release-bf16"],
)
def test_silo_by_silo_under_trainer_and_resumed(options, dtype, build, tmp_path):
    def run(folder, resume=None, stop=None):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == stop

        torch.manual_seed(3)
        base = build("bert").to(dtype)
        seed = weights(base)
        model = get_peft_model(base, DSTConfig(epsilon=0.02, modules_to_save=["classifier"]))
        args = arguments(folder, save_strategy="steps", save_steps=5, warmup_steps=3, max_grad_norm=0.0)
        watch = Watch(model, seed)
        trainer = Trainer(
            model,
            args,
            train_dataset=Rows("bert"),
            callbacks=[Stop(), watch, DSTCallback()],
            optimizer_cls_and_kwargs=(DSTOptimizer, {"lr": 1e-2, **options}),
        )
        trainer.train(resume_from_checkpoint=resume)
        assert watch.counts[-1] > 0.5 * model.constraint().budget
        return model, trainer

    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=5)
    resumed, trainer = run(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-5"))
    assert trainer.state.global_step == 12
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_silo_by_silo_with_accumulation_and_clipping_equals_the_hook(build, tmp_path):
    trained = []
    for make_optimizer in (torch.optim.AdamW, DSTOptimizer):
        model, _ = make(build, "llama")
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        args = arguments(tmp_path, gradient_accumulation_steps=3, max_grad_norm=0.01, bf16=True)
        Trainer(model, args, train_dataset=Rows("llama"), optimizers=(optimizer, None)).train()
        trained.append(weights(model.get_base_model()))
    assert_same(*trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.01}, r"max_grad_norm=0.01 cannot be combined .*max_grad_norm=0"),
        ({"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 cannot be combined"),
    ],
)
@pytest.mark.parametrize("callback", [True, False])
def test_released_gradients_refuse_what_trainer_would_do_with_them(callback, options, message, build, tmp_path):
    model, seed = make(build, "bert")
    optimizer = DSTOptimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2, release_gradients=True)
    callbacks = [DSTCallback()] if callback else []
    trainer = Trainer(
        model,
        arguments(tmp_path, **options),
        train_dataset=Rows("bert"),
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )
    with pytest.raises((ValueError, RuntimeError), match=message if callback else "release_gradients=False"):
        trainer.train()
    if callback or "gradient_accumulation_steps" in options:
        assert_same(weights(model.get_base_model()), seed)


def test_silo_by_silo_under_accelerate(build):
    trained = []
    for prepare in (lambda m, o: (m, o), lambda m, o: Accelerator(gradient_accumulation_steps=2).prepare(m, o)):
        model, _ = make(build, "bert")
        optimizer = DSTOptimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        prepared, stepper = prepare(model, optimizer)
        for step in range(4):
            (prepared(**batch("bert", step)).loss / 2).backward()
            if step % 2:
                stepper.step()
                stepper.zero_grad()
        trained.append(weights(model.get_base_model()))
    assert_same(*trained)


def test_load_best_model_at_end(build, tmp_path):
    model, seed = make(build, "bert")
    args = arguments(
        tmp_path, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True, learning_rate=0.3
    )
    trainer = Trainer(model, args, train_dataset=Rows("bert"), eval_dataset=Rows("bert"))
    trainer.train()
    best = PeftModel.from_pretrained(build("bert"), trainer.state.best_model_checkpoint)
    assert_same(weights(model.get_base_model()), weights(best.get_base_model()))
    with model.disable_adapter():
        assert_same(weights(model.get_base_model()), seed)


def test_native_model_under_trainer(build, tmp_path):
    base = build("bert")
    seed = weights(base)
    base.add_adapter(DSTConfig(epsilon=0.02))
    Trainer(base, arguments(tmp_path), train_dataset=Rows("bert")).train()
    differing = sum(int((now != seed[name]).sum()) for name, now in weights(base).items())
    assert 0 < differing <= base.dst_constraints["default"].budget


def test_two_learning_rates_in_trainer(build, tmp_path):
    model, _ = make(build, "bert", modules_to_save=["classifier"])
    optimizer = create_dst_optimizer(model, lr=0.5, head_lr=1e-3, weight_decay=0.1, betas=(0.8, 0.9))
    trainer = Trainer(
        model,
        arguments(tmp_path, lr_scheduler_type="constant"),
        train_dataset=Rows("bert"),
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("subset", 0.5, 0.0),
        ("dense", 1e-3, 0.1),
    ]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    head = {id(p) for p in model.get_base_model().classifier.modules_to_save.parameters()}
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == head
    everything = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == everything


def test_groups_need_something_to_train(build):
    with pytest.raises(ValueError, match="no trainable parameter under a DST constraint"):
        parameter_groups(build("bert"), lr=1, head_lr=1)
    model, _ = make(build, "bert")
    assert [g["name"] for g in parameter_groups(model, lr=1, head_lr=1)] == ["subset"]
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(ValueError, match="set_adapter"):
        parameter_groups(model, lr=1, head_lr=1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_accelerate_equals_the_reference(accumulate, build):
    model, seed = make(build, "bert")
    twin = build("bert")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    constraint = model.constraint()
    silos = {s.name: [w.name for w in s.weights] for s in constraint.silos}
    budgets = {s.name: s.budget for s in constraint.silos}
    prepared, optimizer = accelerator.prepare(model, optimizer)
    for step in range(6):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch("bert", step)).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        (twin(**batch("bert", step)).loss / accumulate).backward()
        if (step + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            twin_optimizer.step()
            twin_optimizer.zero_grad()
            projected, _ = reference_step(seed, weights(twin), silos, budgets, constraint.distance)
            with torch.no_grad():
                for name, value in projected.items():
                    twin.get_parameter(name).copy_(value)
        assert_same(weights(model.get_base_model()), weights(twin))
    assert constraint.steps == 6 // accumulate


@pytest.mark.parametrize(
    ("make_optimizer", "options", "dtype"),
    [
        (torch.optim.AdamW, {}, torch.float32),
        (DSTOptimizer, {}, torch.float32),
        (DSTOptimizer, {}, torch.bfloat16),
        (torch.optim.AdamW, {"selection": "random"}, torch.float32),
        (DSTOptimizer, {"selection": "random"}, torch.bfloat16),
        (torch.optim.AdamW, {"churn_interval": 2}, torch.float32),
        (DSTOptimizer, {"threshold": "iterative"}, torch.float32),
    ],
    ids=["hook", "silo_by_silo", "silo_by_silo-bf16", "static", "static-bf16", "churn_interval", "iterative"],
)
def test_accelerate_save_state_and_load_state(make_optimizer, options, dtype, build, tmp_path):
    def prepared():
        base = build("bert").to(dtype)
        seed = weights(base)
        model = get_peft_model(base, DSTConfig(epsilon=0.02, modules_to_save=["classifier"], **options))
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
        return seed, accelerator, *accelerator.prepare(model, optimizer, schedule)

    def steps(accelerator, model, optimizer, schedule, first):
        for step in range(first, first + 6):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch("bert", step)).loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    seed, *run = prepared()
    steps(*run, 0)
    run[0].save_state(str(tmp_path))
    steps(*run, 6)
    after = {name: tensor.clone() for name, tensor in run[1].state_dict().items()}
    steps(*run, 12)
    # Back in the same process, and in what might be another one.
    for accelerator, model, *rest in run, prepared()[1:]:
        accelerator.load_state(str(tmp_path))
        steps(accelerator, model, *rest, 6)
        assert_same(dict(model.state_dict()), after)
        with model.disable_adapter():
            now = {n.replace(".original_module", ""): t for n, t in weights(model.get_base_model()).items()}
            assert_same(now, seed)


# The callback


KINDS = {
    "model.norm": "norm",
    "embed": "embeddings",
    "attn": "attention",
    "input_layernorm": "attention",
    "head": "head",
}


def test_the_figures_by_hand(build):
    model, seed = make(build, "llama")
    silos = model.constraint().silos
    assert any(not silo.budget for silo in silos)
    train(model, "llama", 2)
    before = {weight.name: set(weight.indices.tolist()) for weight in model.constraint().weights}
    train(model, "llama", 1, first=2)
    subset, shares, thresholds = {}, {}, []
    for silo in silos:
        distances = []
        for weight in silo.weights:
            now, then = weight.data.flatten(), seed[weight.name].flatten()
            subset[weight.name] = set((now != then).nonzero().flatten().tolist())
            distances += [float((then[i] * (now[i] - then[i])).abs()) for i in subset[weight.name]]
            found = [kind for part, kind in KINDS.items() if part in weight.name]
            kind = found[0] if found else "feed_forward"
            shares[kind] = shares.get(kind, 0) + len(subset[weight.name])
        if silo.budget:
            thresholds.append(min(distances))
    free = sum(len(at) for at in subset.values())
    arrived = sum(len(at - before[name]) for name, at in subset.items())
    thresholds.sort()
    assert 0 < arrived < free
    assert len(thresholds) == 6
    metrics = {
        "dst/free_parameters": free,
        "dst/churn": arrived / free,
        "dst/threshold": (thresholds[2] + thresholds[3]) / 2,
        **{f"dst/share/{kind}": count / free for kind, count in shares.items()},
    }
    assert subset_metrics(model.constraint()) == pytest.approx(metrics)
    assert len(set(shares.values())) == len(shares)


def test_the_callback_reports(build, tmp_path):
    model, seed = make(build, "llama")
    args = arguments(tmp_path, report_to=["tensorboard"])
    trainer = Trainer(model, args, train_dataset=Rows("llama"), callbacks=[DSTCallback()])
    trainer.train()
    entry = next(log for log in reversed(trainer.state.log_history) if "loss" in log)
    differing = sum(int((now != seed[n]).sum()) for n, now in weights(model.get_base_model()).items())
    assert entry["dst/free_parameters"] == differing
    assert 0 <= entry["dst/churn"] <= 1
    assert entry["dst/threshold"] > 0
    shares = {k.removeprefix("dst/share/"): v for k, v in entry.items() if k.startswith("dst/share/")}
    assert set(shares) == {"embeddings", "attention", "feed_forward", "norm", "head"}
    assert sum(shares.values()) == pytest.approx(1)
    json.dumps(trainer.state.log_history)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs" / "dst"))
    events.Reload()
    churn = events.Scalars("dst/churn")
    assert [e.step for e in churn] == list(range(1, 13))
    assert churn[-1].value == pytest.approx(entry["dst/churn"])


def test_a_callback_put_first_reaches_every_reporter(build, tmp_path):
    class Reporter(TrainerCallback):
        seen: list[dict] = []  # noqa: RUF012

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    model, _ = make(build, "bert")
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Rows("bert"), callbacks=[Reporter()])
    trainer.callback_handler.callbacks.insert(0, DSTCallback())
    trainer.train()
    assert "dst/free_parameters" in Reporter.seen[0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lr": 2e-5}, "a learning rate of 2e-05 is one of full fine-tuning. A subset wants far more"),
        ({"weight_decay": 0.01}, "weight decay 0.01 acts on every parameter.*create_dst_optimizer"),
        ({"half": True}, r"tensors under the constraint are torch.bfloat16.*peft_dst.DSTOptimizer, or load"),
        ({"dropout": True}, r"dropout is on \(hidden_dropout_prob=0.1\).*0.0 to from_pretrained"),
    ],
)
def test_the_callback_advises(change, match, build, tmp_path):
    base = build("bert")
    if change.get("half"):
        base = base.to(torch.bfloat16)
    if change.get("dropout"):
        base.config.hidden_dropout_prob = 0.1
    model = get_peft_model(base, DSTConfig(epsilon=0.02))
    options = {"learning_rate": change["lr"]} if "lr" in change else {}
    args = arguments(tmp_path, weight_decay=change.get("weight_decay", 0.0), max_steps=1, **options)
    with pytest.warns(UserWarning, match=match):
        Trainer(model, args, train_dataset=Rows("bert"), callbacks=[DSTCallback()]).train()


def test_the_callback_is_silent_where_all_is_well_and_says_where_it_is_idle(build, tmp_path):
    model, _ = make(build, "bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
        Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=Rows("bert"), callbacks=[DSTCallback()]).train()
    lora = get_peft_model(build("bert"), LoraConfig(target_modules=["query"]))
    with pytest.warns(UserWarning, match="no active DST adapter"):
        Trainer(lora, arguments(tmp_path, max_steps=1), train_dataset=Rows("bert"), callbacks=[DSTCallback()]).train()
