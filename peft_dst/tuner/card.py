"""The model card of a saved adapter: what it is, and that loading it needs this package."""

from __future__ import annotations

import html
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import DSTConfig
from .layer import markers


_BEGIN, _END = "<!-- peft-dst: begin -->", "<!-- peft-dst: end -->"
_SECTION = re.compile(rf"{_BEGIN}.*?{_END}", flags=re.DOTALL)
_TAGS = ("dst", "dynamic-subset-tuning", "peft-dst")
_BASE_TAG = "base_model:"

# What a reader loads with, by task; PEFT's own names.
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# The hub's names of these tasks, for models that read text; PEFT itself fills in "text-generation".
_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
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
{load}
model = PeftModel.from_pretrained(base, "path/or/hub-id/of/this/adapter")
```

Base model: {base}

| adapter | budget | free parameters | selection | siloing | distance | positions and values | trained densely beside it |
|---|---|---|---|---|---|---|---|
{rows}
{end}"""


def read_metadata(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of the README.md in a folder; empty if there is none."""
    path = Path(directory) / "README.md"
    return ModelCard.load(path).data.to_dict() if path.is_file() else {}


def update_model_card(directory: str | os.PathLike[str], model: PeftModel, before: dict[str, Any]) -> None:
    """Put this method's section into the README.md that PEFT has written, in the place of an earlier one or first.

    The rest of the text is left alone, and so are the licence, results (`model-index`) and whatever else its metadata
    say. Names of the base model that are no hub ids, such as local folders, are kept out.

    Args:
        directory: the adapter's folder.
        model: a PeftModel over a DSTModel; all its adapters are listed.
        before: the README's metadata before PEFT wrote them anew, of whose tags and base model it keeps nothing.
    """
    path = Path(directory) / "README.md"
    card = ModelCard.load(path)
    section = _section(model)
    card.text, replaced = _SECTION.subn(lambda found: section, card.text, count=1)
    if not replaced:
        card.text = f"{section}\n\n{card.text.lstrip()}"

    found = {*(card.data.get("tags") or []), *(before.get("tags") or []), *_TAGS}
    bases = {tag: tag.rpartition(":")[2] for tag in found if tag.startswith(_BASE_TAG)}
    card.data["tags"] = sorted(tag for tag in found if tag not in bases or _is_hub_id(bases[tag]))
    if not _is_hub_id(card.data.get("base_model")):
        card.data["base_model"] = before.get("base_model") if _is_hub_id(before.get("base_model")) else None
    base = model.get_base_model()
    if not card.data.get("pipeline_tag") and getattr(base, "main_input_name", None) == "input_ids":
        card.data["pipeline_tag"] = _PIPELINES.get(_task(model))
    card.save(path)


def _is_hub_id(name: Any) -> bool:
    """Whether a base model's name means something to others: not a folder of this machine, nor empty."""
    if isinstance(name, list):
        return bool(name) and all(_is_hub_id(one) for one in name)
    if not isinstance(name, str) or not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _task(model: PeftModel) -> str:
    task = model.active_peft_config.task_type
    return str(getattr(task, "value", task))


def _section(model: PeftModel) -> str:
    config = model.active_peft_config
    name = config.base_model_name_or_path
    known = _is_hub_id(name)
    base = model.get_base_model()
    return _TEXT.format(
        begin=_BEGIN,
        end=_END,
        load=_load(base, _task(model), name if known else "path/or/hub-id/of/the/base", config.revision),
        base=f"[{name}](https://huggingface.co/{name})" if known else "not on the hub",
        rows="\n".join(_row(name, config, model) for name, config in model.peft_config.items()),
    )


def _load(base: nn.Module, task: str, name: str, revision: str | None) -> str:
    """The lines that load the base model."""
    if not isinstance(base, PreTrainedModel):
        return "\nbase = ...  # the base model"
    own = type(base).__name__ if type(base).__module__.startswith("transformers.") else "AutoModel"
    loader = AUTO_CLASSES.get(task, own)
    options = [json.dumps(name)]
    if revision is not None:
        options.append(f"revision={json.dumps(revision)}")
    if task in ("SEQ_CLS", "TOKEN_CLS") or own.endswith("Classification"):
        options.append(f"num_labels={base.config.num_labels}")
    return f"from transformers import {loader}\n\nbase = {loader}.from_pretrained({', '.join(options)})"


def _row(name: str, config: DSTConfig, model: PeftModel) -> str:
    constraint = model.base_model.constraint(name)
    entries, size = _records(name, model)
    dense: Counter[str] = Counter()
    for where, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            dense[where.rpartition(".")[2]] += sum(_bytes(p) for p in module.modules_to_save[name].parameters())
    cells = (
        name,
        _budget(config),
        f"{constraint.budget:,} of {sum(silo.size for silo in constraint.silos):,}",
        config.selection,
        config.siloing,
        config.distance,
        f"{entries:,} ({_kilobytes(size)})",
        ", ".join(f"{module} ({_kilobytes(size)})" for module, size in sorted(dense.items())) or "nothing",
    )
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _budget(config: DSTConfig) -> str:
    if config.epsilon is not None:
        return f"ε = {config.epsilon:g}"
    return "all biases" if config.num_free_parameters is None else f"{config.num_free_parameters:,} parameters"


def _records(name: str, model: PeftModel) -> tuple[int, int]:
    """Entries of an adapter's records, and their bytes."""
    records = [
        record for _, marker in markers(model) if name in marker.tuned for record in marker.records(name).values()
    ]
    return sum(r.indices.numel() for r in records), sum(_bytes(r.indices) + _bytes(r.values) for r in records)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _kilobytes(size: int) -> str:
    return f"{size / 1000:,.1f} kB"


def _cell(text: str) -> str:
    """Text in a table: names come from users and from files, and may hold anything."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())
