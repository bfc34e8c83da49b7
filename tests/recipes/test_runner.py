"""Runs of every method: what they train, write down and save; folders, resuming, and evaluation of what was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerState

from peft_dst.config import SELECTIONS
from peft_dst.delta import SparseDelta
from peft_dst.recipes import evaluate, make_recipe, results, train
from peft_dst.recipes.finished import load_trained
from peft_dst.recipes.lab import Lab
from peft_dst.recipes.options import METHODS
from peft_dst.recipes.record import RESULTS, write
from tests import toys


@pytest.fixture
def options(tmp_path):
    text = [{"text": "the red cat sleeps in the house " * 8}] * 6
    toys.write_rows(tmp_path / "text", train=text, other=text)
    return toys.classification(tmp_path)


def method(name, tmp_path):
    more = {"text": str(tmp_path / "text"), "text_examples": 4, "score_examples": 6}
    return {"name": name, "epsilon": 0.02, **(more if name in ("fisher", "combined", "fisher_pretraining") else {})}


@pytest.mark.parametrize("name", [name for name in METHODS if name != "transfer"])
def test_every_method(name, options, tmp_path):
    """It trains what it says, and what it saved is what was measured."""
    recipe = make_recipe(options | {"method": method(name, tmp_path)})
    record = train(recipe, tmp_path / "run")
    assert record == json.loads((tmp_path / "run" / "results.json").read_text())
    body, free = record["body_parameters"], record["free_parameters"]
    full, none = name in ("full", "l1", "l2"), name == "head_only"
    if name == "bitfit":
        assert free == biases(recipe, tmp_path)
    elif name in ("lora", "prompt_tuning"):
        assert abs(free - 0.02 * body) <= 0.5 * 0.02 * body
    else:
        assert free == (body if full else 0 if none else round(0.02 * body))
    saved = tmp_path / "run" / ("model" if full or none else "adapter")
    assert record["file_sizes"] == {p.name: p.stat().st_size for p in saved.glob("*.safetensors")}
    assert len(record["file_sizes"]) == 1
    if name in SELECTIONS or name == "pruning":
        assert 0 < SparseDelta.load(saved).num_entries <= free
    assert record["metrics"].keys() == {"validation", "test"}
    assert evaluate(tmp_path / "run", ["test", "validation"]) == record["metrics"]
    assert record["steps"] == (0 if name == "pruning" else 4)
    assert record["seconds"]["all"] > 0
    assert record["peak_memory"]["bytes"] > 0
    assert record["versions"]["torch"] == torch.__version__
    # Nothing is left of the way there.
    assert not (tmp_path / "run" / "checkpoints").exists()


def biases(recipe, tmp_path):
    seed = Lab(recipe, tmp_path / "lab").bare()
    return sum(tensor.numel() for name, tensor in seed.body().items() if name.endswith("bias"))


def test_transfer_takes_the_subset_of_another_run(options, tmp_path):
    train(make_recipe(options), tmp_path / "one")
    recipe = make_recipe(options | {"method": {"name": "transfer", "source": str(tmp_path / "one" / "adapter")}})
    train(recipe, tmp_path / "other")
    one, other = (SparseDelta.load(tmp_path / run / "adapter") for run in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].indices, other[name].indices) for name in one)
    assert any(not torch.equal(one[name].values, other[name].values) for name in one)


def test_it_learns(options, tmp_path):
    """The labels are told apart by one word; a subset of five per cent suffices."""
    overrides = ["training.max_steps=100", "training.learning_rate=3e-2", "training.head_learning_rate=1e-2"]
    recipe = make_recipe(options, [*overrides, "method.epsilon=0.05"])
    assert train(recipe, tmp_path / "run")["metrics"]["test"]["accuracy"] == 1.0


def test_what_is_measured_meanwhile_is_measured_in_order(options, tmp_path):
    """Examples of different lengths, grouped by length in training: answers stand beside the rows they are about."""
    longer = [{**row, "text": row["text"] + " of the house" * (i % 3)} for i, row in enumerate(toys.questions(100))]
    toys.write_rows(tmp_path / "data", train=longer, test=toys.questions(4))
    options |= {"evaluation": {"splits": ["validation"], "every": 100}, "method": {"epsilon": 0.05}}
    options["training"] = {"max_steps": 100, "batch_size": 4, "learning_rate": 3e-2, "head_learning_rate": 1e-2}
    overrides = ["training.group_by_length=true", "training.evaluation_batch_size=3"]
    record = train(make_recipe(options, overrides), tmp_path / "run")
    measured = [entry["validation_accuracy"] for entry in record["history"] if "validation_accuracy" in entry]
    assert measured[-1] == record["metrics"]["validation"]["accuracy"] == 1.0
    assert evaluate(tmp_path / "run", ["validation"])["validation"]["accuracy"] == 1.0


def test_a_finished_run_is_not_run_again_and_another_is_refused(options, tmp_path, monkeypatch):
    recipe = make_recipe(options)
    record = train(recipe, tmp_path / "run")
    monkeypatch.setattr(Lab, "__init__", None)
    assert train(make_recipe(options | {"title": "a name"}), tmp_path / "run") == record
    with pytest.raises(
        ValueError, match=r"run holds a run with method\.epsilon = 0\.02, not 0\.1; give another folder"
    ):
        train(make_recipe(options, ["method.epsilon=0.1"]), tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("!")
    with pytest.raises(ValueError, match="is not empty, and holds no run"):
        train(recipe, tmp_path / "full")
    with pytest.raises(ValueError, match="holds no finished run; peft-dst train makes one"):
        evaluate(tmp_path / "full")


def test_what_changes_no_figure_makes_no_other_run(options, tmp_path):
    """What changes one is for evaluate, to which model and data may also have moved."""
    record = train(make_recipe(options), tmp_path / "run")
    more = ["evaluation.predictions=true", "training.evaluation_batch_size=2", "training.save_steps=7"]
    measured = dict(record["metrics"]["test"])
    record["metrics"]["test"]["accuracy"] = -1.0
    write(tmp_path / "run" / RESULTS, record)
    assert train(make_recipe(options, more), tmp_path / "run") == record
    # Also of a finished run predictions can be had. Its figures stay, however they would come out here and now.
    assert results(tmp_path / "run") == record
    for split in ("validation", "test"):
        file = tmp_path / "run" / f"predictions_{split}.jsonl"
        assert len(file.read_text().splitlines()) == record["examples"][split]
        file.unlink()
    with pytest.raises(
        ValueError, match=r"evaluation\.beams = 1, not 4; .*peft-dst evaluate measures it again with other"
    ):
        train(make_recipe(options, ["evaluation.beams=4"]), tmp_path / "run")
    for name in ("data", "bert"):
        (tmp_path / name).rename(tmp_path / f"other_{name}")
    moved = [
        f"task.data={tmp_path / 'other_data'}",
        f"model.name={tmp_path / 'other_bert'}",
        "evaluation.predictions=true",
    ]
    assert evaluate(tmp_path / "run", overrides=moved) == {"test": measured}
    assert len((tmp_path / "run" / "predictions_test.jsonl").read_text().splitlines()) == 10
    with pytest.raises(
        ValueError, match=r"^method\.epsilon cannot be otherwise than it was in training; .*evaluation\.beams, .* can"
    ):
        evaluate(tmp_path / "run", overrides=["method.epsilon=0.1"])
    # Nor what is measured while training, or before.
    for name in ("text=x", "after_head=true", "every=3"):
        with pytest.raises(ValueError, match=rf"^evaluation\.{name.partition('=')[0]} cannot be otherwise"):
            evaluate(tmp_path / "run", overrides=[f"evaluation.{name}"])
        with pytest.raises(ValueError, match=r"give another folder, or remove that one\.$"):
            train(make_recipe(options, [f"evaluation.{name}"]), tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"evaluation\.splits says .*; here the splits are given by themselves \(--split\)"
    ):
        evaluate(tmp_path / "run", overrides=["evaluation.splits=[train]"])


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["dynamic", "fisher", "lora", "full"])
def test_an_interrupted_run_goes_on(name, options, tmp_path, monkeypatch):
    """From its last checkpoint, to the same weights as a run in one go."""
    options["training"] |= {"max_steps": 8, "save_steps": 3, "head_first": {"epochs": 1}}
    recipe = make_recipe(options | {"method": method(name, tmp_path)})
    whole = train(recipe, tmp_path / "whole")
    fit = Lab.fit

    def interrupted(self, model, optimizer, plan, penalty=None, callbacks=()):
        return fit(self, model, optimizer, plan, penalty, [*callbacks, *([Stop()] if plan.resumable else [])])

    with monkeypatch.context() as patch:
        patch.setattr(Lab, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "parts")
    assert results(tmp_path / "parts") is None
    # What it took to come there counts.
    (file,) = (tmp_path / "parts" / "checkpoints").glob("checkpoint-*/seconds.json")
    assert json.loads(file.read_text())[0] > 0
    file.write_text("[1000.0, 0.0]")
    seen = []
    monkeypatch.setattr(
        Lab,
        "fit",
        lambda self, *a, **k: fit(self, *a[:3], *a[3:4], callbacks=[*(a[4] if len(a) > 4 else ()), Count(seen)]),
    )
    parts = train(recipe, tmp_path / "parts")
    assert seen == [4, 5, 6, 7, 8]
    assert min(parts["seconds"][name] for name in ("training", "all")) > 1000 > whole["seconds"]["all"]
    assert parts["metrics"] == whole["metrics"]
    saved = [load_file(next((tmp_path / run).glob("*/*model.safetensors"))) for run in ("whole", "parts")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


@pytest.mark.parametrize(("place", "step"), [("save_model", 3), ("_save_rng_state", 6), ("save_to_json", 6)])
def test_a_run_killed_while_it_saves_goes_on(place, step, options, tmp_path, monkeypatch):
    """From the checkpoint before, or from the start."""
    options["training"] |= {"max_steps": 8, "save_steps": 3}
    recipe = make_recipe(options)

    def killed(self, *args, **kwargs):
        state, folder = (self, args[0]) if place == "save_to_json" else (self.state, args[0])
        if state.global_step < step:
            return original(self, *args, **kwargs)
        if place == "save_to_json":
            Path(folder).write_text('{"best_metric": ')
        elif place == "save_model":
            Path(folder).mkdir()
        raise KeyboardInterrupt

    owner = TrainerState if place == "save_to_json" else Trainer
    original = getattr(owner, place)
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoints" / f"checkpoint-{step}").is_dir()
    seen, fit = [], Lab.fit
    monkeypatch.setattr(Lab, "fit", lambda self, *args: fit(self, *args[:4], [*args[4], Count(seen)]))
    parts = train(recipe, tmp_path / "parts")
    assert seen == list(range(step - 2, 9))
    assert parts["metrics"] == train(recipe, tmp_path / "whole")["metrics"]


class Count(TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)


def test_the_head_goes_first(options, tmp_path):
    """It is trained over the frozen body; methods start from the same one."""
    options["training"] |= {"head_first": {"epochs": 2}}
    lab = Lab(make_recipe(options, ["evaluation.after_head=true"]), tmp_path / "lab")
    bare, started = lab.bare(), lab.start()
    assert bare.head == ["pooler", "classifier"]
    for (name, a), (_, b) in zip(bare.model.named_parameters(), started.model.named_parameters(), strict=True):
        assert torch.equal(a, b) != started.in_head(name), name
    record = train(make_recipe(options, ["evaluation.after_head=true", "method.name=head_only", "training.max_steps=1",
                                         "training.head_learning_rate=0"]), tmp_path / "run")  # fmt: skip
    assert record["metrics_after_head"] == record["metrics"]


def test_a_fresh_head_is_found(options, tmp_path):
    del options["model"]["head"]
    lab = Lab(make_recipe(options), tmp_path / "lab")
    assert lab.bare().head == ["classifier"]
    with pytest.raises(ValueError, match=r"model\.head names 'score', but BertForSequenceClassification has no module"):
        Lab(make_recipe(options, ["model.head=[score]"]), tmp_path / "lab").bare()


def test_inputs_that_are_too_long_are_refused(options, tmp_path):
    """Where positions are learned, and there are not so many."""
    toys.write_rows(tmp_path / "data", train=[{"text": "the red cat " * 30, "label": "a"}] * 10,
                    test=[{"text": "the red cat", "label": "a"}])  # fmt: skip
    with pytest.raises(
        ValueError, match=r"max_length=80 leaves 80 tokens, but .* has positions for 64; set task\.max_l"
    ):
        train(make_recipe(options, ["task.max_length=80"]), tmp_path / "run")


def test_validation_examples_come_from_the_training_split_alone(options, tmp_path):
    rows = Lab(make_recipe(options, ["task.validation_size=7", "task.train_size=20"]), tmp_path / "lab").rows
    assert (len(rows.train), len(rows.validation), len(rows.test)) == (20, 7, 10)
    assert [row["text"] for row in rows.test] == [row["text"] for row in toys.questions(10, 40)]
    fewer = Lab(make_recipe(options, ["task.validation_size=7", "task.train_size=5"]), tmp_path / "lab").rows
    assert fewer.validation == rows.validation
    assert fewer.train == rows.train[:5]


def test_penalties_pull_back(options, tmp_path):
    """The larger the coefficient, the nearer to the seed; without a head in it."""
    changes = []
    for name, coefficient in (("full", 0.01), ("l2", 1.0), ("l2", 100.0)):
        recipe = make_recipe(options, [f"method.name={name}", f"method.coefficient={coefficient}", "training.max_steps=10",
                                       "training.learning_rate=1e-3", "training.max_grad_norm=0"])  # fmt: skip
        folder = tmp_path / f"{name}{coefficient}"
        train(recipe, folder)
        lab = Lab(recipe, folder)
        tuned = dict(load_trained(lab.bare(), folder).named_parameters())
        changes.append(sum(float((tuned[n].detach() - t).abs().sum()) for n, t in lab.bare().body().items()))
    assert changes[0] > changes[1] > changes[2] > 0


def test_the_adapter_is_an_ordinary_one(options, tmp_path):
    recipe = make_recipe(options)
    train(recipe, tmp_path / "run")
    base = Lab(recipe, tmp_path / "run").bare().model
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    assert model.peft_config["default"].task_type == "SEQ_CLS"


def test_a_tuned_body_is_probed_and_tuned_on(options, tmp_path):
    """The second paper's generality: masked words over the frozen tuned body, and a secondary task from it."""
    train(make_recipe(options), tmp_path / "primary")
    probe = {
        "model": {"name": options["model"]["name"], "tuned": str(tmp_path / "primary"), "head": ["cls"], "fresh": ["cls"]},
        "task": {"name": "masked_words", "data": str(tmp_path / "text"), "test": "other", "mask_probability": 0.3,
                 "max_length": 40},
        "method": {"name": "head_only"},
        "training": {"max_steps": 3, "batch_size": 2, "schedule": "constant", "warmup": 0, "weight_decay": 0.05},
    }  # fmt: skip
    lab = Lab(make_recipe(probe), tmp_path / "lab")
    plain = Lab(make_recipe({**probe, "model": probe["model"] | {"tuned": None}}), tmp_path / "lab")
    tuned, seed = lab.bare(), plain.bare()
    delta = SparseDelta.load(tmp_path / "primary" / "adapter")
    changed = {name for name, tensor in tuned.body().items() if not torch.equal(tensor, seed.body()[name])}
    assert changed == {name for name in delta if name in seed.body()}
    assert changed
    decoder = tuned.model.cls.predictions.decoder.weight
    assert decoder.data_ptr() != tuned.model.bert.embeddings.word_embeddings.weight.data_ptr()
    record = train(make_recipe(probe), tmp_path / "probe")
    assert 0 <= record["metrics"]["test"]["precision_at_1"] <= 1
    assert record["free_parameters"] == 0
    assert evaluate(tmp_path / "probe") == {"test": record["metrics"]["test"]}
    options["model"]["tuned"] = str(tmp_path / "primary")
    train(make_recipe(options, ["method.name=full", "training.learning_rate=1e-4"]), tmp_path / "secondary")


def test_a_tuned_body_brings_no_head(options, tmp_path):
    """Also where a part of the head, as BERT's pooler, stands within the body's own module."""
    options["model"]["head"] = ["pooler", "classifier"]
    train(make_recipe(options), tmp_path / "primary")
    plain = Lab(make_recipe(options), tmp_path / "lab").bare().model.state_dict()
    options["model"]["tuned"] = str(tmp_path / "primary")
    tuned = Lab(make_recipe(options), tmp_path / "lab").bare().model.state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert changed
    assert not {name for name in changed if "pooler" in name or "classifier" in name}
    dense = SparseDelta.load(tmp_path / "primary" / "adapter").dense
    assert any("pooler" in name for name in dense)


def test_each_seed_may_have_a_body_of_its_own(options, tmp_path):
    runs = tmp_path / "runs"
    for seed in (1, 2):
        train(make_recipe(options, [f"seed={seed}"]), runs / f"random,seed={seed},x")
    # A trial, of which the figures alone stay.
    (runs / "random,seed=1,trial").mkdir()
    pattern = str(runs / "random,seed={seed},*")
    options["model"]["tuned"] = pattern
    for seed in (1, 2):
        found = Lab(make_recipe(options, [f"seed={seed}"]), tmp_path / "lab").bare()
        options["model"]["tuned"] = str(runs / f"random,seed={seed},x")
        want = Lab(make_recipe(options, [f"seed={seed}"]), tmp_path / "lab").bare()
        options["model"]["tuned"] = pattern
        assert all(torch.equal(found.body()[name], tensor) for name, tensor in want.body().items())
    with pytest.raises(ValueError, match=r"must stand for one finished run; for seed 3 there are 0\."):
        Lab(make_recipe(options, ["seed=3"]), tmp_path / "lab").bare()
    options["model"]["tuned"] = str(runs / "*")
    with pytest.raises(ValueError, match=r"for seed 1 there are 2 \(.*random,seed=1,x, "):
        Lab(make_recipe(options, ["seed=1"]), tmp_path / "lab").bare()


def test_another_body_is_refused(options, tmp_path):
    train(make_recipe(options, ["method.name=head_only", "training.max_steps=1"]), tmp_path / "head")
    with pytest.raises(ValueError, match="is a run of head_only, which changes no weight of the body"):
        Lab(make_recipe(options, [f"model.tuned={tmp_path / 'head'}"]), tmp_path / "lab").bare()
    train(make_recipe(options, ["method.name=prompt_tuning", "training.max_steps=1"]), tmp_path / "prompt")
    options["model"]["tuned"] = str(tmp_path / "prompt")
    with pytest.raises(ValueError, match="is a run of prompt_tuning, which changes no weight"):
        Lab(make_recipe(options), tmp_path / "lab").bare()
