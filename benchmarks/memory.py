"""Peak memory of a training step, beside full fine-tuning, LoRA, SHiRA and Super-Tuning, measured and predicted.

    OMP_NUM_THREADS=1 python -m benchmarks.memory --json benchmarks/results/memory.json

The model is as large as GPT-2 small (124 M parameters, random weights), the batch 4 x 128 tokens, epsilon 1e-3. Every
row runs in a fresh process and reports by how much its resident set grows above what it was before the model was built,
so weights, gradients, optimizer state, activations and temporaries all count. glibc is told to give freed memory back
at once, without which the resident set says nothing; a small model is trained before the start, so that code and
libraries do not count. The kernel's own high-water mark is reset before each phase of a step and read after it: nothing
is missed between samples. The first step is left out.

SHiRA has as many trainable parameters in each linear layer as LoRA with r = 8 has, Super-Tuning as many in total.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import peft_dst

from . import ROOT, common, formulas


#: Memory is given back as soon as it is freed, and there is one heap.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANK = 8
EPSILON = 1e-3


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_trained(model), lr=1e-4, weight_decay=0.0, fused=True)


def adafactor(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(_trained(model), lr=1e-4)


def dst_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return peft_dst.DSTOptimizer(_trained(model), torch.optim.AdamW, lr=1e-4, weight_decay=0.0, fused=True)


def dst_adafactor(model: nn.Module) -> torch.optim.Optimizer:
    return peft_dst.DSTOptimizer(_trained(model), torch.optim.Adafactor, release_gradients=True, lr=1e-4)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def full(model: nn.Module) -> nn.Module:
    return model


def dst(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft_dst.DSTConfig(epsilon=EPSILON, task_type=_task(model)))


def static(model: nn.Module) -> nn.Module:
    config = peft_dst.DSTConfig(epsilon=EPSILON, selection="random", task_type=_task(model))
    return peft.get_peft_model(model, config)


def _task(model: nn.Module) -> str:
    return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else "SEQ_CLS"


def lora(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear", task_type=_task(model)))


def shira(model: nn.Module) -> nn.Module:
    config = peft.ShiraConfig(r=RANK, target_modules="all-linear", random_seed=0, task_type=_task(model))
    # Its forward pass adds a sparse tensor to the weight, which torch can do in one dtype only.
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def super_tuning(model: nn.Module) -> nn.Module:
    weights = [m.weight for m in formulas.adapted(model)]
    share = sum(RANK * sum(w.shape) for w in weights) / sum(w.numel() for w in weights)
    config = peft.SupertuningConfig(sparsity=1 - share, target_modules="all-linear", task_type=_task(model))
    return peft.get_peft_model(model, config)


Row = tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module], torch.optim.Optimizer]]
ROWS: dict[str, Row] = {
    "full, AdamW": (full, adamw),
    "full, Adafactor": (full, adafactor),
    "LoRA r = 8, AdamW": (lora, adamw),
    "SHiRA, AdamW": (shira, adamw),
    "Super-Tuning, AdamW": (super_tuning, adamw),
    "DST hook, AdamW": (dst, adamw),
    "static subset, AdamW": (static, adamw),
    "DSTOptimizer(AdamW)": (dst, dst_adamw),
    "DSTOptimizer(Adafactor, release_gradients)": (dst, dst_adafactor),
}


def rows() -> list[str]:
    return list(ROWS)


def resident(field: str = "VmRSS") -> int:
    """A line of /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


@contextmanager
def phase(peaks: dict[str, int], name: str, start: int) -> Iterator[None]:
    """Note the largest resident set above `start` while the block runs."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark VmHWM
    yield
    peaks[name] = max(peaks.get(name, 0), resident("VmHWM") - start)


def train(
    row: str, dtype: torch.dtype, options: dict[str, int], steps: int, start: int
) -> tuple[nn.Module, dict[str, int]]:
    """Build the row's model, make `steps` steps; the model and the peak of each phase from the second step on."""
    wrap, make_optimizer = ROWS[row]
    torch.manual_seed(0)
    model = wrap(common.gpt2(toy=bool(options["toy"])).to(dtype))
    optimizer = make_optimizer(model)
    batch = common.language_batch(options["batch"], options["length"], model.config.vocab_size)
    peaks: dict[str, int] = {}
    for step in range(steps):
        if step == 1:
            peaks.clear()
        with phase(peaks, "forward", start):
            loss = model(**batch).loss
        with phase(peaks, "backward", start):
            loss.backward()
        with phase(peaks, "step", start):
            optimizer.step()
            optimizer.zero_grad()
    return model, peaks


def measure(row: str, dtype: str, options: dict[str, int]) -> dict[str, Any]:
    """In a process of its own: peaks of one row in bytes above the start, and the number of trained parameters."""
    train(row, DTYPES[dtype], {"batch": 1, "length": 8, "toy": 1}, 2, 0)
    gc.collect()
    start, files = resident(), resident("RssFile")
    model, peaks = train(row, DTYPES[dtype], options, options["steps"], start)
    trained = sum(parameter.numel() for parameter in _trained(model))
    return {"bytes": max(peaks.values()), "phases": peaks, "files": resident("RssFile") - files, "trained": trained}


def in_child(row: str, dtype: str, options: dict[str, int]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--child", json.dumps([row, dtype, options])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **MALLOC})
    if done.returncode:
        raise RuntimeError(f"{row} in {dtype} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def seven_billion() -> dict[str, Any]:
    """What the formulas give for a model that was not measured: Llama 2 7B, bfloat16, one sequence of 512 tokens."""

    def make() -> nn.Module:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig())  # the defaults are that model's

    shape = formulas.shape_of(make, torch.bfloat16, 1, 512, RANK, EPSILON)
    rows = {row: formulas.phases(row, shape) for row in formulas.FORMULAS}
    return {"model": "Llama 2 7B, bfloat16, batch 1 × 512", "shape": dataclasses.asdict(shape), "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--only", default="", help="measure only the rows whose name contains this")
    parser.add_argument("--toy", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--child", type=json.loads, help="used by the program itself")
    args = parser.parse_args(arguments)
    common.quiet()
    if args.child:
        print(json.dumps(measure(*args.child)))
        return
    record = common.Record(args)
    options = {"batch": args.batch, "length": args.length, "steps": args.steps, "toy": int(args.toy)}
    results, shapes = [], {}
    for dtype in args.dtypes:
        make = functools.partial(common.gpt2, args.toy)
        shape = formulas.shape_of(make, DTYPES[dtype], args.batch, args.length, RANK, EPSILON)
        shapes[dtype] = dataclasses.asdict(shape)
        for row in rows():
            if args.only in row:
                predicted = formulas.phases(row, shape)
                found = {"row": row, "dtype": dtype, **in_child(row, dtype, options)}
                found |= {"predicted": max(predicted.values()), "predicted_phases": predicted}
                results.append(found)
                # A toy model may fit into memory that the process had before.
                error = found["predicted"] / max(found["bytes"], 1) - 1
                print(f"{dtype:8} {row:44} {found['bytes'] / 1e9:.3f} GB, predicted {error:+.1%}", flush=True)
    constants = {"rank": RANK, "epsilon": EPSILON, **MALLOC}
    record.write(constants=constants, shapes=shapes, rows=results, prediction=seven_billion())


if __name__ == "__main__":
    main()
