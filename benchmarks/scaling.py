"""The cost of the constraint in the number of components, and in the number of silos.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling --json benchmarks/results/scaling.json

Steps of fused AdamW on matrices with random gradients, without a model around them: plain, and under the constraint
through the hook; and the choice alone. First one silo of 1 M to 256 M components, then 16 M components in 1 to 4,096
silos. The cost is the constrained step's time less the plain one's, per round; the slope in the number of silos is the
constant that each silo costs.
"""

from __future__ import annotations

import copy
import gc
import statistics
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from tqdm import tqdm

import peft_dst
from peft_dst.core.selection import select

from . import common


class Matrices(nn.Module):
    """`count` square matrices of about `n` components in all."""

    def __init__(self, n: int, count: int):
        super().__init__()
        side = round((n / count) ** 0.5)
        self.linears = nn.ModuleList(nn.Linear(side, side, bias=False) for _ in range(count))


def stepper(model: nn.Module, gradients: list[torch.Tensor]) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)


def measure(n: int, silos: int, epsilon: float, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = Matrices(n, silos)
    seeds = [p.data.flatten().clone() for p in plain.parameters()] if silos == 1 else []
    gradients = [torch.randn_like(p) for p in plain.parameters()]
    config = peft_dst.DSTConfig(epsilon=epsilon, siloing="parameter", target_modules=r"linears\.\d+")
    tuned = get_peft_model(copy.deepcopy(plain), config)  # the constraint lives as long as the model does
    constrained = stepper(tuned, gradients)
    unconstrained = stepper(plain, gradients)
    times = {"plain": [], "hook": [], "select": []}
    for turn in range(rounds + 1):
        steps = [("plain", unconstrained.step), ("hook", constrained.step)]
        taken = {name: common.seconds(step) for name, step in (steps if turn % 2 == 0 else reversed(steps))}
        if silos == 1:
            # Θ̂ of the plain run: the same seeds, updated everywhere.
            live, budget = [p.data.flatten() for p in plain.parameters()], round(epsilon * n)
            taken["select"] = common.seconds(lambda live=live, k=budget: select(seeds, live, k, "inverse_relative"))
        if turn:
            for name, value in taken.items():
                times[name].append(value)
    cost = statistics.median(h - p for h, p in zip(times["hook"], times["plain"], strict=True))
    medians = {f"{name}_ms": 1000 * statistics.median(values) for name, values in times.items() if values}
    components = sum(p.numel() for p in plain.parameters())
    return {"n": components, "silos": silos, **medians, "cost_ms": 1000 * cost, "cost_ns": 1e9 * cost / components}


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1 << e for e in range(20, 29, 2)])
    parser.add_argument("--silos", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096])
    parser.add_argument("--n", type=int, default=1 << 24, help="components that are shared among the silos")
    parser.add_argument("--epsilon", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    record = common.Record(args)
    cases = [("size", n, 1) for n in args.sizes] + [("silos", args.n, silos) for silos in args.silos]
    rows = []
    for what, n, silos in tqdm(cases):
        rows.append({"varied": what, **measure(n, silos, args.epsilon, args.rounds)})
        gc.collect()
    for row in rows:
        print(f"{row['n']:>11,} in {row['silos']:>5,} silos: {row['cost_ms']:8.1f} ms, {row['cost_ns']:.2f} ns each")
    record.write(rows=rows)


if __name__ == "__main__":
    main()
