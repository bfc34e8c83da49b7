"""Extraction from the folders of a pair, and what they may hold."""

from __future__ import annotations

from peft_dst import DSTConfig
from peft_dst.extraction import extract


def run(tmp_path, base=None, tuned=None, **options):
    config = DSTConfig(**({} if "num_free_parameters" in options else {"epsilon": 0.02}) | options)
    base, tuned = tmp_path / "base" if base is None else base, tmp_path / "tuned" if tuned is None else tuned
    return extract(base, tuned, tmp_path / "out", config, progress=False)


def renamed(model, name):
    return {n.replace("LayerNorm.weight", f"LayerNorm.{name}"): t.contiguous() for n, t in model.state_dict().items()}
