"""Measurements of speed and memory; each module is a program of its own, run as `python -m benchmarks.<name>`.

* `selection` choosing a silo's subset, beside the optimizer step and `torch.topk`
* `step`      a whole training step, beside full fine-tuning
* `memory`    the peak of a training step, beside full fine-tuning, LoRA, SHiRA and Super-Tuning; `formulas` predicts it
* `scaling`   the cost in the number of components and of silos
* `iterative` the paper's tracked threshold: its errors and its cost (not part of `make bench`)
* `codec`     bits and time per coded index (not part of `make bench`)
* `precision` accuracy of bfloat16 weights on a real task (needs a data set)
* `switching` from one subset to another, beside a forward pass and how other methods switch (not part of `make bench`)
* `mixing`    batches of several subsets, beside one subset and switching (not part of `make bench`)
* `load`      a server with many clients and subsets: latencies, throughput, wrong answers (not part of `make bench`)
* `quantised` adapters served over quantised weights: accuracy and time (needs a data set, bitsandbytes and torchao)
* `distributed` what the choice sends between processes, counted and by formula, its time, and projections
* `serving_report` writes what was measured into docs/serving.md, with a plot
* `distributed_report` writes what was counted into docs/distributed.md
* `report`    writes docs/performance.md and its plot from their JSON

`make bench` runs them, one process each. `common` holds what they share.
"""

from pathlib import Path


ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
