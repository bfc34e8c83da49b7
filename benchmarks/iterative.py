"""How near the paper's tracked threshold (Alg. 2) keeps to the budget over the first steps, and what it costs.

    OMP_NUM_THREADS=1 python -m benchmarks.iterative --json benchmarks/results/iterative.json

MiniLM-L6 in float32 learns the question types of examples/data, with AdamW's full updates, everything but the pooler and
the classifier under the constraint. Every (m, r) has a training run of its own, projected with its own thresholds; the
exact choice is made beside it on the same Θ̂, for its error and its time. Both are timed in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_dst.core import Selection, allocate_budgets, partition, select
from peft_dst.core.iterative import mean_distance, select_iteratively

from .common import Record, minilm_folder


DATA = Path(__file__).parent.parent / "examples" / "data" / "question_types" / "train.jsonl"
KIND = "inverse_relative"
HEAD = ("pooler", "classifier")
# m, r and the first q': the exact threshold of the first step, or the mean distance.
RUNS = [(3, 2.0, "exact"), (3, 2.0, "mean"), (3, 1.1, "exact"), (5, 2.0, "exact"), (8, 2.0, "exact"), (12, 2.0, "mean")]


class Tuned:
    """A model and its data, one silo's tensors at a time."""

    def __init__(self, epsilon: float, batch: int, learning_rate: float):
        torch.manual_seed(0)
        rows = [json.loads(line) for line in DATA.read_text().splitlines()]
        names = sorted({row["label"] for row in rows})
        self.labels = torch.tensor([names.index(row["label"]) for row in rows])
        self.tokens = AutoTokenizer.from_pretrained(minilm_folder())(
            [row["text"] for row in rows], padding=True, return_tensors="pt"
        )
        self.model = AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(), num_labels=len(names), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ).train()
        parameters = dict(self.model.named_parameters())
        self.tuned = {name: p for name, p in parameters.items() if not any(part in name for part in HEAD)}
        head = [p for name, p in parameters.items() if name not in self.tuned]
        groups = [{"params": list(self.tuned.values()), "lr": learning_rate}, {"params": head, "lr": 1e-3}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.seeds = {name: p.detach().flatten().clone() for name, p in self.tuned.items()}
        self.silos = list(partition(list(self.tuned), "module_and_layer").values())
        sizes = [sum(self.seeds[name].numel() for name in names) for names in self.silos]
        self.budgets = allocate_budgets(sizes, epsilon=epsilon)
        self.batches = torch.Generator().manual_seed(0)
        self.batch = batch

    def step(self) -> float:
        """A full update; the loss before it."""
        at = torch.randint(len(self.labels), (self.batch,), generator=self.batches)
        loss = self.model(**{k: v[at] for k, v in self.tokens.items()}, labels=self.labels[at]).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def tensors(self, silo: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Θ0 and Θ̂."""
        return [self.seeds[name] for name in silo], [self.tuned[name].data.view(-1) for name in silo]

    def project(self, silo: list[str], selection: Selection) -> None:
        """Keep Θ̂ in the subset, put Θ0 back everywhere else."""
        for seed, live, kept in zip(*self.tensors(silo), selection.indices, strict=True):
            values = live[kept]
            live.copy_(seed)
            live[kept] = values


def timed(function: Callable[[], list[Selection]]) -> tuple[list[Selection], float]:
    start = time.perf_counter()
    result = function()
    return result, 1000 * (time.perf_counter() - start)


def errors(selections: list[Selection], budgets: list[int]) -> dict[str, float]:
    """|free − budget| / budget: of the whole model, of the worst silo, of the median one."""
    free = [sum(kept.numel() for kept in selection.indices) for selection in selections]
    silos = [abs(f - b) / b for f, b in zip(free, budgets, strict=True) if b]
    return {
        "total": abs(sum(free) - sum(budgets)) / sum(budgets),
        "worst": max(silos),
        "median": statistics.median(silos),
    }


def run(
    m: int, r: float, start: str, steps: int, epsilon: float, batch: int, learning_rate: float
) -> dict[str, object]:
    """Train with the tracked threshold; errors and times of it and of the exact choice at every step."""
    tuned = Tuned(epsilon, batch, learning_rate)
    thresholds: list[float | None] = [None] * len(tuned.silos)
    rows = []
    for t in range(steps):
        loss = tuned.step()
        silos = [tuned.tensors(silo) for silo in tuned.silos]
        if t == 0 and start == "mean":
            thresholds = [mean_distance(*silo, KIND) for silo in silos]

        def exact(silos=silos) -> list[Selection]:
            return [select(*silo, b, KIND) for silo, b in zip(silos, tuned.budgets, strict=True)]

        def iterative(silos=silos, thresholds=thresholds) -> list[Selection]:
            triples = zip(silos, tuned.budgets, thresholds, strict=True)
            return [select_iteratively(*silo, b, KIND, q, m, r) for silo, b, q in triples]

        found = {f.__name__: timed(f) for f in ((exact, iterative) if t % 2 else (iterative, exact))}
        row: dict[str, object] = {"step": t + 1, "loss": round(loss, 6)}
        for name, (selections, ms) in found.items():
            row[name] = {key: round(value, 6) for key, value in {**errors(selections, tuned.budgets), "ms": ms}.items()}
        rows.append(row)
        for silo, selection in zip(tuned.silos, found["iterative"][0], strict=True):
            tuned.project(silo, selection)
        thresholds = [float(selection.threshold) for selection in found["iterative"][0]]
    return {"m": m, "r": r, "start": start, "silos": len(tuned.silos), "budget": sum(tuned.budgets), "steps": rows}


def summary(result: dict[str, object], name: str) -> dict[str, float]:
    """Of the steps after the twentieth: the errors' medians and maxima, the share of steps below 1 % in total."""
    rows = [row[name] for row in result["steps"]]
    late = rows[20:] or rows
    figures = {
        "first": rows[0]["total"],
        "total_median": statistics.median(row["total"] for row in late),
        "total_max": max(row["total"] for row in late),
        "silo_median": statistics.median(row["median"] for row in late),
        "worst_median": statistics.median(row["worst"] for row in late),
        "worst_max": max(row["worst"] for row in late),
        "below_one_per_cent": sum(row["total"] < 0.01 for row in late) / len(late),
        "ms": statistics.median(row["ms"] for row in rows[1:]),
    }
    return {key: round(value, 6) for key, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--epsilon", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    record = Record(args)
    results = []
    for m, r, start in RUNS:
        result = run(m, r, start, args.steps, args.epsilon, args.batch, args.learning_rate)
        result["summary"] = {name: summary(result, name) for name in ("exact", "iterative")}
        results.append(result)
        print(f"m={m} r={r:g} from {start}, last loss {result['steps'][-1]['loss']:.3f}")
        for name, figures in result["summary"].items():
            print(f"  {name:<9}", ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    if args.json:
        head = json.dumps(record.head(), indent=1).removesuffix("\n}")
        # A run a line: fifty steps of it.
        runs = ",\n  ".join(json.dumps(result) for result in results)
        args.json.write_text(f'{head},\n "runs": [\n  {runs}\n ]\n}}\n')


if __name__ == "__main__":
    main()
