"""FSDP2 through transformers' Trainer: as one process, figures included; resumed to the same bits; the best one loaded."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_dst import DSTCallback, DSTConfig, DSTOptimizer, create_dst_optimizer
from tests.distributed.accelerated import admit_cpus, environment
from tests.distributed.sharded import assert_agree
from tests.distributed.test_accelerate import FULL, SHARDED, trained
from tests.models import BUILDERS, batch
from tests.training.test_trainer import Rows


# Of four samples.
STEPS_AN_EPOCH = 3


class TwoRates(Trainer):
    """Where FSDP is on, Trainer takes no optimizer that was made before."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = create_dst_optimizer(self.model, lr=1e-2, head_lr=1e-3)
        return self.optimizer


class AtTheEnd(TrainerCallback):
    """What was trained, before a better checkpoint is loaded."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 2 * STEPS_AN_EPOCH:
            self.found = trained(model)


def make(world, kind, state_dict_type, folder, **options):
    torch.manual_seed(0)
    model = get_peft_model(BUILDERS["bert"](), DSTConfig(epsilon=0.02, modules_to_save=["classifier"]))
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": state_dict_type}
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=2,
        per_device_train_batch_size=4 // world,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="epoch",
        eval_strategy="epoch",
        # The worst one here, which is not the last.
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        # It would multiply the loss, which is a mean over samples here, by the number of processes.
        average_tokens_across_devices=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        **({"fsdp": True, "fsdp_config": config} if world > 1 else {}),
        **options,
    )
    if world > 1:
        admit_cpus()
    cls, given = (
        (TwoRates, {}) if kind == "hook" else (Trainer, {"optimizer_cls_and_kwargs": (DSTOptimizer, {"lr": 1e-2})})
    )
    last, rows = AtTheEnd(), Subset(Rows("bert"), range(4 * STEPS_AN_EPOCH))
    trainer = cls(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[DSTCallback(), last],
        **given,
    )
    return trainer, last


def figures(trainer):
    logs = [
        {k: v for k, v in log.items() if k.startswith("dst/")} for log in trainer.state.log_history if "loss" in log
    ]
    assert len(logs) == 2 * STEPS_AN_EPOCH
    return logs


def train(rank, world, kind, state_dict_type, folder):
    with environment(rank, world):
        trainer, last = make(world, kind, state_dict_type, folder)
        trainer.train()
        assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), DSTOptimizer) == (kind != "hook")
        if state_dict_type == FULL:
            trainer.save_model(f"{folder}/final")
        else:
            # Trainer leaves the adapter's own files out of sharded checkpoints.
            trainer.save_model(f"{folder}/nothing")
            trainer.model.save_pretrained(f"{folder}/final")
        with torch.no_grad():
            logits = trainer.model.eval()(**batch("bert")).logits
        return last.found, figures(trainer), logits


def resume(rank, world, kind, state_dict_type, folder):
    with environment(rank, world):
        trainer, last = make(world, kind, state_dict_type, folder, load_best_model_at_end=True)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS_AN_EPOCH}")
        assert trainer.state.best_model_checkpoint == f"{folder}/checkpoint-{STEPS_AN_EPOCH}"
        best = trained(trainer.model)
        trainer.model.save_pretrained(f"{folder}/best")
        with torch.no_grad():
            logits = trainer.model.eval()(**batch("bert")).logits
        return last.found, figures(trainer), best, logits


def loaded(folder):
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(BUILDERS["bert"](), folder).eval()
    with torch.no_grad():
        return model(**batch("bert")).logits


@pytest.mark.parametrize(("kind", "state_dict_type"), [("hook", FULL), ("AdamW", SHARDED)])
def test_trainer(together, afresh, tmp_path, kind, state_dict_type):
    (((alone, dense), figures_alone, _),) = together(1, train, kind, state_dict_type, str(tmp_path / "1"))
    arguments = kind, state_dict_type, str(tmp_path / "2")
    divided = together(2, train, *arguments)
    (found, heads), _, logits = divided[0]
    assert_agree(alone, found)
    torch.testing.assert_close(heads, dense, rtol=1e-4, atol=1e-5)
    for _, own, _ in divided:
        for one, other in zip(figures_alone, own, strict=True):
            assert other == pytest.approx(one, rel=1e-3)
    assert torch.equal(loaded(tmp_path / "2" / "final"), logits)

    for (again, heads_again), figures_again, best, logits in afresh(2, resume, *arguments):
        torch.testing.assert_close((again, heads_again), (found, heads), rtol=0, atol=0)
        assert figures_again[STEPS_AN_EPOCH:] == divided[0][1][STEPS_AN_EPOCH:]
        assert any(not torch.equal(best[0][name][1], found[name][1]) for name in found)
        for folder in ("best", *([f"checkpoint-{STEPS_AN_EPOCH}"] if state_dict_type == FULL else [])):
            assert torch.equal(loaded(tmp_path / "2" / folder), logits)
