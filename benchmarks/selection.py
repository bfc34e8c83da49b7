"""Time to choose a silo's subset, distances included, beside the optimizer step and `torch.topk` of ready distances.

    OMP_NUM_THREADS=1 python -m benchmarks.selection --json benchmarks/results/selection.json

One tensor of 16.8 M float32 entries, one thread. Fused AdamW has made a few steps on random gradients under the
constraint, as in training; timed is what follows the next one. In each round the optimizer step, the choice and `topk`
take turns; the ratios are medians over rounds of the ratio to the step. `tied` is the worst case: every component moved
equally far, as in the first step of Adam under the absolute distance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from peft_dst.core.distances import distance
from peft_dst.core.selection import select

from . import common


#: epsilon → the largest ratio to the optimizer step that we allow ourselves.
TARGETS = {1e-6: 1.3, 1e-5: 1.3, 1e-4: 1.3, 1e-3: 2.5, 1e-2: 6.0, 1e-1: 12.0, 0.5: 12.0}


def stepper(weight: Tensor) -> Callable[[], Any]:
    """A function that makes one fused AdamW step on `weight` (n,) with a gradient that stays the same."""
    parameter = torch.nn.Parameter(weight)
    parameter.grad = torch.randn_like(weight)
    return torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0, fused=True).step


def trained(n: int, budget: int, steps: int) -> tuple[Tensor, Tensor]:
    """A seed (n,) float32, and the update that stands before the choice after some constrained steps of AdamW."""
    seed = torch.randn(n) * 0.02
    parameter = torch.nn.Parameter(seed.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0, fused=True)
    direction = torch.randn(n)
    for step in range(steps):
        parameter.grad = torch.randn(n).add_(direction)
        optimizer.step()
        if step < steps - 1:
            live = parameter.data
            kept = select([seed], [live], budget, "inverse_relative").indices[0]
            parameter.data = seed.clone().index_copy_(0, kept, live[kept])
    return seed, parameter.data


def measure(name: str, seed: Tensor, updated: Tensor, budget: int, kind: str, rounds: int) -> dict[str, Any]:
    delta = distance(kind, seed, updated)
    functions = {
        "step": stepper(seed.clone()),
        "select": lambda: select([seed], [updated], budget, kind),
        "topk": lambda: delta.topk(budget),
    }
    times = common.interleaved(functions, rounds)
    return {"case": name, "n": seed.numel(), "epsilon": budget / seed.numel(), "budget": budget, **times}


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--n", type=int, default=1 << 24, help="components")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=4, help="steps of AdamW before the choice is timed")
    args = parser.parse_args(arguments)
    record = common.Record(args)
    torch.manual_seed(0)
    rows = []
    for epsilon, target in tqdm(TARGETS.items(), unit="epsilon"):
        budget = max(1, round(epsilon * args.n))
        seed, updated = trained(args.n, budget, args.steps)
        row = measure("training", seed, updated, budget, "inverse_relative", args.rounds)
        rows.append({**row, "epsilon": epsilon, "target": target})
    seed = torch.randn(args.n).mul_(0.02)
    for epsilon in (1e-4, 1e-2):
        # A seed of ± 2^-6 and a step of 2^-10 are exact: every distance is the same float.
        budget = max(1, round(epsilon * args.n))
        signs = seed.sign().mul_(2.0**-6)
        row = measure("tied", signs, signs + 2.0**-10, budget, "absolute", max(3, args.rounds // 3))
        rows.append({**row, "epsilon": epsilon, "target": None})
    for row in rows:
        ratio, topk, target = row["select"]["ratio"], row["topk"]["ratio"], row["target"]
        print(
            f"{row['case']:8} epsilon {row['epsilon']:g}: {ratio:.2f} x the step (target {target}), topk {topk:.1f} x"
        )
    record.write(rows=rows)


if __name__ == "__main__":
    main()
