"""Runs PEFT's own tests against DST: `python -m tests.peft_suite /path/to/peft [pytest arguments]`.

With tests among the arguments only those run (`tests/test_config.py -k task_type`, relative to the checkout).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from . import expected


def main(arguments: list[str]) -> int:
    if not arguments or not (Path(arguments[0]) / "tests" / "testing_common.py").is_file():
        sys.stderr.write(
            "usage: python -m tests.peft_suite PEFT [pytest arguments]\nPEFT: a checkout, or the unpacked source "
            "distribution, of the installed version of peft\n"
        )
        return 2
    source, rest = Path(arguments[0]).resolve(), arguments[1:]
    chosen = [argument for argument in rest if argument.startswith("tests/")]
    narrowed = chosen or any(a in ("-k", "-m", "--deselect", "-x", "--maxfail", "--co", "--collect-only") for a in rest)
    os.environ |= {"PEFT_SOURCE": str(source), "HF_HUB_OFFLINE": "1", "PEFT_SUITE_WHOLE": "" if narrowed else "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(source)
    return pytest.main(
        [
            *("-c", str(Path(__file__).with_name("pytest.ini")), "--rootdir", str(source)),
            *("-p", "tests.peft_suite.plugin", "-p", "no:cacheprovider", "-q", "--no-header"),
            *rest,
            *([] if chosen else [f"tests/{module}.py" for module in expected.MODULES]),
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
