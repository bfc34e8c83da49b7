"""A run on MetaMathQA as PEFT's comparison of methods (method_comparison/MetaMathQA) writes it, to be laid beside its own.

The names are PEFT's. What only its own program knows is null: the state of a checkout of PEFT, and of the data sets. Memory
is 0 without an accelerator.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from .config import to_dict
from .options import Recipe
from .record import ADAPTER, recipe_of, results
from .tasks import local_folder


OPTIMIZERS = {"adamw": "AdamW", "adafactor": "Adafactor", "sgd": "SGD"}
START = {"training_seconds": 0.0, "measuring_seconds": 0.0, "num_input_tokens_seen": 0}
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def check_comparable(recipe: Recipe) -> None:
    """Check that a recipe's run can be compared.

    Raises:
        ValueError: if it is of another task.
    """
    if recipe.task.name != "maths" or "test" not in recipe.evaluation.splits:
        raise ValueError(
            "PEFT compares by MetaMathQA and GSM8K; this wants a run of task.name=maths, with test in evaluation.splits."
        )


def compared(folder: str | Path) -> dict[str, Any]:
    """A finished run as PEFT's program writes down one of its own; to be made on the machine of the run.

    Args:
        folder: of the run.

    Raises:
        ValueError: if the run is not finished, or is of another task.
    """
    folder = Path(folder)
    recipe = recipe_of(folder)
    check_comparable(recipe)
    record = results(folder)
    assert record is not None
    file = folder / ADAPTER / "adapter_config.json"
    config = json.loads(file.read_text()) if file.is_file() else None
    method = config["peft_type"].lower() if config else "full-finetuning"
    return {
        "run_info": {
            "created_at": record["created_at"],
            "total_time": record["seconds"]["all"],
            "experiment_name": f"{method}/{folder.name}",
            "peft_branch": None,
            "peft_worktree_is_dirty": None,
            "train_config": _train_config(to_dict(recipe), record["steps"]),
            "peft_config": config,
            "error_msg": "",
        },
        "train_info": _train_info(record),
        "meta_info": {
            "model_info": _model_info(recipe.model.name, recipe.model.revision),
            "dataset_info": {name: {"sha": None, "created_at": None} for name in ("metamath", "gsm8k")},
            "package_info": _packages(record["versions"]),
            "system_info": {
                "system": platform.system(),
                "release": platform.release(),
                "version": platform.version(),
                "machine": platform.machine(),
                "processor": platform.processor(),
                "accelerator": record["machine"]["accelerator"],
            },
            "pytorch_info": torch.__config__.show(),
        },
    }


def _train_config(recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    model, task, training, evaluation = (recipe[name] for name in ("model", "task", "training", "evaluation"))
    return {
        "model_id": model["name"],
        "dtype": model["dtype"],
        "max_seq_length": task["max_length"],
        "batch_size": training["batch_size"],
        "batch_size_eval": training["evaluation_batch_size"],
        "max_steps": steps,
        "eval_steps": evaluation["every"] or steps,
        "compile": False,
        "use_gc": training["activation_checkpointing"],
        "query_template": (task["prompt"] or "").replace("{question}", "{query}"),
        "seed": recipe["seed"],
        "grad_norm_clip": training["max_grad_norm"],
        "optimizer_type": OPTIMIZERS[training["optimizer"]],
        "optimizer_kwargs": {"lr": training["learning_rate"], "weight_decay": training["weight_decay"]},
        "lr_scheduler": None if training["schedule"] == "constant" else training["schedule"],
        "use_amp": training["bf16"],
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": evaluation["max_new_tokens"] or task["max_target_length"]},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _train_info(record: dict[str, Any]) -> dict[str, Any]:
    memory = record.get("training_memory", {})
    peak = record["peak_memory"]
    total = record["body_parameters"] + record["head_parameters"]
    return {
        "accelerator_memory_reserved_avg": memory.get("reserved", 0),
        "accelerator_memory_max": peak["reserved"] if peak["of"] == "accelerator" else 0,
        "accelerator_memory_reserved_99th": memory.get("reserved_99th", 0),
        "train_time": record["seconds"]["training"],
        "file_size": sum(record["file_sizes"].values()),
        "num_trainable_params": record["free_parameters"],
        "num_total_params": total,
        "status": "success",
        "metrics": _metrics(record),
    }


def _metrics(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The validation split in the middle of training, and last the test split."""
    options = record["recipe"]["training"]
    batch = options["batch_size"] * options["accumulation"]
    found: list[dict[str, Any]] = []
    losses: list[float] = []
    seen = START
    for entry in record["history"]:
        losses += [entry["loss"]] if "loss" in entry else []
        if "validation_stated" not in entry or entry["step"] % record["recipe"]["evaluation"]["every"]:
            # Trainer also measures after the last step, whichever it is.
            continue
        # A run that was interrupted counts its seconds anew.
        before = seen if seen["training_seconds"] < entry["training_seconds"] else START
        seconds = entry["training_seconds"] - before["training_seconds"]
        found.append(
            {
                "step": entry["step"],
                "valid accuracy": entry["validation_stated"],
                "train loss": sum(losses) / max(1, len(losses)),
                "train samples": entry["step"] * batch,
                "train time": seconds,
                "eval time": entry["measuring_seconds"] - before["measuring_seconds"],
                "tokens / sec": (entry["num_input_tokens_seen"] - seen["num_input_tokens_seen"]) / seconds,
                "mem allocated avg": entry.get("memory_allocated", 0.0),
                "mem reserved avg": entry.get("memory_reserved", 0.0),
                "elapsed time": entry["training_seconds"] + entry["measuring_seconds"],
            }
        )
        losses, seen = [], entry
    last = losses or ([] if not found else [found[-1]["train loss"]])
    texts = record.get("text_loss")
    return [
        *found,
        {
            "step": record["steps"],
            "test accuracy": record["metrics"]["test"]["stated"],
            "train loss": sum(last) / max(1, len(last)),
            "train samples": record["steps"] * batch,
            "train total tokens": record.get("tokens", 0),
            **({"forgetting": texts["after"] - texts["before"]} if texts else {}),
        },
    ]


def _model_info(name: str, revision: str | None) -> dict[str, str | None]:
    if local_folder(name, "*.json") is None:
        try:
            info = HfApi().model_info(name, revision=revision)
            return {"sha": info.sha, "created_at": info.created_at.isoformat() if info.created_at else None}
        except Exception:  # no network, a model that is gone: PEFT's program writes null, too
            pass
    return {"sha": None, "created_at": None}


def _packages(versions: dict[str, str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[f"{name}-version"] = versions.get(name) or version(name)
        except PackageNotFoundError:
            found[f"{name}-version"] = None
        found[f"{name}-commit-hash"] = None
    return found
