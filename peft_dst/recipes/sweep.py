"""Many runs of one recipe: each point of its sweep with each seed, and before that an option chosen on validation data.

A sweep is a folder: `runs`, with a folder for each run; `summary.json` and `summary.md`; and until all is finished `cache`.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
import warnings
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..delta.files import replace_text
from ..tables import printable
from .cache import shared_cache
from .config import at, digest, is_integer, points, value_of
from .finished import without_predictions
from .options import AUTO, Recipe
from .processes import Pool, Run
from .record import ADAPTER, ERROR, LOG, MODEL, RESULTS, TRIAL, lacking, results, write
from .runner import tidy
from .search import best_place, in_series, next_places
from .summary import RATE, SUMMARY, TABLE, Group, first_figure, summarise, table, title


RUNS = "runs"
# Errors that speak against a value that was tried: training diverged. Any other says nothing about it.
DIVERGED = ("FloatingPointError", "NonFiniteDistanceError", "NonFiniteStepError")
# Characters of a run's folder that say what it is; a digest follows.
LONGEST = 80


Records = dict[Run, dict[str, Any] | None]


@dataclass
class _Course:
    """What is to be run for a group, step by step."""

    group: Group
    folder: Path
    steps: Generator[list[Run], Records, None] = field(init=False)
    waiting: int = 0
    records: Records = field(default_factory=dict)
    # Whether a run failed for a reason that has nothing to do with its options; trials that failed because of them.
    lost: bool = False
    diverged: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.steps = self._steps()

    def _steps(self) -> Generator[list[Run], Records, None]:
        """Yields runs that may go side by side, and takes their records, None of what failed."""
        group = self.group
        tried: set[Path] = set()
        if group.option is not None:
            scores: dict[int, float] = {}
            while places := next_places(scores, group.search.trials):
                # A value that the option cannot have ends the series there.
                scores |= dict.fromkeys(places, -math.inf)
                trials = {place: trial for place in places if (trial := self._trial(place)) is not None}
                if not trials:
                    continue
                records = yield list(trials.values())
                for place, trial in trials.items():
                    tried.add(trial.folder)
                    figure = math.nan if (record := records[trial]) is None else first_figure(record, "validation")
                    # What diverges is worse than anything.
                    scores[place] = -math.inf if math.isnan(figure) else figure
                    group.trials[self._value(place)] = scores[place]
                # Without a trial that may have been the best nothing is chosen; it is tried again next time.
                if self.lost or max(scores.values()) == -math.inf:
                    return
            group.chosen = self._value(best_place(scores))
            group.at_the_edge = bool(next_places(scores, len(scores) + 1))
        runs = {seed: self._run(group.chosen, seed) for seed in group.recipes}
        for run in runs.values():
            (run.folder / TRIAL).unlink(missing_ok=True)
        for folder in tried - {run.folder for run in runs.values()}:
            _thin(folder)
        records = yield list(runs.values())
        for seed, run in runs.items():
            if (record := records[run]) is not None:
                group.records[seed] = record
                group.folders[seed] = run.folder

    def _value(self, place: int) -> float:
        """The searched option's value at a place of the series."""
        assert self.group.option is not None
        value = in_series(self.group.start, place)
        return int(value) if value % 1 == 0 and is_integer(self.group.option) else value

    def _trial(self, place: int) -> Run | None:
        """A run to choose by; None where the option cannot have that value."""
        try:
            trial = self._run(self._value(place), self.group.search.seed, True)
        except ValueError:
            if place == 0:
                raise
            return None
        # What is there already may be another sweep's.
        if not trial.folder.is_dir():
            trial.folder.mkdir(parents=True)
            (trial.folder / TRIAL).touch()
        return trial

    def _run(self, value: float | None, seed: int, trial: bool = False) -> Run:
        group = self.group
        recipe = group.recipes.get(seed) or next(iter(group.recipes.values()))
        changes: dict[str, Any] = {"seed": seed}
        if group.option is not None:
            changes[group.option] = value
        if trial:
            changes |= group.search.at
        recipe = at(recipe, changes)
        if trial:
            recipe = replace(recipe, evaluation=replace(recipe.evaluation, splits=["validation"]))
        name = title(group.point | changes)
        return Run(recipe, self._place(recipe, name), name)

    def _place(self, recipe: Recipe, name: str) -> Path:
        """The run's folder, that of before if there is one."""
        mark = digest(recipe)
        runs = self.folder / RUNS
        there = next(iter(sorted(runs.glob(f"*-{mark}"))), None)
        short = re.sub(r"[^\w.=,+-]+", "_", name.replace(", ", ","))[:LONGEST]
        return there or runs / f"{short}-{mark}"


def _thin(folder: Path) -> None:
    """Leave of a trial its figures alone, unless it has become a run since."""
    record = results(folder)
    if (folder / TRIAL).is_file() and record is not None and record["metrics"].keys() <= {"validation"}:
        for weights in (ADAPTER, MODEL):
            shutil.rmtree(folder / weights, ignore_errors=True)


def groups(recipe: Recipe) -> list[Group]:
    """The points of a recipe's sweep, each with its seeds.

    Raises:
        ValueError: for an option or value that does not exist, a search that starts at nothing, a point of which it is not
            clear where its search starts, or points of different kinds of task.
    """
    found: dict[str, Group] = {}
    for point in points(recipe):
        run = at(recipe, point)
        searched = ("seed", run.search.option, "search.option", "search.trials", "search.seed", "search.at")
        rest = {name: value for name, value in point.items() if name not in searched}
        start = value_of(run, run.search.option) if run.search.option else None
        if run.search.option and (isinstance(start, bool) or not isinstance(start, int | float) or not start > 0):
            raise ValueError(f"the search of {run.search.option} must start at a number above 0, not at {start!r}.")
        if run.search.option:
            at(run, run.search.at)
        by_rule = point.get(RATE, recipe.training.learning_rate) == AUTO and run.search.option != RATE
        rule = run.training.learning_rate if by_rule else None
        new = Group(rest, run.search, math.nan if start is None else start, rule)
        group = found.setdefault(repr(sorted(rest.items())), new)
        if group.search != run.search or (start is not None and start != group.start):
            raise ValueError(
                f"the sweep has {title(rest)} twice, with {_search_of(group)} and with {_search_of(new)}: a search chooses "
                "among values itself. Give one value to start from, or set search.option=null to compare them."
            )
        group.recipes[run.seed] = run
    kinds = {run.task.name: None for group in found.values() for run in group.recipes.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"the sweep has tasks with figures of different kinds: {', '.join(kinds)}. Make a recipe for each; peft-dst "
            "overlap compares the subsets of several tasks."
        )
    return list(found.values())


def _search_of(group: Group) -> str:
    search = group.search
    elsewhere = f", search.at={search.at}" if search.at else ""
    return (
        f"{search.option}={group.start:g}, search.trials={search.trials}{elsewhere}" if search.option else "no search"
    )


def sweep(
    recipe: Recipe, folder: str | Path, *, workers: int = 1, progress: bool = False, against: str | None = None
) -> dict[str, Any]:
    """Run a recipe's sweep, or go on with it.

    Where the recipe searches, each point first tries values of that option with the search's seed, measured on the
    validation split alone, and takes the best. Only then is anything measured on other splits.

    Args:
        recipe: with its sweep and search.
        folder: of the sweep. A run that is finished there is not run again; others in it stay as they are.
        workers: processes that run side by side; 0 for none, which leaves the runs to this one.
        progress: tell of each run in a line on stderr, with a bar where that is a terminal.
        against: title of the point that the others are compared with; if not given, the one with the best mean on the
            validation split (or the first split that is measured).

    Returns:
        What stands in summary.json. Failed runs are named in it, and are run again next time.

    Raises:
        ValueError: for an option or value that does not exist, or an unknown `against`.
    """
    folder = Path(folder)
    todo = groups(recipe)
    titles = [title(group.point) for group in todo]
    if against is not None and against not in titles:
        raise ValueError(f"there is no point {against!r} to compare with; there are: {'; '.join(titles)}.")
    failures: dict[str, str] = {}
    total = sum(len(group.recipes) for group in todo)
    with shared_cache(folder) as cache:
        with tqdm(total=total, disable=None if progress else True, unit="run") as bar:
            _run_all([_Course(group, folder) for group in todo], Pool(workers, cache.folder), failures, bar, progress)
        summary = summarise(recipe, todo, failures, against)
        write(folder / SUMMARY, summary)
        replace_text(folder / TABLE, table(summary) + "\n")
        if not failures:
            cache.remove()
    return summary


def _run_all(courses: list[_Course], pool: Pool, failures: dict[str, str], bar: tqdm, progress: bool) -> None:
    todo: deque[tuple[_Course, Run]] = deque()
    under_way: dict[Run, _Course] = {}

    def settle(course: _Course, run: Run, error: str | None, new: bool = True) -> None:
        course.records[run] = record = None if error else results(run.folder)
        course.lost |= error is not None and not error.startswith(DIVERGED)
        course.waiting -= 1
        if error and error == _divergence(run):
            course.diverged[run.folder.name] = error
        elif error:
            failures[run.folder.name] = error
        if new and progress:
            bar.write(_line(run, record, error), file=sys.stderr)
        if not course.waiting:
            advance(course)

    def advance(course: _Course) -> None:
        """The course's next step; what is finished there already counts at once."""
        given, course.records = course.records, {}
        try:
            runs = course.steps.send(given) if given else next(course.steps)
        except StopIteration:
            if not course.group.records:
                failures.update(course.diverged)
            bar.update(len(course.group.recipes))
            return
        course.waiting = len(runs)
        # A point that was begun goes before the next one.
        done = {run: error for run in runs if (error := _divergence(run)) or _finished(run)}
        todo.extendleft((course, run) for run in reversed(runs) if run not in done)
        for run, error in done.items():
            settle(course, run, error, new=False)

    waiting = iter(courses)

    def take() -> Run | None:
        while not todo:
            if (course := next(waiting, None)) is None:
                return None
            advance(course)
        course, run = todo.popleft()
        under_way[run] = course
        return run

    for run, error in pool.go(take):
        settle(under_way.pop(run), run, error)


def _divergence(run: Run) -> str | None:
    """What ended a trial that diverged: that is what came of it, and it is not tried again."""
    if not (run.folder / TRIAL).is_file() or not (run.folder / ERROR).is_file():
        return None
    error = (run.folder / ERROR).read_text().strip()
    return error if error.startswith(DIVERGED) else None


def _finished(run: Run) -> bool:
    try:
        record = results(run.folder)
    except ValueError as error:
        kept = (run.folder / RESULTS).replace(run.folder / f"damaged_{RESULTS}")
        warnings.warn(f"{error} It is run again; the file is now {kept.name}.", stacklevel=2)
        return False
    if record is None or lacking(run.recipe, record) or without_predictions(run.recipe, record, run.folder):
        return False
    tidy(run.folder)
    return True


def _line(run: Run, record: dict[str, Any] | None, error: str | None) -> str:
    if record is None:
        log = run.folder / LOG
        return printable(f"{run.title}: failed{f', see {log}' if log.is_file() else ''}: {error}")
    split = run.recipe.evaluation.splits[0]
    return f"{run.title}: {split} {first_figure(record, split):.4f} in {record['seconds']['all']:.0f} s"
