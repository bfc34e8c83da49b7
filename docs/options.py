"""Writes docs/options.md from the help of DSTConfig's fields: each option is explained once, in the code.

python docs/options.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from peft.config import PeftConfig

from peft_dst import DSTConfig


TARGET = Path(__file__).with_suffix(".md")


def render() -> str:
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    lines = [
        "# Options of DSTConfig",
        "",
        "Written by `python docs/options.py` from the code; PEFT's own options (`task_type`, `inference_mode`,",
        "`base_model_name_or_path`, `revision`, …) work as everywhere.",
        "",
        "| option | type | default | |",
        "|---|---|---|---|",
    ]
    for field in dataclasses.fields(DSTConfig):
        if field.name not in inherited:
            kind = str(field.type).replace("|", "\\|")
            default = str(field.default).replace("|", "\\|")
            explanation = field.metadata["help"].replace("|", "\\|")
            lines.append(f"| `{field.name}` | `{kind}` | `{default}` | {explanation} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render())
