"""Runs that take no time, for tests of sweeps."""

from __future__ import annotations

import json

from peft_dst.recipes import processes


def scripted(monkeypatch, figures):
    """Runs that take no time; the figure of the validation split is a function of the recipe."""
    seen = []

    def train(recipe, folder, *, cache, wait):
        seen.append(recipe)
        value = figures(recipe)
        if isinstance(value, Exception):
            raise value
        record = {
            "recipe": {"seed": recipe.seed},
            "metrics": {split: {"accuracy": value + (split == "test") / 10} for split in recipe.evaluation.splits},
            "free_parameters": 7, "body_parameters": 70, "head_parameters": 3, "file_sizes": {"adapter.safetensors": 99},
            "steps": 2, "seconds": {"all": 1.0}, "peak_memory": {"bytes": 1}, "commit": None, "versions": {}, "machine": {},
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps(record))
        return record

    monkeypatch.setattr(processes, "train", train)
    return seen
