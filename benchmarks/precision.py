"""Accuracy of bfloat16 weights on a real task: DSTOptimizer, and the plain hook, beside float32.

    python -m benchmarks.precision --data DIR --json benchmarks/results/precision.json

Trains MiniLM-L6 on 2,000 questions of a data set such as TREC (DIR holds train.jsonl and test.jsonl with a text and a
label) for two epochs, batches of 16, AdamW with a linear schedule and 10 % warm-up, gradients clipped at 5, pooler and
classifier densely at 1e-3; the same order of batches and the same fresh head for all ways of one seed.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars, load_dataset
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm

from peft_dst import DSTConfig, DSTOptimizer, create_dst_optimizer, parameter_groups

from .common import Record, minilm_folder, parser, quiet


WAYS = {
    "float32, hook": (torch.float32, False),
    "float32, DSTOptimizer": (torch.float32, True),
    "bfloat16, DSTOptimizer": (torch.bfloat16, True),
    "bfloat16, hook": (torch.bfloat16, False),
}


def rows(folder: Path, train_size: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Tokenised training and test rows, and the number of labels."""
    disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    parts = load_dataset("json", data_files={name: str(folder / f"{name}.jsonl") for name in ("train", "test")})
    labels = sorted(set(parts["train"]["label"]))

    def encode(part: Any) -> list[dict[str, Any]]:
        encoded = tokenizer(list(part["text"]), truncation=True, max_length=128)
        numbers = [labels.index(label) for label in part["label"]]
        return [{"input_ids": t, "labels": n} for t, n in zip(encoded["input_ids"], numbers, strict=True)]

    train = parts["train"].shuffle(seed=0)
    return encode(train.select(range(min(train_size, len(train))))), encode(parts["test"]), len(labels)


def collate(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    tokens = [torch.tensor(row["input_ids"]) for row in some]
    padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-1)
    labels = torch.tensor([row["labels"] for row in some])
    return {"input_ids": padded.clamp(min=0), "attention_mask": (padded >= 0).long(), "labels": labels}


def accuracy(model: nn.Module, test: list[dict[str, Any]]) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(test), 100):
            batch = collate(test[start : start + 100])
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    model.train()
    return right / len(test)


def tune(way: str, seed: int, train: list[dict[str, Any]], labels: int, options: Any) -> PeftModel:
    """Train one model."""
    dtype, silo_by_silo = WAYS[way]
    torch.manual_seed(seed)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm_folder(), num_labels=labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = DSTConfig(epsilon=options.epsilon, task_type="SEQ_CLS", modules_to_save=["pooler", "classifier"])
    model = get_peft_model(base.to(dtype), config)
    if silo_by_silo:
        groups = parameter_groups(model, lr=options.lr, head_lr=options.head_lr)
        optimizer = DSTOptimizer(groups, torch.optim.AdamW, lr=options.lr, fused=True)
    else:
        optimizer = create_dst_optimizer(model, lr=options.lr, head_lr=options.head_lr, fused=True)
    per_epoch = -(-len(train) // options.batch)
    total = options.epochs * per_epoch
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, total // 10, total)
    order = torch.Generator().manual_seed(seed)
    for _ in range(options.epochs):
        shuffled = torch.randperm(len(train), generator=order).tolist()
        for start in tqdm(range(0, len(train), options.batch), desc=f"{way}, seed {seed}", leave=False):
            batch = collate([train[i] for i in shuffled[start : start + options.batch]])
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model


def training_parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with the options of training."""
    arguments: argparse.ArgumentParser = parser(doc)
    folder = os.environ.get("PEFT_DST_DATA")
    default = Path(folder) / "trec" if folder else None
    arguments.add_argument("--data", type=Path, default=default, help="folder of the data set; $PEFT_DST_DATA/trec")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--train-size", type=int, default=2000)
    arguments.add_argument("--lr", type=float, default=2e-2)
    arguments.add_argument("--head-lr", type=float, default=1e-3)
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = training_parser(__doc__)
    arguments.add_argument("--epsilon", type=float, default=1e-3)
    options = arguments.parse_args(argv)
    if options.data is None:
        arguments.error("--data is needed: a folder with train.jsonl and test.jsonl, such as TREC's")
    quiet()
    record = Record(options)
    record.document["options"]["data"] = options.data.name
    train, test, labels = rows(options.data, options.train_size)
    results = []
    for way in WAYS:
        found = [accuracy(tune(way, seed, train, labels, options), test) for seed in range(options.seeds)]
        results.append({"way": way, "accuracies": found, "mean": statistics.mean(found)})
        print(f"{way:24s} {' '.join(f'{a:.3f}' for a in found)}  mean {results[-1]['mean']:.3f}", flush=True)
        record.write(rows=results, test_size=len(test))


if __name__ == "__main__":
    main()
