"""The model card of a saved adapter: what it is, and that loading it needs this package."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftModel

from .config import DSTConfig


_BEGIN, _END = "<!-- peft-dst: begin -->", "<!-- peft-dst: end -->"
_TAGS = ("dst", "dynamic-subset-tuning", "peft-dst")

# What a reader loads with, by task; PEFT's own names.
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}

_TEXT = """{begin}
## A Dynamic Subset Tuning adapter

This is not a LoRA adapter: it holds new values for a small subset of the base model's own weights. Loading it needs the
package `peft-dst`; without its import PEFT raises `KeyError: 'DST'`.

```bash
pip install peft-dst
```

```python
import peft_dst  # registers the method with PEFT
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/or/hub-id/of/this/adapter")
```

Base model: {base}

| adapter | budget | free parameters | siloing | distance | trained densely beside it |
|---|---|---|---|---|---|
{rows}
{end}
"""


def update_model_card(directory: str | os.PathLike[str], model: PeftModel) -> None:
    """Put this method's section into the README.md that PEFT has written, replacing an earlier one.

    Args:
        directory: the adapter's folder.
        model: a PeftModel over a DSTModel; all its adapters are listed.
    """
    path = Path(directory) / "README.md"
    card = ModelCard.load(path)
    config = model.active_peft_config
    section = _TEXT.format(
        begin=_BEGIN,
        end=_END,
        base=config.base_model_name_or_path or "the base model",
        auto_class=AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel"),
        rows="\n".join(_row(name, config, model) for name, config in model.peft_config.items()),
    )
    body = re.sub(rf"{_BEGIN}.*?{_END}\n?", "", card.text, flags=re.DOTALL).lstrip("\n")
    card.text = f"{section}\n{body}"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *_TAGS})
    card.save(path)


def _row(name: str, config: DSTConfig, model: PeftModel) -> str:
    cells = (
        name,
        f"ε = {config.epsilon:g}" if config.epsilon is not None else f"{config.num_free_parameters:,} parameters",
        f"{model.base_model.constraint(name).budget:,}",
        config.siloing,
        config.distance,
        ", ".join(sorted(set(config.modules_to_save or []))) or "nothing",
    )
    return f"| {' | '.join(cells)} |"
