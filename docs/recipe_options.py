"""Writes the options of recipes into docs/experiments.md, from the help of their fields.

python docs/recipe_options.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from omegaconf import MISSING

from peft_dst.recipes.config import option_names


TARGET = Path(__file__).with_name("experiments.md")
BEGIN, END = "<!-- options: python docs/recipe_options.py -->\n", "<!-- end of options -->\n"


def render() -> str:
    lines = ["| option | type | default | |", "|---|---|---|---|"]
    for name, field in option_names().items():
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        default = "(must be given)" if made == MISSING else f"`{made}`" if made != "" else "(empty)"
        kind, text = (part.replace("|", "\\|") for part in (str(field.type), field.metadata["help"]))
        lines.append(f"| `{name}` | `{kind}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    before, _, rest = TARGET.read_text().partition(BEGIN)
    TARGET.write_text(before + BEGIN + "\n" + render() + "\n" + END + rest.partition(END)[2])
