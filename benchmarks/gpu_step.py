"""Time of AdamW's step under the constraint on a GPU, as a ratio to torch's fused AdamW on the same tensors.

    python -m benchmarks.gpu_step --json benchmarks/results/gpu_step.json

`rows` are of the kernels alone, on random weights and gradients, by default 1 B parameters in 48 silos of six tensors
each. Both optimizers hold float32 moments of their own: with 16-bit weights, torch's is given float32 weights and gradients
(a master copy, whose rounding to 16 bits is not counted), as mixed precision training has it, and also 16-bit
everything for comparison. Steps of all are timed in turn with CUDA events.

`training` is of a random Llama of about as many parameters: full fine-tuning, the hook, DSTOptimizer with and without the
kernels, all with AdamW. Each takes two training steps in a round: one is timed as a whole, of the other `optimizer.step()`
alone, until the GPU has done it. Float32 models run under bfloat16 autocast.

`--device cpu --toy` tries the program without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import nn

import peft_dst
from peft_dst.core.adamw import AdamWOptions, AdamWTensor
from peft_dst.core.kernels import adamw_step, available, failure

from . import common


LR, BETAS, EPS = 1e-4, (0.9, 0.999), 1e-8


def surroundings(device: str) -> dict[str, Any]:
    """Versions and machine, of the GPU."""
    if device == "cpu":
        return {}
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
    """On the default device, which `main` sets."""
    return [[(scale * torch.randn(shape)).to(dtype) for shape in silo] for silo in layout]


def plain(layout: list[list[tuple[int, ...]]], dtype: torch.dtype) -> Callable[[], None]:
    """A step of torch's fused AdamW."""
    weights = [w.requires_grad_() for silo in random_like(layout, 0.02, dtype) for w in silo]
    for weight, grad in zip(weights, (g for silo in random_like(layout, 1e-3, dtype) for g in silo), strict=True):
        weight.grad = grad
    return torch.optim.AdamW(weights, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True).step


def options(step: int) -> AdamWOptions:
    return AdamWOptions(LR, *BETAS, EPS, 0.0, float(step))


class Constrained:
    """A step under the constraint. Noise on the gradients is drawn anew between steps, outside the timing."""

    def __init__(self, layout: list[list[tuple[int, ...]]], dtype: torch.dtype, epsilon: float, kind: str):
        self.kind, self.steps = kind, 0
        self.grads = random_like(layout, 1e-3, dtype)
        none = torch.empty(0, dtype=torch.int64)
        self.silos = [
            [
                AdamWTensor(
                    weight,
                    grad,
                    torch.zeros_like(weight, dtype=torch.float32),
                    torch.zeros_like(weight, dtype=torch.float32),
                    options(1),
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
        own = options(self.steps)
        results = adamw_step(self.silos, self.budgets, self.kind)
        self.silos = [
            [
                AdamWTensor(t.weight, t.grad, t.exp_avg, t.exp_avg_sq, own, indices, seeds, values)
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


def milliseconds(step: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        return 1000 * common.seconds(step)
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


def llama(parameters: int, dtype: torch.dtype) -> nn.Module:
    """A random Llama of about as many parameters, its head tied to its embeddings; a tiny one of less than a million."""
    width, vocabulary, layers = (2048, 32_000, 1) if parameters >= 1e6 else (32, 100, 1)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=max(layers, round((parameters - vocabulary * width) / (13 * width**2))),
        num_attention_heads=width // 16 if width < 128 else width // 128,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


class Trained:
    """A model with its optimizer."""

    def __init__(self, model: nn.Module, make: Callable[..., torch.optim.Optimizer], batch: common.Batch):
        self.model, self.batch = model, batch
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
        self.wide = next(model.parameters()).dtype == torch.float32

    def gradients(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.batch["input_ids"].device.type, torch.bfloat16, enabled=self.wide):
            loss = self.model(**self.batch).loss
        loss.backward()

    def whole(self) -> float:
        """Seconds of a training step."""
        return self._until_done(lambda: (self.gradients(), self.optimizer.step()))

    def alone(self) -> float:
        """Seconds of the optimizer's step within another one."""
        self.gradients()
        return self._until_done(self.optimizer.step)

    def _until_done(self, function: Callable[[], object]) -> float:
        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        wait()
        start = time.perf_counter()
        function()
        wait()
        return time.perf_counter() - start


def train(dtype: torch.dtype, epsilon: float, args: argparse.Namespace) -> dict[str, Any]:
    """One row of what is trained."""
    make = partial(llama, int(args.parameters), dtype)
    full = make()
    tokens = torch.randint(0, full.config.vocab_size, (args.batch, args.length))
    batch = {"input_ids": tokens, "labels": tokens}
    config = peft_dst.DSTConfig(epsilon=epsilon, distance=args.distance, task_type="CAUSAL_LM")
    adamw = torch.optim.AdamW
    by_kernels = available(tokens) or None
    compared = {
        "full": Trained(full, adamw, batch),
        "hook": Trained(get_peft_model(make(), config), adamw, batch),
        "DSTOptimizer": Trained(
            get_peft_model(make(), config),
            partial(peft_dst.DSTOptimizer, optimizer_cls=adamw, kernels=by_kernels),
            batch,
        ),
        "DSTOptimizer, kernels=False": Trained(
            get_peft_model(make(), config), partial(peft_dst.DSTOptimizer, optimizer_cls=adamw, kernels=False), batch
        ),
    }
    whole: dict[str, list[float]] = {name: [] for name in compared}
    alone: dict[str, list[float]] = {name: [] for name in compared}
    for turn in range(args.warmup + args.pairs):
        for name in compared if turn % 2 == 0 else reversed(compared):
            taken = compared[name].whole(), compared[name].alone()
            if turn >= args.warmup:
                whole[name].append(taken[0])
                alone[name].append(taken[1])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "epsilon": epsilon,
        "n": sum(p.numel() for p in compared["full"].model.parameters()),
        "kernels": bool(by_kernels),
        "step": common.summarised(whole),
        "optimizer": common.summarised(alone),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--silos", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--distance", default="inverse_relative")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3, 1e-2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=4, help="sequences of a training step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="some thousand parameters, one round")
    args = parser.parse_args(arguments)
    if args.toy:
        args.parameters, args.silos, args.pairs, args.warmup, args.batch, args.length = 5e3, 2, 1, 0, 1, 8
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device: there is none here, or torch was built without CUDA.")
    by_kernels = available(torch.empty(0, device=args.device))
    if args.device == "cuda" and not by_kernels:
        raise SystemExit(
            "The kernels cannot run: install triton and a C compiler, and do not set TRITON_INTERPRET "
            f"({failure(torch.empty(0, device=args.device).device)})."
        )
    common.quiet()
    record = common.Record(args)
    torch.manual_seed(0)
    layout = shapes(int(args.parameters), args.silos)
    count = sum(math.prod(shape) for silo in layout for shape in silo)
    rows: list[dict[str, Any]] = []
    training: list[dict[str, Any]] = []
    with torch.device(args.device):
        for name in args.dtypes:
            for epsilon in args.epsilons:
                if by_kernels:
                    rows.append(compare(layout, getattr(torch, name), epsilon, args))
                    _say(rows[-1])
                _forget()
                training.append(train(getattr(torch, name), epsilon, args))
                _say(
                    {f"{what} {k}": v["ratio"] for what in ("step", "optimizer") for k, v in training[-1][what].items()}
                )
                _forget()
    record.write(accelerator=surroundings(args.device), count=count, rows=rows, training=training)


def _say(row: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))


def _forget() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
