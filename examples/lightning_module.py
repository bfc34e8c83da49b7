"""A Dynamic Subset Tuning model in a LightningModule: nothing of it is special.

    python examples/lightning_module.py                       # a little data set that comes with the examples
    python examples/lightning_module.py --data DIR            # a folder with train.jsonl and test.jsonl

The delta is saved and put onto a fresh base, which then answers as the trained model did.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from typing import Any

import lightning
import torch
from datasets import disable_progress_bars
from peft import PeftModel, get_peft_model
from quickstart import BUNDLED, MINILM, load_task
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)
from transformers.utils import logging as transformers_logging

from peft_dst import DSTConfig, DSTOptimizer, parameter_groups


class Classifier(lightning.LightningModule):
    """A sequence classifier of which only a small subset of the weights, chosen at every step, and its head are trained."""

    def __init__(self, base: torch.nn.Module, epsilon: float, lr: float, head_lr: float):
        super().__init__()
        self.lr, self.head_lr = lr, head_lr
        config = DSTConfig(epsilon=epsilon, task_type="SEQ_CLS", modules_to_save=["pooler", "classifier"])
        self.model = get_peft_model(base, config).train()

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        right = self.model(**batch).logits.argmax(-1) == batch["labels"]
        self.log("accuracy", right.float().mean(), batch_size=len(right), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        # Any torch optimizer works. Lightning runs the forward and backward pass from within its step, where others hold
        # one more copy of the tuned weights; this one never does.
        groups = parameter_groups(self.model, lr=self.lr, head_lr=self.head_lr)
        optimizer = DSTOptimizer(groups, torch.optim.AdamW, lr=self.lr, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(BUNDLED / "support_intents"), help="folder with a data set")
    parser.add_argument("--epsilon", type=float, default=1e-3, help="fraction of free parameters (default: 1e-3)")
    parser.add_argument("--lr", type=float, default=2e-2, help="learning rate of the subset (default: 2e-2)")
    parser.add_argument("--head-lr", type=float, default=1e-3, help="learning rate of the dense head (default: 1e-3)")
    parser.add_argument("--train-size", type=int, default=2000, help="training examples at most (default: 2000)")
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing|.*does not have many workers|.*LeafSpec")

    lightning.seed_everything(0, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    task = load_task(args.data, tokenizer, args.train_size)
    options = {"num_labels": len(task.labels), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    classifier = Classifier(
        AutoModelForSequenceClassification.from_pretrained(MINILM, **options), args.epsilon, args.lr, args.head_lr
    )
    collate = DataCollatorWithPadding(tokenizer)
    train = DataLoader(task.train, batch_size=8, shuffle=True, collate_fn=collate)
    test = DataLoader(task.test, batch_size=60, collate_fn=collate)

    folder = tempfile.TemporaryDirectory()
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=5.0,
        default_root_dir=folder.name,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, train, test)
    print(f"\n{classifier.model.constraint().budget:,} free parameters")
    (trained,) = trainer.validate(classifier, test, verbose=False)
    print(f"accuracy: {trained['accuracy']:.3f}")

    classifier.model.save_pretrained(folder.name)
    base = AutoModelForSequenceClassification.from_pretrained(MINILM, **options)
    classifier.model = PeftModel.from_pretrained(base, folder.name)
    (loaded,) = trainer.validate(classifier, test, verbose=False)
    print(f"saved, and put onto a fresh base: {loaded['accuracy']:.3f}")
    folder.cleanup()


if __name__ == "__main__":
    main()
