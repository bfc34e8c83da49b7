"""A plain LightningModule around a DST model, and the example that shows one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader

from peft_dst import DSTConfig, DSTOptimizer, create_dst_optimizer
from tests.models import assert_same, bert, weights
from tests.programs import run
from tests.training.test_trainer import Rows
from tests.training.twins import Dense, differing


lightning = pytest.importorskip("lightning", reason="the test extra (Lightning) is not installed")
pytestmark = [
    # Of Lightning's own making, or its advice for larger runs.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*litlogger"),
]

MAKERS = {
    "hook": (torch.optim.AdamW, {}, torch.float32),
    "silo_by_silo": (DSTOptimizer, {}, torch.float32),
    "silo_by_silo-bf16": (DSTOptimizer, {}, torch.bfloat16),
    "static": (torch.optim.AdamW, {"selection": "random"}, torch.float32),
    "churn_interval": (torch.optim.AdamW, {"churn_interval": 2}, torch.float32),
}


class Module(lightning.LightningModule):
    def __init__(self, kind: str):
        super().__init__()
        self.make, options, dtype = MAKERS[kind]
        torch.manual_seed(0)
        base = bert().to(dtype)
        self.seed = weights(base)
        self.model = get_peft_model(base, DSTConfig(epsilon=0.02, modules_to_save=["classifier"], **options))

    def training_step(self, rows, index):
        return self.model(**rows).loss

    def configure_optimizers(self):
        optimizer = create_dst_optimizer(self.model, self.make, lr=1e-2, head_lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches() -> DataLoader:
    return DataLoader(Rows("bert"), batch_size=4)


def fit(module: Module, folder: Path, epochs: int, resume: Path | None = None, **options):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=0.3,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, batches(), ckpt_path=resume)
    return trainer


def plain_loop(model, optimizer, schedule, epochs: int, after_step=lambda: None) -> None:
    for _ in range(epochs):
        for i, rows in enumerate(batches()):
            (model(**rows).loss / 2).backward()
            if i % 2:
                # Lightning clips what the optimizer holds.
                held = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(held, 0.3)
                optimizer.step()
                after_step()
                optimizer.zero_grad()
                schedule.step()


@pytest.mark.parametrize("kind", MAKERS)
def test_equals_a_plain_loop_and_resumes(kind, tmp_path):
    module, other = Module(kind), Module(kind)
    found = other.configure_optimizers()
    plain_loop(other.model, found["optimizer"], found["lr_scheduler"]["scheduler"], 3)

    fit(module, tmp_path, 2).save_checkpoint(tmp_path / "two.ckpt")
    resumed = Module(kind)
    fit(resumed, tmp_path, 3, tmp_path / "two.ckpt")
    assert_same(dict(resumed.model.state_dict()), dict(other.model.state_dict()))
    fit(module, tmp_path, 3, tmp_path / "two.ckpt")
    assert_same(dict(module.model.state_dict()), dict(other.model.state_dict()))

    budget = resumed.model.constraint().budget
    exactly = kind in ("hook", "silo_by_silo")
    # Rows of words that never occur, and values that round to their seed, stay what they were.
    assert (1.0 if exactly else 0.8) * budget <= differing(resumed.model, without_head(resumed.seed)) <= budget
    resumed.model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(bert().to(MAKERS[kind][2]), tmp_path / "adapter")
    assert_same(weights(loaded.get_base_model()), weights(resumed.model.get_base_model()))


def without_head(seed):
    return {name: tensor for name, tensor in seed.items() if not name.startswith("classifier")}


def test_equals_the_dense_reference(tmp_path):
    module = Module("hook")
    fit(module, tmp_path, 2)
    torch.manual_seed(0)
    twin = Dense(bert(), module.model.constraint())
    head = [*twin.model.classifier.parameters()]
    rest = [p for p in twin.model.parameters() if all(p is not other for other in head)]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": head, "lr": 1e-3, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
    plain_loop(twin.model, optimizer, schedule, 2, twin.project)
    assert_same(without_head(weights(twin.model)), without_head_copies(module))


def without_head_copies(module: Module):
    return without_head(weights(module.model.get_base_model()))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions(precision, tmp_path):
    module = Module("silo_by_silo")
    trainer = fit(module, tmp_path, 1, precision=precision)
    assert trainer.global_step == 3
    with module.model.disable_adapter():
        now = {n.replace(".original_module", ""): t for n, t in weights(module.model.get_base_model()).items()}
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert_same(now, {name: tensor.to(dtype) for name, tensor in module.seed.items()})


def test_the_example(minilm, apart):
    script = Path(__file__).parents[2] / "examples" / "lightning_module.py"
    output = apart(run, script, "--epochs", "1", "--train-size", "160")
    assert "22,565 free parameters" in output
    after, loaded = re.findall(r"^(?:accuracy|saved, and put onto a fresh base): (0\.\d+)$", output, re.MULTILINE)
    # Eight intents, equally frequent.
    assert float(after) > 0.2
    assert after == loaded
