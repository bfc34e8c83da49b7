"""Writes the counted and projected part of docs/distributed.md from the benchmark's JSON.

python -m benchmarks.distributed_report
"""

from __future__ import annotations

import argparse
import json

from . import RESULTS, ROOT
from .report import Results, environments, table, with_part
from .serving_report import percent


PAGE = ROOT / "docs" / "distributed.md"
BEGIN = "<!-- measured: python -m benchmarks.distributed_report -->\n"
NAME = "distributed"
# What the choice's communication may take of a step, by the projection.
SHARE_LIMIT = 0.01


def load() -> Results:
    """The committed results."""
    return json.loads((RESULTS / f"{NAME}.json").read_text())


def count_table(results: Results) -> str:
    rows = []
    for row in results["rows"]:
        counted = row["counted"]
        if "formula" not in row:
            rows.append([row["world"], "plain FSDP2", "", "", "", counted["messages"], counted["payload"], "", "", ""])
            continue
        way = row["through"] + (", ties" if row["ties"] else "") + (", float64" if row["wide"] else "")
        error = counted["payload"] / row["formula"]["payload"] - 1
        rows.append(
            [
                row["world"],
                way,
                f"{row['n']:,}",
                f"{row['epsilon']:g}",
                row["silos"],
                counted["messages"],
                f"{counted['payload']:,}",
                f"{row['formula']['payload']:,}",
                f"{100 * error:+.1f} %",
                f"{counted['sent']:,.0f}",
            ]
        )
    head = ["processes", "through", "n", "ε", "silos", "messages", "bytes handed over", "by the formula", "error",
            "bytes sent in a ring"]  # fmt: skip
    return table(head, rows)


def time_table(results: Results) -> str:
    timing = results["timing"]
    rows = []
    for name in ("plain", "hook", "DSTOptimizer"):
        found = timing[name]
        rows.append(
            [
                "plain FSDP2" if name == "plain" else name,
                f"{found['ms']:.0f}",
                f"{found['ratio']:.3f} × ({found['low']:.3f} to {found['high']:.3f})",
                f"{found['optimizer_ms']:.0f}",
                f"{found['communication_ms']:.0f} ({percent(found['communication_ms'] / found['ms'])})",
            ]
        )
    head = [
        "through",
        "step, ms",
        "/ plain (quartiles)",
        "`optimizer.step()`, ms",
        "of it in all-reduces, waiting included",
    ]
    return table(head, rows)


def projection_table(results: Results) -> str:
    rows = []
    for row in results["projections"]:
        for case, name in (("usual", ""), ("tied", ", ties")):
            found, share = row[case], row["share" if case == "usual" else "tied_share"]
            rows.append(
                [
                    f"{row['model']} on {row['gpus']} GPUs{name}",
                    row["silos"],
                    found["messages"],
                    f"{found['payload'] / 1e6:.2f} MB",
                    f"{found['sent'] / 1e6:.1f} MB",
                    f"{row['fsdp_sent'] / 1e9:.0f} GB",
                    f"{found['messages']} × {row['latency_us']:.0f} µs + {1e3 * found['sent'] / row['bandwidth']:.2f} ms "
                    f"= {row[f'{case}_ms']:.1f} ms",
                    f"{1000 * row['step_s']:,.0f} ms",
                    percent(share) + ("" if share <= SHARE_LIMIT else ", **more than 1 %**"),
                ]
            )
    head = ["", "silos", "messages", "handed over", "sent", "FSDP's own, sent", "time", "step", "share"]
    return table(head, rows)


def local_table(results: Results) -> str:
    rows = [
        [
            f"{row['model']} on {row['gpus']} GPUs",
            f"{row['n'] / row['gpus'] / 1e9:.2f} · 10⁹",
            f"{row['adamw_ms']:.1f} ms",
            percent(row["adamw_ms"] / 1000 / row["step_s"]),
        ]
        for row in results["projections"]
    ]
    return table(["", "components a GPU", "once through AdamW's tensors", "of the step"], rows)


def render(results: Results) -> str:
    """The part of the page, from the results alone."""
    timing = results["timing"]
    return "\n\n".join(
        [
            "### Counted",
            count_table(results),
            "### Time of two processes",
            f"A random Llama of {timing['n']:,} parameters, {timing['silos']} silos, ε = {timing['epsilon']:g}, float32, "
            f"fused AdamW, 4 × {results['options']['length']} tokens a process; {timing['world']} processes of one thread "
            f"share {results['machine']['cores']} cores, and talk through gloo. Medians of "
            f"{results['options']['rounds']} rounds.",
            time_table(results),
            "### Projected",
            projection_table(results),
            "What each GPU computes for the choice, by memory traffic alone: arithmetic, not measured, and as if launching "
            "kernels took no time:",
            local_table(results),
            "### Versions and machine",
            environments({NAME: results}),
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)  # fmt: skip
    PAGE.write_text(with_part(PAGE.read_text(), BEGIN, render(load())))


if __name__ == "__main__":
    main()
