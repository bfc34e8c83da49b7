"""Time of the fused AdamW step under the constraint on a GPU, as a ratio to torch's fused AdamW on the same tensors.

    python -m benchmarks.gpu_step --json benchmarks/results/gpu_step.json

Only the optimizer's step is timed, on random weights and gradients; no model is run. By default 1 B parameters in 48
silos of six tensors each. Both optimizers hold float32 moments of their own: with 16-bit weights, torch's is given
float32 weights and gradients (a master copy, whose rounding to 16 bits is not counted), as mixed precision training has
it, and also 16-bit everything for comparison. Steps of all are timed in turn with CUDA events.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from peft_dst.core.kernels import AdamWTensor, adamw_scalars, adamw_step, available

from . import common


LR, BETAS, EPS = 1e-4, (0.9, 0.999), 1e-8


def surroundings() -> dict[str, Any]:
    """Versions and machine, of the GPU."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
    }


def shapes(parameters: int, silos: int) -> list[list[tuple[int, ...]]]:
    """Silos of about equal size, as an attention and its norms have them: four square matrices, two vectors."""
    width = max(16, round(math.sqrt(parameters / silos / 4) / 16) * 16)
    return [[(width, width)] * 4 + [(width,)] * 2 for _ in range(silos)]


def random_like(layout: list[list[tuple[int, ...]]], scale: float, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    return [[(scale * torch.randn(shape, device="cuda")).to(dtype) for shape in silo] for silo in layout]


def plain(layout: list[list[tuple[int, ...]]], dtype: torch.dtype) -> Callable[[], None]:
    """A step of torch's fused AdamW."""
    weights = [w.requires_grad_() for silo in random_like(layout, 0.02, dtype) for w in silo]
    for weight, grad in zip(weights, (g for silo in random_like(layout, 1e-3, dtype) for g in silo), strict=True):
        weight.grad = grad
    return torch.optim.AdamW(weights, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True).step


class Constrained:
    """A step under the constraint. Noise on the gradients is drawn anew between steps, outside the timing."""

    def __init__(self, layout: list[list[tuple[int, ...]]], dtype: torch.dtype, epsilon: float, kind: str):
        self.kind, self.steps = kind, 0
        self.grads = random_like(layout, 1e-3, dtype)
        none = torch.empty(0, dtype=torch.int64, device="cuda")
        self.silos = [
            [
                AdamWTensor(
                    weight,
                    grad,
                    torch.zeros_like(weight, dtype=torch.float32),
                    torch.zeros_like(weight, dtype=torch.float32),
                    adamw_scalars(LR, BETAS, EPS, 0.0, 1),
                    none,
                    none.to(dtype),
                    none.float(),
                )
                for weight, grad in zip(weights, grads, strict=True)
            ]
            for weights, grads in zip(random_like(layout, 0.02, dtype), self.grads, strict=True)
        ]
        self.budgets = [round(epsilon * sum(t.weight.numel() for t in silo)) for silo in self.silos]
        self.churn = 0.0

    def step(self) -> None:
        self.steps += 1
        scalars = adamw_scalars(LR, BETAS, EPS, 0.0, self.steps)
        results = adamw_step(self.silos, self.budgets, self.kind)
        self.silos = [
            [
                AdamWTensor(t.weight, t.grad, t.exp_avg, t.exp_avg_sq, scalars, indices, seeds, values)
                for t, indices, seeds, values in zip(
                    silo, result.selection.indices, result.seeds, result.values, strict=True
                )
            ]
            for silo, result in zip(self.silos, results, strict=True)
        ]

    def fresh_gradients(self) -> None:
        """Half of the last gradient and as much noise: neither a subset at rest nor one chosen by chance."""
        for silo in self.grads:
            for grad in silo:
                grad.mul_(0.5).add_(torch.randn_like(grad), alpha=5e-4)

    def note_churn(self, before: list[list[AdamWTensor]]) -> None:
        """Share of the subset that the last step replaced; call outside the timing."""
        came = total = 0
        for silo, old in zip(self.silos, before, strict=True):
            for new, last in zip(silo, old, strict=True):
                came += int((~torch.isin(new.indices, last.indices)).sum())
                total += new.indices.numel()
        self.churn = came / max(total, 1)


def milliseconds(step: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def compare(layout: list[list[tuple[int, ...]]], dtype: torch.dtype, epsilon: float, args: argparse.Namespace) -> dict:
    """One row of the results."""
    constrained = Constrained(layout, dtype, epsilon, args.distance)
    rivals = {f"full_{str(d).removeprefix('torch.')}": plain(layout, d) for d in dict.fromkeys((torch.float32, dtype))}
    times: dict[str, list[float]] = {name: [] for name in ("dst", *rivals)}
    for turn in range(args.warmup + args.pairs):
        constrained.fresh_gradients()
        before = constrained.silos
        measured = {"dst": milliseconds(constrained.step)} | {name: milliseconds(s) for name, s in rivals.items()}
        if turn >= args.warmup:
            for name, value in measured.items():
                times[name].append(value)
    constrained.note_churn(before)
    medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    ratios = {
        f"ratio_to_{n}": statistics.median(a / b for a, b in zip(times["dst"], times[n], strict=True)) for n in rivals
    }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "epsilon": epsilon,
        "last_churn": constrained.churn,
        **medians,
        **ratios,
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--silos", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--distance", default="inverse_relative")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3, 1e-2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device: there is none here, or torch was built without CUDA.")
    if not available(torch.empty(0, device="cuda")):
        raise SystemExit("The kernels cannot run: install triton, and do not set TRITON_INTERPRET.")
    record = common.Record(args)
    torch.manual_seed(0)
    layout = shapes(int(args.parameters), args.silos)
    count = sum(math.prod(shape) for silo in layout for shape in silo)
    rows = []
    for name in args.dtypes:
        for epsilon in args.epsilons:
            rows.append(compare(layout, getattr(torch, name), epsilon, args))
            torch.cuda.empty_cache()
            print(
                ", ".join(
                    f"{key} {value:.3g}" if isinstance(value, float) else value for key, value in rows[-1].items()
                )
            )
    record.write(accelerator=surroundings(), count=count, rows=rows)


if __name__ == "__main__":
    main()
