"""A pytest plugin that puts DST into the parametrisation of PEFT's tests, from outside.

It acts where pytest turns a function into test items (`pytest_generate_tests`): a `parametrize` mark over PEFT's methods
gets DST's twins of its rows in their place, whatever the list was called in the module and however it was made. Tests that
are written with LoRA and about any method (`expected.STAND_INS`) get a stand-in for `LoraConfig`. All others are left out.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from . import cases, expected


SOURCE = Path(os.environ["PEFT_SOURCE"])
# How tests say that they would need a file from the hub.
NO_HUB = (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    httpx.ConnectError,
)
NO_HUB_MESSAGES = ("We couldn't connect to", "Can't find 'adapter_config.json' at")


def _prepare_imports() -> None:
    """PEFT's tests import one another as `tests.…`, and a class of diffusers."""
    package = types.ModuleType("tests")
    package.__path__ = [str(SOURCE / "tests")]
    sys.modules["tests"] = package
    if importlib.util.find_spec("diffusers") is None:
        stub = types.ModuleType("diffusers")
        stub.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        stub.__dict__.update(__version__="0", StableDiffusionPipeline=object)
        sys.modules["diffusers"] = stub


_prepare_imports()


class _Everything(dict[str, int]):
    """PEFT's note of the models that were fetched before, and so are looked up in the cache only."""

    def __contains__(self, model: object) -> bool:
        return True

    def __missing__(self, model: str) -> int:
        return 1


def pytest_sessionstart() -> None:
    importlib.import_module("tests.testing_utils")._HUB_MODEL_ACCESSES = _Everything()


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name == "parametrize":
            names, rows = mark.args[:2]
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            if found := cases.twins(names, rows):
                marks[i] = pytest.mark.parametrize(names, found).mark


def _name(item: pytest.Item) -> str:
    """`module.py::Class::test[parameters]`."""
    return item.nodeid.rpartition("/")[2]


def _is_parametrised(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    return call is not None and any(cases.is_dst(value) for value in call.params.values())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [
        item
        for item in items
        if not expected.left_out(_name(item)) and (_is_parametrised(item) or expected.is_stand_in(_name(item)))
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    for item in kept:
        if failure := expected.failure(_name(item)):
            item.add_marker(pytest.mark.xfail(reason=failure.reason, strict=failure.everywhere))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    module: Any = getattr(item, "module", None)
    if _is_parametrised(item) or not hasattr(module, "LoraConfig"):
        return (yield)
    original, module.LoraConfig = module.LoraConfig, cases.stand_in
    try:
        return (yield)
    finally:
        module.LoraConfig = original


def _skip_without_hub() -> Iterator[Any]:
    try:
        return (yield)
    except Exception as error:
        if isinstance(error, NO_HUB) or str(error).startswith(NO_HUB_MESSAGES):
            pytest.skip("needs a file from the hub, which is not in the cache")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[Any]:
    return (yield from _skip_without_hub())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[Any]:
    return (yield from _skip_without_hub())


class _Summary:
    """Counts outcomes where the reports arrive, and judges expected failures that did not happen."""

    def __init__(self, judge: bool):
        self.judge = judge
        self.outcomes: Counter[str] = Counter()
        self.happened: Counter[expected.Failure] = Counter()
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        failure = expected.failure(report.nodeid.rpartition("/")[2])
        if report.skipped and hasattr(report, "wasxfail") and failure is not None:
            self.happened[failure] += 1
        elif report.skipped:
            self.outcomes["skipped"] += 1
            self.reasons[str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)] += 1
        elif report.failed:
            self.outcomes["unexpected"] += 1
        elif report.when == "call":
            self.outcomes["passed"] += 1

    @property
    def unmatched(self) -> list[expected.Failure]:
        missing = [f for f in expected.FAILURES if f.everywhere and not self.happened[f]]
        return missing if self.judge else []

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unmatched and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        write = terminalreporter.write_line
        terminalreporter.section("PEFT's tests against DST")
        total = sum(self.happened.values())
        write(
            f"{self.outcomes['passed']} passed, {total} expected failures, {self.outcomes['skipped']} skipped, "
            f"{self.outcomes['unexpected']} unexpected"
        )
        write("expected failures, by reason:")
        for failure in expected.FAILURES:
            if self.happened[failure]:
                where = failure.where and f" [{failure.where}]"
                write(f"  {self.happened[failure]:>4}  {failure.test}{where}: {failure.reason}")
        write("skipped, by reason:")
        for reason, count in self.reasons.most_common():
            write(f"  {count:>4}  {reason.removeprefix('Skipped: ')[:110]}")
        for failure in self.unmatched:
            write(f"UNEXPECTED: nothing failed as expected of {failure.test} [{failure.where}]: {failure.reason}")


def pytest_configure(config: pytest.Config) -> None:
    # A worker of pytest-xdist sees its own share only.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Summary(judge=bool(os.environ.get("PEFT_SUITE_WHOLE"))))
