"""Writes the measured part of docs/serving.md, and docs/serving.svg, from the benchmarks' JSON.

python -m benchmarks.serving_report
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import RESULTS, ROOT
from .report import Results, environments, panels, table, with_part


PAGE = ROOT / "docs" / "serving.md"
PLOT = ROOT / "docs" / "serving.svg"
BEGIN = "<!-- measured: python -m benchmarks.serving_report -->\n"
NAMES = ("switching", "mixing", "load")
# What a switch may take of a forward pass, and of the bare writes of its entries.
SWITCH_LIMITS = {1e-7: 0.01, 1e-6: 0.01, 1e-5: 0.01, 1e-4: 0.01, 1e-3: 0.02}
SCATTER_LIMIT = 2.0
MIXING_LIMIT = 0.9
OURS, IN_PEFT = "DeltaPool", "DST in PEFT, set_adapter"


def load() -> dict[str, Results]:
    """Name of a benchmark → its committed results."""
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in NAMES}


def percent(ratio: float) -> str:
    return f"{100 * ratio:.2g} %" if ratio < 1 else f"{100 * ratio:.0f} %"


def switching_table(results: Results) -> str:
    rows = []
    for row in results["rows"]:
        if row["epsilon"] is None:
            continue
        share = row[OURS]["ratio"]
        limit = SWITCH_LIMITS.get(row["epsilon"])
        kept = "" if limit is None else f"≤ {100 * limit:g} %" + ("" if share <= limit else ", **missed**")
        rows.append(
            [
                row["model"],
                f"{row['epsilon']:g}",
                f"{row['entries']:,}",
                f"{1000 * row[OURS]['ms']:.0f}",
                percent(share),
                kept,
                f"{row['of_scatter']:.1f} ×",
                percent(row[OURS]["ms"] / row["generate"]["ms"]) if "generate" in row else "",
                percent(row[IN_PEFT]["ratio"]),
            ]
        )
    head = ["model", "ε", "entries", "µs", "of a forward pass", "limit", "of the bare writes", "of 16 new tokens",
            "`set_adapter` in PEFT"]  # fmt: skip
    return table(head, rows)


def others_table(results: Results) -> str:
    rows = []
    for row in results["rows"]:
        if row["epsilon"] is None:
            found = {name: value["ratio"] for name, value in row.items() if isinstance(value, dict)}
            rows.append([row["model"], *(percent(found[name]) for name in others(results))])
    return table(["of a forward pass", *others(results)], rows)


def others(results: Results) -> list[str]:
    row = next(row for row in results["rows"] if row["epsilon"] is None)
    return [name for name, value in row.items() if isinstance(value, dict) and name not in ("forward", "generate")]


def mixing_table(results: Results) -> str:
    rows = []
    for row in results["rows"]:
        found = row["throughput"]
        best = max(found["mixed"], found["mixed, side by side"])
        rows.append(
            [
                row["model"],
                row["length"],
                f"{row['epsilon']:g}",
                f"{row['one subset']['ms']:.0f}",
                *(f"{found[way]:.2f}" for way in ("mixed", "mixed, side by side", "switching")),
                verdict_of(max(best, found["switching"])) if row["epsilon"] == 1e-4 else "",
            ]
        )
    head = ["model", "tokens", "ε", "one subset, ms", "mixed", "side by side", "switching", "better one"]
    return table(head, rows)


def verdict_of(throughput: float) -> str:
    return f"{throughput:.2f}, ≥ {MIXING_LIMIT:g}" + ("" if throughput >= MIXING_LIMIT else " **missed**")


def load_table(results: Results) -> str:
    rows = [
        [
            row["case"],
            row["requests"],
            row["errors"],
            f"{row['wrong']} of {row['checked']}",
            " / ".join(f"{row['first_token'][part]:.1f}" for part in ("p50", "p90", "p99")),
            " / ".join(f"{row['latency'][part]:.1f}" for part in ("p50", "p90", "p99")),
            f"{row['tokens_per_second']:.0f}",
            f"{row['throughput']:.2f}" if "throughput" in row else "1",
            f"{row['batches']}, {row['mixed_batches']}, {row['switches']}",
        ]
        for row in results["rows"]
    ]
    head = [
        "",
        "requests",
        "errors",
        "wrong answers",
        "first token, s (p50 / p90 / p99)",
        "whole answer, s",
        "tokens a second",
        "throughput",
        "batches, mixed, switches",
    ]
    return table(head, rows)


def render(results: dict[str, Results]) -> str:
    """What stands between the marks."""
    return "\n".join(
        [
            "",
            "A switch from one random subset to another and back in turn, for one sample of 24 tokens, on one thread of "
            "a CPU, each right after a forward pass of the same model (medians of ratios within a round, those to the bare "
            "writes, which are two calls of torch's `scatter_` into the same memory, and to 16 tokens ratios of medians; "
            "limits are ours):",
            "",
            switching_table(results["switching"]),
            "",
            "![Time of a switch relative to a forward pass, by epsilon](serving.svg)",
            "",
            "Others on the same models (LoRA r = 8 on all linear layers; SHiRA and Super-Tuning as large):",
            "",
            others_table(results["switching"]),
            "",
            "Throughput of a batch of 32 samples of 8 subsets, relative to a batch of one subset; GPT-2 reads its tokens "
            "and makes 8 new ones:",
            "",
            mixing_table(results["mixing"]),
            "",
            load_text(results["load"]),
            "",
            environments(results),
            "",
        ]
    )


def load_text(results: Results) -> str:
    options = results["options"]
    model = options["model"] or ("a tiny model" if options["toy"] else "a GPT-2-sized model")
    return (
        f"The server under load: {options['clients']} clients with {options['each']} requests each, {options['rounds']} "
        f"times, on {model} with {options['subsets']} subsets at ε = {options['epsilon']:g}, "
        f"{options['tokens']} new tokens each; some answers compared with what the model gives offline "
        "(`python -m benchmarks.load`; with deltas coming, going and being cut off in `tests/server/test_load.py`):\n\n"
        + load_table(results)
    )


def plot(results: Results, path: Path) -> None:
    """Time of a switch by epsilon."""
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    with panels(path, len(models), (3.2 * len(models), 3), sharey=True) as found:
        for axes, model in zip(found, models, strict=True):
            rows = [row for row in results["rows"] if row["model"] == model]
            own = [row for row in rows if row["epsilon"] is not None]
            for name, style in ((OURS, "o-"), ("scatter", ":"), (IN_PEFT, "s-")):
                label = {"scatter": "bare writes"}.get(name, name)
                axes.loglog(
                    [r["epsilon"] for r in own], [r[name]["ratio"] for r in own], style, markersize=3, label=label
                )
            for number, name in enumerate(others(results)):
                ratio = next(row for row in rows if row["epsilon"] is None)[name]["ratio"]
                axes.axhline(ratio, color=f"C{number + 3}", linewidth=0.8, linestyle="--", label=name)
            axes.set_title(model)
            axes.set_xlabel("ε")
        found[0].set_ylabel("switch / forward pass of 24 tokens")
        found[-1].legend(frameon=False, fontsize=6)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-plot", action="store_true", help="leave the plot as it is (it needs matplotlib)")
    args = parser.parse_args(arguments)
    results = load()
    PAGE.write_text(with_part(PAGE.read_text(), BEGIN, render(results)))
    if not args.no_plot:
        plot(results["switching"], PLOT)


if __name__ == "__main__":
    main()
