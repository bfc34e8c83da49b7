"""What a report is made of: sweeps' summaries and single runs, read and checked."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import differences, make_recipe, value_of
from ..options import Recipe, SearchOptions
from ..record import RESULTS
from ..summary import RATE, Group, summarise, title
from ..summary import SUMMARY as SUMMARY_FILE
from ..sweep import RUNS
from .forms import DONE, NUMBER, POINT, RECORD, SUMMARY, Maybe, check, read


# Options that say how large what is trained is, and the one that is looked for rather than compared.
SIZES = ("method.epsilon", "method.num_free_parameters", "method.rank", "method.virtual_tokens")
# Methods whose size no budget decides.
OWN_SIZE = ("full", "head_only", "bitfit", "l1", "l2")


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: mean, standard deviation of the sample (None of a single one), and how many."""

    mean: float
    deviation: float | None = None
    count: int = 1


@dataclass(frozen=True)
class Point:
    """One point of a sweep, whose runs differ in their seed alone.

    Attributes:
        title: as in the summary.
        series: its options without what says how large it is, and without the learning rate.
        method: name of the method.
        budget: epsilon or a number of free parameters, in words; "" if it has a size of its own.
        rate: the learning rate, where the sweep varies it as an option.
        trials: learning rate → score on validation data, None of what failed; empty if none was searched.
        chosen: the searched option's value.
        seeds: of the finished runs; what follows is None or empty without one.
        quality: the figure that points are compared by.
        validation: the same figure's mean on validation data.
        metrics: split → name → figure.
        after_head: the same after the head's own training, before the body's.
        gap: of the figure that points are compared by, on the test split less that on training data.
        free: free parameters, the head aside.
        body: parameters of the model, the head aside.
        speed: steps per second of training.
        switching: seconds to put the subset into the weights.
        entries: kind of module → layer → how many of the subset are there, in the mean over seeds.
        steps: after which the subset was recorded.
        churn: for each of them the fraction of the subset that each other has.
        between_seeds: mean fraction of a seed's subset that another seed's has.
    """

    title: str
    series: str
    method: str
    budget: str
    rate: float | None
    trials: Mapping[float, float | None]
    chosen: float | None
    seeds: Sequence[int]
    quality: Spread | None = None
    validation: float | None = None
    metrics: Mapping[str, Mapping[str, Spread]] | None = None
    after_head: Mapping[str, Mapping[str, Spread]] | None = None
    gap: Spread | None = None
    free: int = 0
    body: int = 0
    speed: float | None = None
    switching: float | None = None
    entries: Mapping[str, Mapping[str, float]] | None = None
    steps: Sequence[int] = ()
    churn: Sequence[Sequence[float]] = ()
    between_seeds: float | None = None

    @property
    def label(self) -> str:
        """Series, budget and learning rate."""
        rate = "" if self.rate is None else f"learning rate {number_text(self.rate)}"
        return ", ".join(word for word in (self.series, self.budget, rate) if word)


@dataclass(frozen=True)
class Section:
    """What came of one sweep.

    Attributes:
        title: what it is.
        model: its name.
        task: its name and data.
        metric: name of the figure that points are compared by, None if no run is finished.
        split: of the data on which it was measured.
        points: in the sweep's order.
        overlaps: titles of points of one budget, and for each a row with the fraction of its subset that each one has.
        one_seed: whether entries and overlaps are those of first seeds alone, as in summaries of old, and not means.
        summary: the file's contents.
    """

    title: str
    model: str
    task: str
    metric: str | None
    split: str | None
    points: Sequence[Point]
    overlaps: Sequence[tuple[Sequence[str], Sequence[Sequence[float]]]]
    one_seed: bool
    summary: Mapping[str, Any]

    @property
    def measured(self) -> str:
        """What is compared: `test accuracy`."""
        return f"{self.split} {self.metric}"

    @property
    def done(self) -> list[Point]:
        """Points with a finished run."""
        return [point for point in self.points if point.quality is not None]

    @property
    def failures(self) -> Mapping[str, str]:
        return self.summary["failures"]

    def reference(self, method: str) -> Point | None:
        """The finished point of a method; of several the best on validation data, or the first."""
        found = [point for point in self.done if point.method == method]
        return max(found, key=lambda point: point.validation or 0.0, default=None)


def load(paths: Iterable[Path]) -> list[Section]:
    """Read what is to be reported.

    Args:
        paths: folders of sweeps, or their summary.json; folders of single runs, or their results.json. Runs of one task
            make a section together: those that differ in their seed alone are one point.

    Raises:
        ValueError: for what is none of them, with the file and what is wrong in it.
    """
    sections, runs = [], []
    for path in paths:
        file = _file(path)
        if file.name == RESULTS:
            runs.append(file)
        else:
            summary = read(file)
            name = file.parent.name if file.name == SUMMARY_FILE else file.stem
            sections.append(section(summary, f"{file}: ", name))
    return [*sections, *_of_runs(runs)]


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in (SUMMARY_FILE, RESULTS):
        if (path / name).is_file():
            return path / name
    if (path / RUNS).is_dir():
        finished = len([*(path / RUNS).glob(f"*/{RESULTS}")])
        raise ValueError(
            f"{path} is a sweep that has not come to its end, with {finished} finished runs: go on with it (peft-dst sweep "
            f"… --output {path}), or give those runs: {path / RUNS}/*/{RESULTS}."
        )
    raise ValueError(f"{path} holds neither {SUMMARY_FILE} (of peft-dst sweep) nor {RESULTS} (of peft-dst train).")


def _of_runs(files: Sequence[Path]) -> list[Section]:
    """Single runs, as if each task's were those of a sweep over the options in which they differ."""
    runs: dict[tuple[str, ...], list[tuple[Path, dict[str, Any], Recipe]]] = {}
    for file in files:
        record, recipe = _run(file)
        runs.setdefault((recipe.task.name, _source(vars(recipe.task))), []).append((file, record, recipe))
    sections = []
    for (name, data), members in runs.items():
        recipes = [recipe for _, _, recipe in members]
        varied = {option for recipe in recipes for option in differences(recipes[0], recipe)} - {"seed"}
        names = ["method.name", "method.epsilon", *sorted(varied - {"method.name", "method.epsilon"})]
        groups: dict[str, Group] = {}
        for file, record, recipe in members:
            point = {option: value for option in names if (value := value_of(recipe, option)) is not None}
            group = groups.setdefault(repr(point), Group(point, SearchOptions(), math.nan))
            if recipe.seed in group.recipes:
                raise ValueError(f"{file.parent} and {group.folders[recipe.seed]} hold the same run; give one of them.")
            group.recipes[recipe.seed], group.records[recipe.seed] = recipe, record
            group.folders[recipe.seed] = file.parent
        try:
            summary = summarise(recipes[0], [*groups.values()], {})
        except (KeyError, StopIteration) as error:
            where = ", ".join(str(file.parent) for file, _, _ in members[:3])
            raise ValueError(
                f"the runs in {where}, … were not measured alike: {error} is not in all of them."
            ) from None
        summary["recipe"]["title"] = ""
        sections.append(section(summary, "the runs: ", f"Runs of {name} on {data}"))
    return sections


def _source(task: Mapping[str, Any]) -> str:
    """A task's data, with the part of them that it is."""
    return " ".join(filter(None, [task["data"], task.get("subset")]))


def _run(file: Path) -> tuple[dict[str, Any], Recipe]:
    """A single run's results and recipe, checked."""
    record = read(file)
    check(record, RECORD, f"{file}: ")
    if empty := [split for split, figures in record["metrics"].items() if not figures]:
        raise ValueError(f"{file}: metrics.{empty[0]} holds no figures.")
    try:
        return record, make_recipe(record["recipe"], where="the recipe")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def section(summary: Any, where: str, name: str) -> Section:
    """What a summary says, checked.

    Args:
        summary: contents of its file.
        where: the file, a colon and a space.
        name: the title, if the recipe has none.

    Raises:
        ValueError: naming the file and what is missing or wrong.
    """
    check(summary, SUMMARY, where)
    summary = _with_nulls(summary)
    recipe = summary["recipe"]
    points = []
    for i, entry in enumerate(summary["points"]):
        place = f"{where}points[{i}]"
        if entry["seeds"]:
            check(entry, POINT | DONE, place)
            for splits in (entry["metrics"], entry.get("metrics_after_head") or {}):
                for spread in (spread for figures in splits.values() for spread in figures.values()):
                    spread.setdefault("deviation", None)
        points.append(_point(entry, recipe, summary["metric"], summary["split"], place))
    overlaps = []
    known = {point.title for point in points}
    for i, found in enumerate(summary.get("overlap") or []):
        titles = found["titles"]
        _check_square(found["shared"], len(titles), f"{where}overlap[{i}].shared")
        if unknown := set(titles) - known:
            raise ValueError(f"{where}overlap[{i}] names {min(unknown)!r}, which is none of the points.")
        overlaps.append((titles, found["shared"]))
    subsets = [
        *(entry["subset"] for entry in summary["points"] if entry.get("subset")),
        *(summary.get("overlap") or []),
    ]
    return Section(
        title=recipe.get("title") or name,
        model=recipe["model"]["name"],
        task=f"{recipe['task']['name']}, {_source(recipe['task'])}",
        metric=summary["metric"],
        split=summary["split"],
        points=points,
        overlaps=overlaps,
        one_seed=any(subset.get("seeds") is None for subset in subsets),
        summary=summary,
    )


def _with_nulls(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary in which what may lack is null."""
    points = [{"search": None, "chosen": None, "p": None, **entry} for entry in summary["points"]]
    return {"metric": None, "split": None, "against": None, **summary, "points": points}


def _point(
    entry: Mapping[str, Any], recipe: Mapping[str, Any], metric: str | None, split: str | None, where: str
) -> Point:
    options = entry["options"]
    method = str(options.get("method.name", recipe["method"]["name"]))
    others = {name: value for name, value in options.items() if name not in (*SIZES, RATE, "method.name")}
    rate = options.get(RATE)
    for i, trial in enumerate(entry["trials"]):
        if len(trial) != 2:
            raise ValueError(f"{where}.trials[{i}] must be a value and a score.")
        check(trial[0], NUMBER, f"{where}.trials[{i}][0]")
        check(trial[1], Maybe(NUMBER), f"{where}.trials[{i}][1]")
    point = Point(
        title=entry["title"],
        series=", ".join([method, *(_words(name, value) for name, value in others.items())]),
        method=method,
        budget=_budget(method, options, recipe["method"]),
        rate=rate if isinstance(rate, int | float) else None,
        trials=dict(entry["trials"]) if entry["search"] == RATE else {},
        chosen=entry["chosen"],
        seeds=entry["seeds"],
    )
    if not entry["seeds"]:
        return point
    if metric not in entry["metrics"].get(split, {}):
        raise ValueError(f"{where}.metrics lacks {metric!r} on the split {split!r}.")
    metrics = _spreads(entry["metrics"])
    subset, seconds = entry.get("subset") or {}, entry["seconds"]
    snapshots = subset.get("snapshots") or {"steps": [], "shared": []}
    _check_square(snapshots["shared"], len(snapshots["steps"]), f"{where}.subset.snapshots.shared")
    on_validation = metrics.get("validation", {}).get(str(metric))
    trained = entry["steps"] and seconds.get("training")
    return replace(
        point,
        quality=metrics[str(split)][str(metric)],
        validation=on_validation.mean if on_validation else None,
        metrics=metrics,
        after_head=_spreads(entry.get("metrics_after_head") or {}),
        gap=_gap(entry["metrics"], str(metric)),
        free=entry["free_parameters"],
        body=entry["body_parameters"],
        speed=entry["steps"] / seconds["training"] if trained else None,
        switching=seconds.get("switching"),
        entries=subset.get("entries"),
        steps=snapshots["steps"],
        churn=snapshots["shared"],
        between_seeds=entry.get("seeds_share"),
    )


def _spreads(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Spread]]:
    return {
        name: {key: Spread(found["mean"], found["deviation"], len(found["values"])) for key, found in figures.items()}
        for name, figures in metrics.items()
    }


def _gap(metrics: Mapping[str, Mapping[str, Any]], metric: str) -> Spread | None:
    """Seed by seed; None where one of the two was not measured."""
    values = [metrics.get(split, {}).get(metric, {}).get("values", ()) for split in ("test", "train")]
    gaps = [test - train for test, train in zip(*values, strict=False)]
    if not gaps or len({len(found) for found in values}) > 1:
        return None
    return Spread(statistics.fmean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else None, len(gaps))


def _words(name: str, value: Any) -> str:
    """An option as a name has it: `coefficient=0.1`, but `module_and_layer`, which says itself what it is."""
    itself = isinstance(value, str) and value != "none"
    return value if itself else title({name: value})


def _budget(method: str, options: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """In words; the options of the point count before those of the whole sweep."""
    given = {name: options.get(name, common.get(name.removeprefix("method."))) for name in SIZES}
    epsilon, number, *own = (value if isinstance(value, int | float) else None for value in given.values())
    if method in OWN_SIZE or any(size is not None for size in own):
        return ""
    return f"{number:,} free" if number is not None else f"ε = {number_text(epsilon)}" if epsilon is not None else ""


def number_text(number: float) -> str:
    """A budget or learning rate: `0.02`, `1e-4`."""
    if 0 < abs(number) < 0.001:
        digits, exponent = f"{number:e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{number:g}"


def _check_square(matrix: Sequence[Sequence[float]], size: int, where: str) -> None:
    if len(matrix) != size or any(len(row) != size for row in matrix):
        raise ValueError(f"{where} must have {size} rows of {size} numbers.")
