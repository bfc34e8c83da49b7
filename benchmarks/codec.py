"""Bits that a coded index takes, beside the entropy, and entries coded and read in a second.

    OMP_NUM_THREADS=1 python -m benchmarks.codec --json benchmarks/results/codec.json

Uniformly random positions: each component is one with probability epsilon, and the entropy is that of such a coin. 0.03 and
0.06 are where the code is furthest from it. Clustered ones lie in a matrix of 768 columns; the entropy beside them is again
that of the coin, of what one would pay without knowing that they are clustered. Seconds are of processor time, medians:
all of it is one thread's, and other work on the machine weighs less in it than in a clock's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from peft_dst.delta import MAX_COMPONENTS, decode_indices, encode_indices

from . import common


EPSILONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.06, 0.1)
COLUMNS = 768


def entropy(epsilon: float) -> float:
    """Bits per index that uniformly random positions cost at least."""
    rest = 1 - epsilon
    return (-epsilon * math.log2(epsilon) - rest * math.log2(rest)) / epsilon


def uniform(generator: np.random.Generator, k: int, epsilon: float) -> Tensor:
    return torch.from_numpy(np.cumsum(generator.geometric(epsilon, k)) - 1)


def clustered(generator: np.random.Generator, k: int) -> dict[str, tuple[Tensor, int]]:
    """Name → about k positions in rows of 768, and the components of the matrix."""

    def matrix(rows: int, share: np.ndarray) -> tuple[Tensor, int]:
        return torch.from_numpy(np.flatnonzero(generator.random((rows, COLUMNS)) < share)), rows * COLUMNS

    rows = k // 4 + 1
    lines = generator.random((rows, 1))
    columns = np.arange(COLUMNS) // 64 == 3
    # Rows and columns that differ as much as those of a trained model's subset: log-normal, of deviation 1.
    scales = [np.exp(generator.standard_normal(shape)) for shape in ((rows, 1), (1, COLUMNS))]
    return {
        "whole rows, one in a hundred": matrix(rows, lines < 0.01),
        "a tenth of one row in twenty": matrix(rows, 0.1 * (lines < 0.05)),
        "a tenth of 64 columns": matrix(rows, 0.1 * columns),
        "rows and columns of different weight": matrix(rows, 0.004 * scales[0] * scales[1]),
    }


def seconds(function: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def measure(case: str, positions: Tensor, n: int, rounds: int) -> dict[str, Any]:
    data = encode_indices(positions, n)
    if not torch.equal(decode_indices(data, n), positions):
        raise RuntimeError(f"{case}: not read back as it was written")
    k = len(positions)
    bits, least = 8 * len(data) / k, entropy(k / n)
    row = {"case": case, "epsilon": k / n, "k": k, "entropy": least, "bits": bits, "ratio": bits / least}
    speeds = {
        "encoded_per_s": k / seconds(lambda: encode_indices(positions, n), rounds),
        "decoded_per_s": k / seconds(lambda: decode_indices(data, n), rounds),
    }
    return {**row, **speeds}


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--k", type=int, nargs="+", default=[1000, 1 << 20, 1 << 24], help="positions")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record = common.Record(args)
    generator = np.random.default_rng(0)
    cases = [(k, epsilon) for k in args.k for epsilon in EPSILONS if k / epsilon < 0.99 * MAX_COMPONENTS]
    rows = []
    for k, epsilon in tqdm(cases, unit="case"):
        positions = uniform(generator, k, epsilon)
        row = measure("uniform", positions, max(round(k / epsilon), int(positions[-1]) + 1), args.rounds)
        # Its epsilon is that of the coin, not of how often it fell this way.
        least = entropy(epsilon)
        rows.append({**row, "epsilon": epsilon, "entropy": least, "ratio": row["bits"] / least})
    for name, (positions, n) in clustered(generator, min(max(*args.k, 1 << 12), 1 << 17)).items():
        rows.append(measure(name, positions, n, args.rounds))
    for row in rows:
        into, out = row["encoded_per_s"] / 1e6, row["decoded_per_s"] / 1e6
        print(
            f"{row['case']:37} epsilon {row['epsilon']:<7.3g} k {row['k']:>10,}: {row['bits']:5.2f} bits, "
            f"{row['ratio']:.3f} x the entropy; {into:.0f} M/s in, {out:.0f} M/s out"
        )
    record.write(rows=rows)


if __name__ == "__main__":
    main()
