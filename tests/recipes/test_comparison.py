"""A run in the form of PEFT's comparison of methods, what is measured on the way there, and the loss on text."""

from __future__ import annotations

import json
import math

import pytest
import torch

from peft_dst.cli import main
from peft_dst.recipes import compared, make_recipe, results, train
from peft_dst.recipes.finished import load_trained
from peft_dst.recipes.forgetting import text_loss
from peft_dst.recipes.lab import Lab
from tests import toys


NOTHING = type(None)
# What PEFT's program writes (method_comparison/MetaMathQA, utils.log_results), and reads again.
RUN = {
    "created_at": str, "total_time": float, "experiment_name": str, "peft_branch": NOTHING,
    "peft_worktree_is_dirty": NOTHING, "train_config": dict, "peft_config": (dict, NOTHING), "error_msg": str,
}  # fmt: skip
TRAIN_CONFIG = {
    "model_id": str, "dtype": str, "max_seq_length": int, "batch_size": int, "batch_size_eval": int, "max_steps": int,
    "eval_steps": int, "compile": bool, "use_gc": bool, "query_template": str, "seed": int, "grad_norm_clip": float,
    "optimizer_type": str, "optimizer_kwargs": dict, "lr_scheduler": str, "use_amp": bool,
    "autocast_adapter_dtype": bool, "generation_kwargs": dict, "attn_implementation": NOTHING,
    "init_kv_cache_prefix": NOTHING,
}  # fmt: skip
TRAIN = {
    "accelerator_memory_reserved_avg": int, "accelerator_memory_max": int, "accelerator_memory_reserved_99th": int,
    "train_time": float, "file_size": int, "num_trainable_params": int, "num_total_params": int, "status": str,
    "metrics": list,
}  # fmt: skip
BETWEEN = {
    "step": int, "valid accuracy": float, "train loss": float, "train samples": int, "train time": float,
    "eval time": float, "tokens / sec": float, "mem allocated avg": float, "mem reserved avg": float,
    "elapsed time": float,
}  # fmt: skip
LAST = {
    "step": int, "test accuracy": float, "train loss": float, "train samples": int, "train total tokens": int,
    "forgetting": float,
}  # fmt: skip
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
META = {"model_info": dict, "dataset_info": dict, "package_info": dict, "system_info": dict, "pytorch_info": str}
SYSTEM = dict.fromkeys(("system", "release", "version", "machine", "processor"), str)


def check(found, kinds, where):
    assert found.keys() == kinds.keys(), where
    for name, kind in kinds.items():
        assert isinstance(found[name], kind), (where, name, found[name])
        assert kind is bool or not isinstance(found[name], bool), (where, name)


def options(tmp_path, **more):
    """A recipe on rows of MetaMathQA's shape, tested on GSM8K's."""
    sums = [("1 and 2", 3), ("2 and 2", 4), ("1 and 4", 5)]
    toys.write_rows(
        tmp_path / "metamath",
        train=[{"type": "x", "query": q, "response": f"one and two The answer is: {n}"} for q, n in sums] * 4
        + [{"query": "the cat " * 40, "response": "The answer is: 1"}],
    )
    gsm8k = [{"question": q, "answer": f"the cat\n#### {n}"} for q, n in sums]
    toys.write_rows(tmp_path / "gsm8k", train=gsm8k, test=gsm8k)
    toys.write_rows(
        tmp_path / "text", train=[{"text": "the red cat sleeps in paris"}, {"text": "anna runs"}, {"text": ""}]
    )
    return {
        "model": {"name": str(toys.model(tmp_path / "llama", "llama"))},
        "task": {
            "name": "maths", "data": str(tmp_path / "metamath"), "evaluation_data": str(tmp_path / "gsm8k"),
            "validation": "train", "validation_size": 2, "max_length": 16, "max_target_length": 16,
            "max_characters": 100, "train_inputs": True, "prompt": "question: {question} answer:",
        },
        "method": {"epsilon": 0.02},
        "training": {"max_steps": 5, "batch_size": 3, "schedule": "cosine", "logging_steps": 1, "learning_rate": 0.01},
        "evaluation": {"splits": ["test"], "every": 2, "max_new_tokens": 4, "text": str(tmp_path / "text")},
        **more,
    }  # fmt: skip


# PEFT's own words, whenever a model with a prompt generates.
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("method", ["dynamic", "lora", "prompt_tuning", "full"])
def test_a_run_as_peft_writes_it(method, tmp_path, capsys):
    recipe = options(tmp_path, method={"name": method, **({} if method == "full" else {"epsilon": 0.02})})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    file = tmp_path / "result.json"
    with pytest.raises(SystemExit) as done:
        main(["train", str(tmp_path / "recipe.yaml"), "-q", "-o", str(tmp_path / "run"), "--comparison", str(file)])
    assert not done.value.code, capsys.readouterr().err
    found, record = json.loads(file.read_text()), results(tmp_path / "run")
    assert found.keys() == {"run_info", "train_info", "meta_info"}
    check(found["run_info"], RUN, "run_info")
    check(found["run_info"]["train_config"], TRAIN_CONFIG, "train_config")
    check(found["train_info"], TRAIN, "train_info")
    check(found["meta_info"], META, "meta_info")
    *between, last = found["train_info"]["metrics"]
    for entry in between:
        check(entry, BETWEEN, "metrics")
    check(last, LAST, "the last of metrics")
    meta = found["meta_info"]
    assert meta["package_info"].keys() == {f"{name}-{what}" for name in PACKAGES for what in ("version", "commit-hash")}
    assert meta["package_info"]["torch-version"] == torch.__version__
    check({name: meta["system_info"][name] for name in SYSTEM}, SYSTEM, "system_info")
    assert "accelerator" in meta["system_info"]
    assert meta["dataset_info"] == {name: {"sha": None, "created_at": None} for name in ("metamath", "gsm8k")}
    assert meta["model_info"] == {"sha": None, "created_at": None}
    # What the figures are.
    name = {"dynamic": "dst", "full": "full-finetuning"}.get(method, method)
    assert found["run_info"]["experiment_name"] == f"{name}/run"
    assert (found["run_info"]["peft_config"] or {}).get("peft_type") == (None if method == "full" else name.upper())
    config = found["run_info"]["train_config"]
    assert config["query_template"] == "question: {query} answer:"
    assert (config["max_steps"], config["eval_steps"], config["lr_scheduler"]) == (5, 2, "cosine")
    assert [entry["step"] for entry in between] == [2, 4]
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert [entry["train loss"] for entry in between] == pytest.approx([sum(losses[i : i + 2]) / 2 for i in (0, 2)])
    assert last["train loss"] == pytest.approx(losses[4])
    assert [entry["train samples"] for entry in [*between, last]] == [6, 12, 15]
    # Words, and the end, of all rows but the last: of each "question: 1 and 2 answer: one and two The answer is: 3".
    assert record["examples"]["train"] == 12
    assert last["train total tokens"] == 15 * 13
    assert found["train_info"]["num_trainable_params"] == record["free_parameters"]
    assert found["train_info"]["file_size"] == sum(record["file_sizes"].values())
    assert found["train_info"]["train_time"] <= found["run_info"]["total_time"]
    assert last["test accuracy"] == record["metrics"]["test"]["stated"]
    assert last["forgetting"] == record["text_loss"]["after"] - record["text_loss"]["before"]


def test_measuring_on_the_way_changes_nothing(tmp_path):
    made = options(tmp_path)
    train(make_recipe(made), tmp_path / "measured")
    made["evaluation"] = made["evaluation"] | {"every": None}
    plain = train(make_recipe(made), tmp_path / "plain")
    measured = results(tmp_path / "measured")
    losses = [[entry["loss"] for entry in run["history"] if "loss" in entry] for run in (plain, measured)]
    assert losses[0] == losses[1]
    assert plain["metrics"] == measured["metrics"]
    assert "tokens" not in plain


def test_the_loss_on_text(tmp_path):
    """Of every token after the first, whatever is in a batch beside it."""
    made = make_recipe(options(tmp_path))
    record = train(made, tmp_path / "run")
    lab = Lab(made, tmp_path / "lab")
    for seed, expected in ((True, record["text_loss"]["before"]), (False, record["text_loss"]["after"])):
        model = lab.bare().model if seed else load_trained(lab.bare(), tmp_path / "run")
        total, count = 0.0, 0
        for text in ("the red cat sleeps in paris", "anna runs"):
            ids = torch.tensor([lab.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                # transformers' loss is the mean over all tokens but the first.
                total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert expected == pytest.approx(total / count, rel=1e-5)
        assert text_loss(lab, model) == pytest.approx(expected, rel=1e-5)
    assert not math.isclose(record["text_loss"]["before"], record["text_loss"]["after"])


def test_what_cannot_be_compared(tmp_path):
    recipe = toys.classification(tmp_path)
    train(make_recipe(recipe), tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"PEFT compares by MetaMathQA and GSM8K; this wants a run of task\.name=maths"
    ):
        compared(tmp_path / "run")
    with pytest.raises(ValueError, match="holds no finished run"):
        compared(tmp_path / "data")
    recipe["evaluation"] = {"text": str(tmp_path / "data")}
    with pytest.raises(ValueError, match=r"evaluation\.text is for causal models; set it to null"):
        train(make_recipe(recipe), tmp_path / "other")
    made = options(tmp_path)
    made["task"]["max_characters"] = 5
    with pytest.raises(ValueError, match=r"no training example has 5 characters or fewer; raise task\.max_characters"):
        Lab(make_recipe(made), tmp_path / "lab")


def test_inputs_are_learned_where_they_shall_be(tmp_path):
    made = options(tmp_path)
    for inputs in (True, False):
        made["task"]["train_inputs"] = inputs
        lab = Lab(make_recipe(made), tmp_path / "lab")
        lab.bare()
        (feature,) = lab.task.encode(lab.rows.train[:1], lab.tokenizer, training=True)
        prompt = len(lab.tokenizer(lab.rows.train[0]["input"])["input_ids"])
        labels = feature["input_ids"][:prompt] if inputs else [-100] * prompt
        assert feature["labels"] == labels + feature["input_ids"][prompt:]
