"""Summaries of sweeps that nobody ran, as `peft-dst sweep` would write them."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from peft_dst.recipes import title
from peft_dst.recipes.report import data


BODY = 1_000_000
LAYERS = 4


def spread(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"values": values, "mean": statistics.fmean(values), "deviation": deviation}


def point(
    values: list[float],
    free: int,
    *,
    trials: list[list[float | None]] | None = None,
    chosen: float | None = None,
    entries: dict[str, dict[str, int]] | None = None,
    churn: list[list[float]] | None = None,
    seconds: float = 10.0,
    switching: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A point with test accuracies by seed; options as `method_epsilon=0.1`."""
    options = {name.replace("_", ".", 1): value for name, value in options.items()}
    subset = None if entries is None else {"entries": entries, "seeds": len(values)}
    if subset is not None and churn is not None:
        subset["snapshots"] = {"steps": [10 * (i + 1) for i in range(len(churn))], "shared": churn}
    made = {
        "title": title(options),
        "options": options,
        "search": "training.learning_rate" if trials else None,
        "trials": trials or [],
        "chosen": chosen,
        "seeds": list(range(len(values))),
    }
    if not values:
        return made
    return (
        made
        | {
            "metrics": {
                "validation": {"accuracy": spread([value - 0.01 for value in values])},
                "test": {"accuracy": spread(values), "macro_f1": spread([value - 0.02 for value in values])},
            },
            "p": None,
            "free_parameters": free,
            "body_parameters": BODY,
            "head_parameters": 1000,
            "file_bytes": 8 * free,
            "steps": 100,
            "seconds": {"preparation": 1.0, "training": seconds, "evaluation": 1.0, "all": seconds + 2.0}
            | ({} if switching is None else {"switching": switching}),
            "peak_memory": 1,
            "history": [],
        }
        | ({} if subset is None else {"subset": subset, "seeds_share": 0.4})
    )


def summary(points: list[dict[str, Any]], name: str = "A sweep", **others: Any) -> dict[str, Any]:
    return {
        "recipe": {
            "title": name,
            "model": {"name": "a-model"},
            "task": {"name": "classification", "data": "trec"},
            "method": {"name": "dynamic", "epsilon": None, "num_free_parameters": None},
        },
        "metric": "accuracy",
        "split": "test",
        "against": points[0]["title"] if points else None,
        "points": points,
        "overlap": [],
        "failures": {},
        "commit": "c0ffee",
        "versions": {"torch": "2.13.0"},
        "machine": {"system": "Linux", "accelerator": None},
    } | others


def everything(name: str = "Methods by size", seed: int = 0, few: bool = False) -> dict[str, Any]:
    """A sweep with figures for every picture: methods by budgets, searched learning rates, churn, overlaps."""
    rng = np.random.default_rng(seed)
    methods = {"dynamic": 1.0, "first_step": 1.6, "random": 5.0}
    if not few:
        methods |= {"magnitude": 3.2, "fisher": 1.8, "fisher_pretraining": 2.6, "combined": 1.4, "diff_pruning": 1.3}
    epsilons = (1e-3, 1e-2) if few else (1e-5, 1e-4, 1e-3, 1e-2)
    rates = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1]
    points, overlaps = [], []
    for epsilon in epsilons:
        free = round(epsilon * BODY)
        for method, slope in methods.items():
            quality = 0.95 - 0.01 * slope * max(0.0, -1.5 - math.log10(epsilon)) ** 1.5
            best = min(5, round(-math.log10(epsilon)))
            trials = [
                [rate, quality - 0.02 * abs(i - best) - 0.01] for i, rate in enumerate(rates) if abs(i - best) < 3
            ]
            if method == "random":
                trials[-1][1] = None
            whole = method in ("dynamic", "first_step")
            shares = (
                rng.dirichlet([5.0] * (2 * LAYERS + 1)) if not whole else np.full(2 * LAYERS + 1, 1 / (2 * LAYERS + 1))
            )
            counts = [int(count) for count in np.maximum(1, shares * free)]
            layers = [f"bert.encoder.layer.{i}" for i in range(LAYERS)]
            entries = {
                "embeddings": {"": counts[0]},
                "attention": dict(zip(layers, counts[1 : LAYERS + 1], strict=True)),
                "feed_forward": dict(zip(layers, counts[LAYERS + 1 :], strict=True)),
            }
            fall = 0.0 if method != "dynamic" else 0.04 - 0.01 * math.log10(epsilon)
            churn = [[round(1 - fall * abs(i - j) / (1 + 0.1 * max(i, j)), 4) for j in range(8)] for i in range(8)]
            points.append(
                point(
                    [float(quality + rng.normal(0, 0.004)) for _ in range(3)], free,
                    trials=trials, chosen=rates[best], entries=entries, churn=churn if whole else None,
                    seconds=float(10 + rng.normal(0, 0.3)), switching=1e-4 + 3e-8 * free,
                    method_name=method, method_epsilon=epsilon,
                )
            )  # fmt: skip
        same = rng.uniform(0.05, 0.5, (len(methods), len(methods)))
        shared = np.where(np.eye(len(methods)) == 1, 1.0, (same + same.T) / 2)
        overlaps.append(
            {"titles": [p["title"] for p in points[-len(methods) :]], "shared": shared.round(4).tolist(), "seeds": 3}
        )
        points.append(
            point([quality - 0.02 + float(rng.normal(0, 0.004)) for _ in range(3)], free * 2, seconds=8.0,
                  method_name="lora", method_epsilon=epsilon)
        )  # fmt: skip
    points.append(
        point([0.955, 0.948, 0.952], BODY, method_name="full", trials=[[1e-4, 0.94], [2e-4, 0.93]], chosen=1e-4)
    )
    points.append(point([0.61, 0.6, 0.59], 0, method_name="head_only", seconds=4.0))
    points.append(point([0.92, 0.915, 0.91], 2000, method_name="bitfit"))
    points.append(point([], 0, method_name="transfer", method_epsilon=1e-3))
    return summary(points, name, overlap=overlaps, failures={"transfer,epsilon=0.001-abc": "ValueError: no <source>"})


def section(*points: dict[str, Any], **others: Any) -> data.Section:
    """Those points as a report reads them."""
    return data.section(summary(list(points), **others), "here: ", "folder")


def write(path: Path, value: Any) -> Path:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path
