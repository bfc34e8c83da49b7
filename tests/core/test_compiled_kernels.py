"""What the compiler makes of the kernels, which the interpreter cannot tell: for GPUs that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft_dst


pytest.importorskip("triton", minversion="3.6", reason="triton is not installed (it is for Linux on x86-64), or is old")


def test_compiled_code_rounds_every_operation_and_moves_whole_vectors(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program, folder = Path(__file__).with_name("compile_kernels.py"), Path(peft_dst.__file__).parent
    subprocess.run([sys.executable, str(program), str(folder)], check=True, env=environment)
