"""The house: imports point one way, and the core knows nothing of PEFT or transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "peft_dst"
# Each may import those before it.
ORDER = [
    "core",
    "delta",
    "mixing",
    "serving",
    "subsets",
    "tables",
    "config",
    "tuner",
    "extraction",
    "conversion",
    "baselines",
    "training",
    "analysis",
    "registration",
    "recipes",
    "server",
    "cli",
    "__init__",
    "__main__",
]
# The same of the modules of a folder.
INSIDE = {
    "tuner": [
        "entries",
        "overlay",
        "sums",
        "records",
        "states",
        "layer",
        "constraints",
        "bare",
        "targets",
        "settling",
        "exchange",
        "parallel",
        "mixed",
        "static",
        "weighted",
        "plan",
        "model",
        "hotswap",
        "rescale",
        "card",
        "saving",
        "__init__",
    ],
    "server/engine": ["requests", "loading", "desk", "companies", "plans", "halving", "rounds", "thread", "__init__"],
}
MAY_IMPORT = {
    "core": {"torch", "numpy"},
    "delta": {"torch", "numpy", "safetensors"},
    "mixing": {"torch"},
    "serving": {"torch", "numpy"},
    "subsets": {"torch", "numpy", "safetensors", "tqdm"},
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, dotted name) of every import of a file, also of those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name) for name in names]
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    depth = len(path.relative_to(PACKAGE).parts)
    for level, name in imports(path):
        if level == 0:
            assert name.split(".")[0] != "peft_dst", "import the package's own modules relatively"
        elif level == depth:
            assert ORDER.index(name.split(".")[0]) < ORDER.index(room(path))
        else:
            assert level < depth


def folder(path: Path) -> str:
    return path.parent.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", [p for p in FILES if folder(p) in INSIDE], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_imports_inside_a_folder_point_one_way(path):
    order = INSIDE[folder(path)]
    for level, name in imports(path):
        if level == 1:
            assert order.index(name.split(".")[0]) < order.index(path.stem)


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in MAY_IMPORT], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_core_imports_torch_and_little_else(path):
    allowed = MAY_IMPORT[room(path)] | sys.stdlib_module_names
    if path.name.endswith("_triton.py"):
        # Nothing imports it before a kernel is wanted: see the next test.
        allowed = allowed | {"triton"}
    assert {name.split(".")[0] for level, name in imports(path) if level == 0} <= allowed


def test_the_core_runs_without_the_framework():
    """Each part imported by itself, without the package's `__init__` (which registers with PEFT)."""
    code = (
        "import importlib, os, sys, types\n"
        f"parent = types.ModuleType('peft_dst'); parent.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['peft_dst'] = parent\n"
        # They import nothing else that takes long; each goes on from here in a process of its own.
        "import torch.distributed.tensor\n"
        f"for name in {sorted(MAY_IMPORT)}:\n"
        "    if child := os.fork():\n"
        "        assert os.waitpid(child, 0)[1] == 0, name\n"
        "        continue\n"
        "    importlib.import_module(f'peft_dst.{name}')\n"
        "    assert not {'peft', 'transformers', 'accelerate'} & set(sys.modules), name\n"
        "    assert not any(m.endswith('_triton') for m in sys.modules if m.startswith('peft_dst')), name\n"
        "    break\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
