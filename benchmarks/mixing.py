"""Throughput of batches in which every sample may have another subset.

    OMP_NUM_THREADS=1 python -m benchmarks.mixing --json benchmarks/results/mixing.json

A batch of 32 samples through one base with `DeltaPool`: all of one subset, which stands in the weights ("one subset");
8 random subsets of a fraction epsilon each, four samples of each, in turns or side by side ("mixed", "mixed, side by
side"); and the same samples in 8 batches of 4, switching in between ("switching"). MiniLM classifies; a GPT-2-sized
model reads a prompt and continues it greedily. Everything is interleaved: throughput relative to "one subset" within a
round, medians over rounds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from peft_dst.serving import DeltaPool

from . import common
from .switching import random_delta


EPSILONS = (1e-5, 1e-4, 1e-3, 1e-2)
SUBSETS, EACH = 8, 4
NEW_TOKENS = 8


def ways(pool: DeltaPool, batch: common.Batch, call: Callable[..., Any]) -> dict[str, Callable[[], None]]:
    """Each way to put a batch through the model."""
    names = [f"subset{i % SUBSETS}" for i in range(SUBSETS * EACH)]

    def one() -> None:
        with pool.use("subset0"):
            call(**batch)

    def mixed(names: list[str]) -> None:
        with pool.mix(names):
            call(**batch)

    def switching() -> None:
        for i in range(SUBSETS):
            with pool.use(f"subset{i}"):
                call(**{key: tensor[i * EACH : (i + 1) * EACH] for key, tensor in batch.items()})

    return {
        "one subset": one,
        "mixed": partial(mixed, names),
        "mixed, side by side": partial(mixed, sorted(names)),
        "switching": switching,
    }


@torch.no_grad()
def measure(
    name: str, make: Callable[[], nn.Module], vocabulary: int, length: int, generates: bool, rounds: int, bar: tqdm
) -> list[dict[str, Any]]:
    """A row for each epsilon."""
    rows = []
    for epsilon in EPSILONS:
        torch.manual_seed(0)
        model: Any = make().eval().requires_grad_(False)
        call = model
        if generates:
            call = partial(model.generate, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        batch = {"input_ids": torch.randint(3, vocabulary, (SUBSETS * EACH, length))}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with DeltaPool(model) as pool:
            for i in range(SUBSETS):
                pool.add(f"subset{i}", random_delta(model, epsilon, i))
            gc.collect()
            # Hundreds of thousands of objects of imported modules, gone through at every collection.
            gc.freeze()
            found = common.interleaved(ways(pool, batch, call), rounds)
        throughput = {way: 1 / value["ratio"] for way, value in found.items() if way != "one subset"}
        rows.append(
            {"model": name, "epsilon": epsilon, "samples": SUBSETS * EACH, "length": length, **found,
             "throughput": throughput}
        )  # fmt: skip
        bar.update()
        bar.write(
            f"{name}, {length} tokens, epsilon {epsilon:g}: of {found['one subset']['ms']:.0f} ms of one subset, "
            + ", ".join(f"{way} {value:.2f}" for way, value in throughput.items())
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--toy", action="store_true", help="a tiny model alone: to see whether it runs")
    args = parser.parse_args(arguments)
    common.quiet()
    record = common.Record(args)
    cases: list[tuple[Any, ...]] = []
    if not args.toy:
        cases += [("MiniLM", common.minilm, 20000, length, False) for length in (16, 64)]
    gpt2 = partial(common.gpt2, args.toy)
    cases.append(("GPT-2 small's size", gpt2, 90 if args.toy else 50000, 8 if args.toy else 16, True))
    rows = []
    with tqdm(total=len(cases) * len(EPSILONS), unit="row", disable=None) as bar:
        for case in cases:
            rows += measure(*case, args.rounds, bar)
    record.write(rows=rows)


if __name__ == "__main__":
    main()
