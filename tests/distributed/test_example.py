"""examples/fsdp2: what its README says is run on CPUs, in processes as the launchers would start them."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import socket
from pathlib import Path
from unittest import mock

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import multiprocessing

from tests.distributed.accelerated import admit_cpus


ROOT = Path(__file__).parents[2]


def commands() -> list[list[str]]:
    text = (ROOT / "examples" / "fsdp2" / "README.md").read_text()
    return [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]


def run(rank: int, environment: dict[str, str], command: list[str], steps: int, folder: str) -> None:
    """The script, in a process of two."""
    output = io.StringIO()
    with (
        mock.patch.dict("os.environ", environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}),
        mock.patch("sys.argv", [*command, "--steps", str(steps), "--output", folder]),
        contextlib.redirect_stdout(output),
    ):
        if "--plain" not in command:
            admit_cpus()
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    Path(folder, f"{rank}.txt").write_text(output.getvalue())


# As few steps as teach it something; they draw samples in orders of their own.
@pytest.mark.parametrize(("launcher", "steps"), [("accelerate", 10), ("torchrun", 8)])
def test_what_the_readme_says(launcher, steps, minilm, forkserver, tmp_path, monkeypatch):
    (command,) = [command for command in commands() if command[0] == launcher]
    monkeypatch.chdir(ROOT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    if launcher == "accelerate":
        given = launch_command_parser().parse_args(command[2:])
        given, _, _ = _validate_launch_command(given)
        assert given.num_processes == 2
        environment |= {k: v for k, v in prepare_multi_gpu_env(given).items() if k.startswith(("FSDP_", "ACCELERATE_"))}
        environment["ACCELERATE_USE_CPU"] = "true"
        command = [given.training_script, *given.training_script_args]
    else:
        assert command[1:3] == ["--nproc_per_node", "2"]
        command = command[3:]
    multiprocessing.start_processes(
        run, (environment, command, steps, str(tmp_path)), nprocs=2, start_method="forkserver"
    )
    first, other = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert other == ""
    assert "trainable params: 172,715 || all params: 22,865,676" in first
    assert f"step {steps}: " in first
    # Twice as often as an even choice among six kinds.
    assert float(re.search(r"on one process: accuracy (\S+)", first)[1]) > 1 / 3
