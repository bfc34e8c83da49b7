"""Writes docs/performance.md and docs/performance.svg from the benchmarks' JSON.

python -m benchmarks.report
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import RESULTS, ROOT
from .formulas import FORMULAS, LETTERS


PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "performance.svg"
TEXT = Path(__file__).with_name("performance.md.in")
NAMES = ("selection", "step", "memory", "scaling", "precision")
# What DST may need: the row of a way of training, and the one that it is held against.
LIMITS = {
    "DSTOptimizer(AdamW)": "full, AdamW",
    "DSTOptimizer(Adafactor, release_gradients)": "LoRA r = 8, AdamW",
    "static subset, AdamW": "LoRA r = 8, AdamW",
}
# What a step may take, as a ratio to full fine-tuning's, up to ε = 1e-3.
STEP_LIMITS = {"hook": 1.05, "DSTOptimizer": 1.10, "static": 1.05}
COMPARED = ("float32, hook", "bfloat16, DSTOptimizer")
# Where the part of a page that other modules write ends; each begins its own with a mark that names it.
END = "<!-- end of what was measured -->\n"

Results = dict[str, Any]


def load() -> dict[str, Results]:
    """Name of a benchmark → its committed results."""
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in NAMES}


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def verdict(value: float, limit: float | None) -> str:
    """The limit, and whether it is kept."""
    if limit is None:
        return "none"
    return f"≤ {limit:.3g}" if value <= limit else f"≤ {limit:.3g}, **missed**"


def selection_table(results: Results) -> str:
    rows = []
    for row in results["rows"]:
        choice, topk = row["select"], row["topk"]
        case = f"{row['epsilon']:g}" + (", all distances equal" if row["case"] == "tied" else "")
        beaten = choice["ratio"] <= topk["ratio"]
        rows.append(
            [
                case,
                f"{row['step']['ms']:.0f}",
                f"{choice['ms']:.0f}",
                f"{choice['ratio']:.2f} ×",
                verdict(choice["ratio"], row["target"]),
                f"{topk['ms']:.0f}" + ("" if beaten else ", **faster than ours**"),
            ]
        )
    head = ["ε", "AdamW step, ms", "choice, ms", "choice / step", "limit", "`torch.topk` of ready distances, ms"]
    return table(head, rows)


def step_table(results: Results) -> str:
    limits = STEP_LIMITS
    rows = []
    for row in results["rows"]:
        for name in limits:
            if name in row:
                full, found = row["full"], row[name]
                alone = 1 + (found["optimizer_ms"] - full["optimizer_ms"]) / full["ms"]
                rows.append(
                    [
                        row["case"],
                        f"{row['epsilon']:g}",
                        name,
                        f"{full['ms']:.0f}",
                        f"{found['ratio']:.3f} × ({found['low']:.3f} to {found['high']:.3f})",
                        verdict(found["ratio"], limits[name] if row["epsilon"] <= 1e-3 else None),
                        f"{full['optimizer_ms']:.0f} → {found['optimizer_ms']:.0f}",
                        f"{alone:.3f} ×",
                    ]
                )
    head = [
        "model, batch",
        "ε",
        "through",
        "full, ms",
        "DST / full (quartiles)",
        "limit",
        "`optimizer.step()`, ms",
        "from that alone",
    ]
    return table(head, rows)


def memory_table(results: Results) -> str:
    found = {(row["dtype"], row["row"]): row["bytes"] for row in results["rows"]}
    rows = []
    for row in results["rows"]:
        other = LIMITS.get(row["row"])
        against = f"≤ {other}: " if other else ""
        if other:
            against += "kept" if row["bytes"] <= found[row["dtype"], other] else "**missed**"
        error = row["predicted"] / row["bytes"] - 1
        predicted = f"{row['predicted'] / 1e9:.2f} ({100 * error:+.1f} %)"
        cells = [row["row"], row["dtype"], f"{row['trained']:,}", f"{row['bytes'] / 1e9:.2f}", predicted, against]
        rows.append(cells)
    return table(["", "weights", "`requires_grad`", "peak, GB", "formula, GB", "limit"], rows)


def written(formula: str) -> str:
    return formula.replace("*", "·")


def formula_table() -> str:
    rows = [
        [name, *(written(part) for part in (f.held, f.loss, f.backward, f.step)), f.why] for name, f in FORMULAS.items()
    ]
    return table(["", "throughout", "+ at the loss", "+ end of backward", "+ in the step", "because"], rows)


def letter_table(results: Results) -> str:
    shapes = [*results["shapes"].values(), results["prediction"]["shape"]]
    rows = [[letter, text, *(f"{int(s[name]):,}" for s in shapes)] for letter, (name, text) in LETTERS.items()]
    return table(["", "meaning", *results["shapes"], results["prediction"]["model"]], rows)


def prediction_table(results: Results) -> str:
    rows = []
    for name, phases in results["prediction"]["rows"].items():
        where = max(phases, key=phases.__getitem__)
        rows.append([name, f"{phases[where] / 1e9:.1f}", where])
    return table(["", "peak, GB", "at"], rows)


def size_table(results: Results) -> str:
    rows = [
        [f"{row['n']:,}", *(f"{row[key]:.0f}" for key in ("plain_ms", "hook_ms", "select_ms")), f"{row['cost_ns']:.2f}"]
        for row in results["rows"]
        if row["varied"] == "size"
    ]
    return table(
        ["components", "plain step, ms", "with the hook, ms", "choice alone, ms", "hook's cost, ns each"], rows
    )


def silo_table(results: Results) -> str:
    rows = [
        [f"{row['silos']:,}", f"{row['plain_ms']:.0f}", f"{row['hook_ms']:.0f}", f"{row['cost_ms']:.0f}"]
        for row in results["rows"]
        if row["varied"] == "silos"
    ]
    return table(["silos", "plain step, ms", "with the hook, ms", "hook's cost, ms"], rows)


def per_silo(results: Results) -> str:
    """Microseconds a silo: the slope between the fewest and the most silos."""
    rows = [row for row in results["rows"] if row["varied"] == "silos"]
    slope = (rows[-1]["cost_ms"] - rows[0]["cost_ms"]) / (rows[-1]["silos"] - rows[0]["silos"])
    return f"{1000 * slope:.0f}"


def precision_table(results: Results) -> str:
    rows = [
        [row["way"], " ".join(f"{a:.3f}" for a in row["accuracies"]), f"{row['mean']:.3f}"] for row in results["rows"]
    ]
    return table(["weights, through", "accuracy, a seed each", "mean"], rows)


def precision_errors(results: Results) -> str:
    """Two standard errors, of the test set's size and of the seeds: they answer different questions."""
    exact, ours = (next(row for row in results["rows"] if row["way"] == way) for way in COMPARED)
    sampled = (exact["mean"] * (1 - exact["mean"]) / results["test_size"]) ** 0.5
    variances = [statistics.variance(row["accuracies"]) / len(row["accuracies"]) for row in (exact, ours)]
    return (
        f"{exact['mean'] - ours['mean']:.3f} below float32; one standard error of an accuracy on "
        f"{results['test_size']} questions is {sampled:.3f}, that of the difference of the two means over seeds "
        f"{sum(variances) ** 0.5:.3f}"
    )


def environments(results: dict[str, Results]) -> str:
    rows = []
    for name, found in results.items():
        commit = found["commit"][:10] + (" and changes" if found["dirty"] else "")
        machine = (
            f"{found['machine']['cpu']}, {found['machine']['cores']} cores, {found['machine']['memory_gb']:.0f} GB"
        )
        versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
        rows.append([name, commit, machine, found["threads"], versions, f"{found['seconds']:.0f} s"])
    return table(["benchmark", "commit", "machine", "threads", "versions", "took"], rows)


def losses(results: dict[str, Results]) -> str:
    """Every limit that the results miss, one line each."""
    lines = []
    for row in results["selection"]["rows"]:
        ratio = row["select"]["ratio"]
        if row["target"] and ratio > row["target"]:
            lines.append(
                f"The choice at ε = {row['epsilon']:g} takes {ratio:.2f} × the step; {row['target']:g} × allowed."
            )
        if ratio > row["topk"]["ratio"]:
            case = "where all distances are equal" if row["case"] == "tied" else "in training"
            lines.append(f"`torch.topk` of ready distances is faster at ε = {row['epsilon']:g}, {case}.")
    for row in results["step"]["rows"]:
        for name, limit in STEP_LIMITS.items():
            if name in row and row["epsilon"] <= 1e-3 and row[name]["ratio"] > limit:
                ratio = f"{row[name]['ratio']:.3f}"
                lines.append(f"{row['case']}, ε = {row['epsilon']:g}, {name}: {ratio} × full; {limit:g} × allowed.")
    memory = {(row["dtype"], row["row"]): row for row in results["memory"]["rows"]}
    for (dtype, name), row in memory.items():
        if name in LIMITS and row["bytes"] > memory[dtype, LIMITS[name]]["bytes"]:
            lines.append(f"{name} in {dtype} needs more memory than {LIMITS[name]}.")
        if abs(row["predicted"] / row["bytes"] - 1) > 0.05:
            lines.append(f"The formula of {name} in {dtype} is more than 5 % off.")
    return "\n".join(f"- {line}" for line in lines) or "Every limit is kept in these results."


def render(results: dict[str, Results]) -> str:
    """The page, from the results alone."""
    parts = {
        "selection": selection_table(results["selection"]),
        "step": step_table(results["step"]),
        "step_rounds": (
            "{gpt2_rounds} rounds (GPT-2) and {rounds} (MiniLM; {further_rounds} where there is no limit)"
        ).format(**results["step"]["options"]),
        "memory": memory_table(results["memory"]),
        "formulas": formula_table(),
        "letters": letter_table(results["memory"]),
        "prediction": prediction_table(results["memory"]),
        "prediction_model": results["memory"]["prediction"]["model"],
        "size": size_table(results["scaling"]),
        "silos": silo_table(results["scaling"]),
        "per_silo": per_silo(results["scaling"]),
        "precision": precision_table(results["precision"]),
        "precision_errors": precision_errors(results["precision"]),
        "losses": losses(results),
        "environments": environments(results),
    }
    page = TEXT.read_text()
    for name, part in parts.items():
        page = page.replace("{{" + name + "}}", part)
    return page


def with_part(page: str, begin: str, part: str) -> str:
    """A page with this between the mark that begins a part of it and the end of that part.

    Raises:
        ValueError: one of the marks is missing.
    """
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"the page has no part from {begin.strip()!r} to {END.strip()!r}")
    return f"{before}{begin}{part}\n{END}{after}"


@contextlib.contextmanager
def panels(path: Path, count: int, size: tuple[float, float], **options: Any) -> Iterator[Sequence[Any]]:
    """Axes side by side, written as an SVG that is the same for the same results."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.use("svg")
    with mpl.rc_context(
        {"svg.hashsalt": "peft-dst", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure, axes = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False, **options)
        yield axes[0]
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def plot(results: dict[str, Results], path: Path) -> None:
    """Peak memory by method, and the choice's time by epsilon."""
    with panels(path, 2, (9, 3.2)) as (left, right):
        _plot_memory(left, results["memory"])
        _plot_selection(right, results["selection"])


def _plot_memory(axes: Any, results: Results) -> None:
    names = list(dict.fromkeys(row["row"] for row in results["rows"]))
    for offset, dtype, colour in ((-0.2, "float32", "#4878a8"), (0.2, "bfloat16", "#e08f3c")):
        peaks = {row["row"]: row["bytes"] / 1e9 for row in results["rows"] if row["dtype"] == dtype}
        places = [place + offset for place, name in enumerate(names) if name in peaks]
        axes.barh(places, [peaks[name] for name in names if name in peaks], height=0.38, label=dtype, color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("peak of a training step, GB")
    axes.legend(frameon=False)


def _plot_selection(axes: Any, results: Results) -> None:
    rows = [row for row in results["rows"] if row["case"] == "training"]
    epsilons = [row["epsilon"] for row in rows]
    for name, label in (("select", "choice, distances included"), ("topk", "torch.topk of ready distances")):
        axes.loglog(epsilons, [row[name]["ratio"] for row in rows], marker="o", markersize=3, label=label)
    axes.loglog(epsilons, [row["target"] for row in rows], "k--", linewidth=0.8, label="limit")
    axes.set_xlabel("ε")
    axes.set_ylabel("time / fused AdamW step")
    axes.legend(frameon=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-plot", action="store_true", help="leave the plot as it is (it needs matplotlib)")
    args = parser.parse_args(arguments)
    results = load()
    PAGE.write_text(render(results))
    if not args.no_plot:
        plot(results, PLOT)


if __name__ == "__main__":
    main()
