"""Many runs of one recipe: each point of its sweep with each seed, and before that an option chosen on validation data.

A sweep is a folder: `runs`, with a folder for each run; `summary.json` and `summary.md`; and until all is finished `cache`.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..delta.files import replace_text
from .config import at, digest, points, value_of
from .lab import CACHE
from .options import Recipe
from .processes import Pool, Run
from .record import ADAPTER, LOG, MODEL, results, write
from .search import best_place, in_series, next_places
from .summary import SUMMARY, TABLE, Group, first_figure, summarise, table, title


RUNS = "runs"
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

    def __post_init__(self) -> None:
        self.steps = self._steps()

    def _steps(self) -> Generator[list[Run], Records, None]:
        """Yields runs that may go side by side, and takes their records, None of what failed."""
        group = self.group
        if group.option is not None:
            scores: dict[int, float] = {}
            folders: dict[int, Path] = {}
            while places := next_places(scores, group.search.trials):
                trials = {place: self._run(in_series(group.start, place), group.search.seed, True) for place in places}
                records = yield list(trials.values())
                for place, trial in trials.items():
                    folders[place], record = trial.folder, records[trial]
                    # What diverges is worse than anything.
                    scores[place] = -math.inf if record is None else first_figure(record, "validation")
                    group.trials[in_series(group.start, place)] = scores[place]
                if max(scores.values()) == -math.inf:
                    return
            best = best_place(scores)
            group.chosen = in_series(group.start, best)
            for place in folders.keys() - {best}:
                for weights in (ADAPTER, MODEL):
                    shutil.rmtree(folders[place] / weights, ignore_errors=True)
        runs = {seed: self._run(group.chosen, seed) for seed in group.recipes}
        records = yield list(runs.values())
        for seed, run in runs.items():
            if (record := records[run]) is not None:
                group.records[seed] = record
                group.folders[seed] = run.folder

    def _run(self, value: float | None, seed: int, trial: bool = False) -> Run:
        group = self.group
        recipe = group.recipes.get(seed) or next(iter(group.recipes.values()))
        changes: dict[str, Any] = {"seed": seed}
        if group.option is not None:
            changes[group.option] = value
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


def groups(recipe: Recipe) -> list[Group]:
    """The points of a recipe's sweep, each with its seeds.

    Raises:
        ValueError: for an option or value that does not exist, or a search that starts at nothing.
    """
    found: dict[str, Group] = {}
    for point in points(recipe):
        run = at(recipe, point)
        searched = ("seed", run.search.option, "search.option", "search.trials", "search.seed")
        rest = {name: value for name, value in point.items() if name not in searched}
        start = value_of(run, run.search.option) if run.search.option else None
        if run.search.option and (isinstance(start, bool) or not isinstance(start, int | float) or not start > 0):
            raise ValueError(f"the search of {run.search.option} must start at a number above 0, not at {start!r}.")
        group = found.setdefault(repr(sorted(rest.items())), Group(rest, run.search, start or math.nan))
        group.recipes[run.seed] = run
    return list(found.values())


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
    with tqdm(total=sum(len(group.recipes) for group in todo), disable=None if progress else True, unit="run") as bar:
        _run_all([_Course(group, folder) for group in todo], Pool(workers, folder / CACHE), failures, bar, progress)
    summary = summarise(recipe, todo, failures, against)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / SUMMARY, summary)
    replace_text(folder / TABLE, table(summary) + "\n")
    if not failures:
        shutil.rmtree(folder / CACHE, ignore_errors=True)
    return summary


def _run_all(courses: list[_Course], pool: Pool, failures: dict[str, str], bar: tqdm, progress: bool) -> None:
    todo: deque[tuple[_Course, Run]] = deque()
    under_way: dict[Run, _Course] = {}

    def settle(course: _Course, run: Run, error: str | None, new: bool = True) -> None:
        course.records[run] = record = None if error else results(run.folder)
        course.waiting -= 1
        if error:
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
            bar.update(len(course.group.recipes))
            return
        course.waiting = len(runs)
        # A point that was begun goes before the next one.
        todo.extendleft((course, run) for run in reversed(runs) if not _finished(run))
        for run in runs:
            if _finished(run):
                settle(course, run, None, new=False)

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


def _finished(run: Run) -> bool:
    record = results(run.folder)
    return record is not None and set(run.recipe.evaluation.splits) <= record["metrics"].keys()


def _line(run: Run, record: dict[str, Any] | None, error: str | None) -> str:
    if record is None:
        return f"{run.title}: failed, see {run.folder / LOG}: {error}"
    split = run.recipe.evaluation.splits[0]
    return f"{run.title}: {split} {first_figure(record, split):.4f} in {record['seconds']['all']:.0f} s"
