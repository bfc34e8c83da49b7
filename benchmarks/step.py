"""Time of a training step under the constraint, as a ratio to full fine-tuning's, interleaved in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.step --json benchmarks/results/step.json

MiniLM-L6 with 32 x 32 random tokens, and a random model of GPT-2 small's size with 4 x 128; float32, fused AdamW. In each
round full fine-tuning, DST through the optimizer hook and through DSTOptimizer, and (MiniLM) a static subset take one
step each; the ratios are medians over rounds. The time within `optimizer.step()` is given too: there the difference lies,
and in the whole step the noise of the forward and backward passes may hide it.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from tqdm import tqdm

import peft_dst

from . import common


EPSILONS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# Up to here there is a limit to keep. The larger model, which takes longest, is measured there alone, without the static
# subset.
LIMITED = 1e-3
ADAMW = {"lr": 1e-4, "weight_decay": 0.0, "fused": True}


class Stepper:
    """A model with its optimizer; a call makes one training step and notes how long `optimizer.step()` took."""

    def __init__(self, model: nn.Module, make: Callable[..., torch.optim.Optimizer], batch: common.Batch):
        self.model, self.batch = model, batch
        self.optimizer = make([p for p in model.parameters() if p.requires_grad], **ADAMW)
        self.times: list[float] = []

    def __call__(self) -> None:
        self.model(**self.batch).loss.backward()
        self.times.append(common.seconds(self.optimizer.step))
        self.optimizer.zero_grad()


def steppers(make: Callable[[], nn.Module], batch: common.Batch, epsilon: float) -> dict[str, Stepper]:
    """What is compared: full fine-tuning first."""
    head = {"modules_to_save": ["pooler", "classifier"]} if "labels" in batch and batch["labels"].dim() == 1 else {}
    task = "SEQ_CLS" if head else "CAUSAL_LM"
    config = peft_dst.DSTConfig(epsilon=epsilon, task_type=task, **head)
    fixed = peft_dst.DSTConfig(epsilon=epsilon, selection="random", task_type=task, **head)
    optimizer = partial(peft_dst.DSTOptimizer, optimizer_cls=torch.optim.AdamW)
    return {
        "full": Stepper(make(), torch.optim.AdamW, batch),
        "hook": Stepper(get_peft_model(make(), config), torch.optim.AdamW, batch),
        "DSTOptimizer": Stepper(get_peft_model(make(), config), optimizer, batch),
        "static": Stepper(get_peft_model(make(), fixed), torch.optim.AdamW, batch),
    }


def measure(
    make: Callable[[], nn.Module], batch: common.Batch, epsilon: float, rounds: int, static: bool = True
) -> dict[str, Any]:
    torch.manual_seed(0)
    compared = steppers(make, batch, epsilon)
    if not static:
        del compared["static"]
    times = common.interleaved(compared, rounds, warmup=1)
    for name, stepper in compared.items():
        times[name]["optimizer_ms"] = 1000 * statistics.median(stepper.times[-rounds:])
    return times


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help=f"rounds with MiniLM, up to epsilon {LIMITED:g}")
    parser.add_argument("--further-rounds", type=int, default=5, help="rounds with MiniLM beyond that")
    parser.add_argument("--gpt2-rounds", type=int, default=7, help="rounds with the GPT-2-sized model")
    parser.add_argument("--toy", action="store_true", help="a tiny model, to try the program")
    args = parser.parse_args(arguments)
    common.quiet()
    record = common.Record(args)
    gpt2, words = partial(common.gpt2, args.toy), common.language_batch(4, 16 if args.toy else 128, 100)
    measured = [("GPT-2 small, 4 x 128", gpt2, words, epsilon, args.gpt2_rounds, False) for epsilon in (1e-4, 1e-3)]
    if not args.toy:
        texts = common.classification_batch(32, 32)
        for epsilon in EPSILONS:
            rounds = args.rounds if epsilon <= LIMITED else args.further_rounds
            measured.append(("MiniLM, 32 x 32", common.minilm, texts, epsilon, rounds, True))
    rows = []
    for case, make, batch, epsilon, rounds, static in tqdm(measured, unit="epsilon"):
        found = measure(make, batch, epsilon, rounds, static)
        rows.append({"case": case, "epsilon": epsilon, "rounds": rounds, **found})
        gc.collect()
    for row in rows:
        ratios = ", ".join(
            f"{name} {row[name]['ratio']:.3f}" for name in ("hook", "DSTOptimizer", "static") if name in row
        )
        print(f"{row['case']}, epsilon {row['epsilon']:g}: {ratios} x full fine-tuning ({row['full']['ms']:.0f} ms)")
    record.write(rows=rows)


if __name__ == "__main__":
    main()
