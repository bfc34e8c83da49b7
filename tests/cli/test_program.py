"""The command line as a whole: how it is called, its help, and the examples of its page."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from peft import PeftModel

from peft_dst.cli import app
from peft_dst.delta import Checkpoint
from tests.cli.conftest import bert_again
from tests.models import assert_same


PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


# As `python -m` does it, where nothing is installed that only recipes need.
MODULE = """
import runpy, sys
for name in ("datasets", "omegaconf", "sacrebleu", "seqeval", "sklearn"):
    sys.modules[name] = None
sys.argv[0] = "peft_dst"
runpy.run_module("peft_dst", run_name="__main__", alter_sys=True)
"""


def module(*arguments):
    command = [sys.executable, "-c", MODULE, *arguments]
    environment = {"PYTHONPATH": str(PAGE.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_entry_points(desk, run):
    done = module("verify", "my-adapter", "--base", "base")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"my-adapter is good: \d+ entries in \d+ tensors, 2 dense, and belongs to base.\n", done.stdout)
    # What the installed script calls.
    code, _, err = run("merge", "base", "nothing", "-o", "merged")
    assert code == 2
    assert "'nothing' does not exist" in err
    project = (PAGE.parent.parent / "pyproject.toml").read_text()
    assert 'peft-dst = "peft_dst.cli:main"' in project


def test_help_explains_every_command_with_an_example(run):
    code, out, _ = run("--help")
    assert code == 0
    commands = [command.name for command in app.registered_commands]
    assert commands == [
        *("inspect", "diff", "apply", "merge", "overlap", "pack", "unpack", "verify", "convert", "export"),
        *("train", "evaluate", "sweep", "report", "serve"),
    ]
    for command in commands:
        assert re.search(rf"^  {command} .*\.$", out, re.MULTILINE), command
        code, text, _ = run(command, "-h")
        assert code == 0
        assert f"Example: peft-dst {command} " in " ".join(text.split())
    assert "--install-completion" in out
    assert run("--version")[1].strip()
    assert run()[0] == 2
    assert run("nothing")[0] == 2


EXAMPLES = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("peft-dst ")
]


def test_the_pages_examples_run(desk, run, forkserver):
    """One after the other, in one folder."""
    assert {shlex.split(line)[1] for line in EXAMPLES} == {c.name for c in app.registered_commands} - {"apply", "serve"}
    for line in EXAMPLES:
        code, out, err = run(*shlex.split(line)[1:])
        assert code == 0, (line, err)
        assert out.strip(), line
    for adapter in ("extracted", "packed-adapter", "from-shira", "from-lora", "from-checkpoint"):
        PeftModel.from_pretrained(bert_again(), adapter)
    assert_same(dict(Checkpoint("merged")), dict(Checkpoint("dense")))


def test_the_examples_of_the_help_run(desk, run):
    for command in app.registered_commands:
        if command.name == "serve":
            # It runs until it is told to stop: tests/cli/test_serve.py.
            continue
        example = command.epilog.removeprefix("Example: peft-dst ")
        code, _, err = run(*shlex.split(example))
        assert code == 0, (example, err)
