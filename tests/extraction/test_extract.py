"""An adapter made from a fully fine-tuned checkpoint: what it holds, what it comes back as, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_dst import DSTConfig
from peft_dst.core import DISTANCES, SILOINGS
from peft_dst.core.constraint import Constraint
from peft_dst.core.reference import reference_step
from peft_dst.delta import Checkpoint, SparseDelta, read_metadata
from peft_dst.extraction import extract
from tests.models import BUILDERS, assert_same, bert, logits, train, weights


@pytest.fixture
def pair(tmp_path):
    """Folders of a tiny base and of a fine-tuned model, how to load the base, and the two models."""

    def make(name="bert", dtype=torch.float32, **options):
        torch.manual_seed(0)
        base = BUILDERS[name]()
        tuned = copy.deepcopy(base)
        train(tuned, name)
        for folder, model in (("base", base), ("tuned", tuned)):
            model.to(dtype).save_pretrained(tmp_path / folder, **options)

        def load(which="base"):
            return type(base).from_pretrained(tmp_path / which, dtype=dtype)

        return load, base, tuned

    return make


def run(tmp_path, base=None, tuned=None, **options):
    config = DSTConfig(**({} if "num_free_parameters" in options else {"epsilon": 0.02}) | options)
    base, tuned = tmp_path / "base" if base is None else base, tmp_path / "tuned" if tuned is None else tuned
    return extract(base, tuned, tmp_path / "out", config, progress=False)


def reference(base, tuned, **options):
    """What the plain reference makes of the two, with the silos and budgets of a DSTModel."""
    constraint = get_peft_model(copy.deepcopy(base), DSTConfig(**options)).constraint()
    silos = {silo.name: [w.name for w in silo.weights] for silo in constraint.silos}
    budgets = {silo.name: silo.budget for silo in constraint.silos}
    return reference_step(weights(base), weights(tuned), silos, budgets, constraint.distance)


# T5 and GPT-2 tie their embeddings.
@pytest.mark.parametrize(("name", "turn"), [("bert", 0), ("llama", 1), ("t5", 2), ("gpt2", 3)])
def test_equals_the_dense_reference_and_comes_back(name, turn, pair, tmp_path):
    """Every siloing with every distance, in two architectures with two epsilons; and every pair of these four."""
    load, base, tuned = pair(name)
    epsilons = (0.001, 0.05, 0.4)
    for s, siloing in enumerate(SILOINGS):
        for d, distance in enumerate(DISTANCES):
            if (s + d + turn) % 2:
                continue
            options = {"epsilon": epsilons[(s + d + turn) % 3], "siloing": siloing, "distance": distance}
            expected, subset = reference(base, tuned, **options)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            report = run(tmp_path, **options)
            records = SparseDelta.load(tmp_path / "out")
            assert {n: r.indices.tolist() for n, r in records.items()} == {
                n: indices.tolist() for n, indices in subset.items() if len(indices)
            }
            assert report.total.free == sum(len(i) for i in subset.values()) > 0
        loaded = PeftModel.from_pretrained(load(), tmp_path / "out")
        assert_same(weights(loaded.get_base_model()), weights(base) | expected)
        with loaded.disable_adapter():
            assert_same(weights(loaded.get_base_model()), weights(base))


@pytest.mark.parametrize("siloing", SILOINGS)
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_epsilon_one_is_the_tuned_model(name, siloing, pair, tmp_path):
    load, _, tuned = pair(name)
    report = run(tmp_path, epsilon=1.0, siloing=siloing)
    loaded = PeftModel.from_pretrained(load(), tmp_path / "out")
    assert_same(weights(loaded.get_base_model()), weights(tuned))
    assert torch.equal(logits(loaded, name), logits(tuned, name))
    assert report.total.reset == 0
    assert (report.total.share_of_absolute, report.total.share_of_squares) == pytest.approx((1.0, 1.0), rel=1e-12)


def test_a_hand_computed_case(tmp_path):
    class Net(nn.Module):
        def __init__(self, mixer, embed):
            super().__init__()
            self.mixer, self.embed = nn.Module(), nn.Module()
            self.mixer.weight = nn.Parameter(torch.tensor(mixer))
            self.embed.weight = nn.Parameter(torch.tensor([embed]))

    base = Net([4.0, 1.0, -2.0, 0.0], [1.0, 1.0])
    # Δ = |seed · change|: 4, 3, 4, 0; the second 4 loses the tie to the first. In the other silo 1 and 2.
    tuned = Net([5.0, 4.0, 0.0, 9.0], [0.0, 3.0])
    report = run(tmp_path, base, tuned, num_free_parameters=2, siloing="parameter")
    assert {n: (r.indices.tolist(), r.values.tolist()) for n, r in SparseDelta.load(tmp_path / "out").items()} == {
        "mixer.weight": ([0], [5.0]),
        "embed.weight": ([1], [3.0]),
    }
    mixer, embed = report.silos
    assert (mixer.size, mixer.budget, mixer.free, mixer.changed, mixer.reset) == (4, 1, 1, 4, 3)
    assert (mixer.threshold, mixer.largest_reset) == (4.0, 4.0)
    assert (mixer.absolute_kept, mixer.absolute) == (1.0, 1 + 3 + 2 + 9)
    assert (mixer.squares_kept, mixer.squares) == (1.0, 1 + 9 + 4 + 81)
    assert (embed.threshold, embed.largest_reset, embed.share_of_absolute) == (2.0, 1.0, 2 / 3)
    total = report.total
    assert (total.size, total.budget, total.free, total.reset, total.largest_reset) == (6, 2, 2, 4, 4.0)
    assert total.share_of_squares == (1 + 4) / (95 + 5)
    assert math.isnan(total.threshold)
    lines = str(report).splitlines()
    assert lines[2].split() == ["mixer.weight", "4", "1", "4", "3", "4", "6.67%", "1.05%"]
    assert lines[-1].split() == ["total", "6", "2", "4", "4", "16.67%", "5.00%"]


def test_figures_of_tensors_longer_than_a_tile(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_dst.extraction.figures.TILE", 7)
    torch.manual_seed(0)
    seed = {"a.weight": torch.randn(9, 5), "b.bias": torch.randn(11)}
    tuned = {n: t + torch.randn_like(t) * (torch.rand_like(t) > 0.3) for n, t in seed.items()}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 9, bias=False), nn.Module()
            self.b.bias = nn.Parameter(torch.zeros(11))

    base = Net()
    base.load_state_dict(seed)
    figures = run(tmp_path, base, tuned, siloing="none", distance="absolute", num_free_parameters=10).silos[0]
    change = torch.cat([(tuned[n].double() - seed[n].double()).flatten().abs() for n in seed])
    order = change.sort(descending=True).values
    assert figures.changed == int((change > 0).sum()) < 56
    assert figures.absolute == pytest.approx(float(change.sum()), rel=1e-12)
    assert figures.squares_kept == pytest.approx(float(order[:10].square().sum()), rel=1e-12)
    assert figures.largest_reset == pytest.approx(float(order[10]), rel=1e-6)
    assert figures.threshold == pytest.approx(float(order[9]), rel=1e-6)


def test_the_folder_is_what_save_pretrained_writes(pair, tmp_path):
    """Key for key and field for field, but for the values: compared with an adapter trained on the same base."""
    load, _, _ = pair()
    config = DSTConfig(epsilon=0.02, modules_to_save=["classifier"])
    model = get_peft_model(load(), config)
    train(model, "bert")
    model.save_pretrained(tmp_path / "trained")
    run(tmp_path, modules_to_save=["classifier"])
    ours, theirs = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("out", "trained"))
    # At this budget one small matrix or another may have no entries.
    assert len(ours.keys() & theirs.keys()) > 30
    assert all(ours[n].dtype == theirs[n].dtype for n in ours.keys() & theirs.keys())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "trained").iterdir()}
    for read in (lambda f: json.loads((f / "adapter_config.json").read_text()), metadata):
        one, other = (read(tmp_path / folder) for folder in ("out", "trained"))
        both = one["records"].keys() & other["records"].keys()
        assert all([type(v) for v in one["records"][n]] == [type(v) for v in other["records"][n]] for n in both)
        assert all(one["records"][n][2].keys() == other["records"][n][2].keys() for n in both)
        assert {**one, "records": 0} == {**other, "records": 0}
    cards = [(tmp_path / folder / "README.md").read_text() for folder in ("out", "trained")]
    assert cards[0] == cards[1]
    assert str(tmp_path / "tuned") not in cards[0]


def metadata(folder):
    return read_metadata(folder / "adapter_model.safetensors")


def test_an_extracted_adapter_is_trained_on(pair, tmp_path):
    load, _, _ = pair()
    run(tmp_path)
    model = PeftModel.from_pretrained(load(), tmp_path / "out", is_trainable=True)
    train(model, "bert", first=5)
    model.save_pretrained(tmp_path / "later")
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "later"), "bert"), logits(model, "bert"))


def test_shards(pair, tmp_path):
    _, base, tuned = pair(max_shard_size="5KB")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").is_file()
    report = run(tmp_path)
    sharded = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert report.silos == run(tmp_path, base, tuned).silos
    assert_same(sharded, load_file(tmp_path / "out" / "adapter_model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, pair, tmp_path):
    load, base, tuned = pair("llama", dtype=dtype)
    expected, _ = reference(base, tuned, epsilon=0.05)
    run(tmp_path, epsilon=0.05)
    assert {r.values.dtype for r in SparseDelta.load(tmp_path / "out").values()} == {dtype}
    loaded = PeftModel.from_pretrained(load(), tmp_path / "out")
    assert_same(weights(loaded.get_base_model()), expected)
    run(tmp_path, epsilon=1.0)
    loaded = PeftModel.from_pretrained(load(), tmp_path / "out")
    assert_same(weights(loaded.get_base_model()), weights(tuned))


def test_values_are_rounded_to_the_base_before_they_are_compared(pair, tmp_path):
    """A change that rounds to nothing takes no place of the budget."""
    _, base, tuned = pair()
    base.to(torch.bfloat16)
    run(tmp_path, base, tuned, epsilon=0.3)
    exact = load_file(tmp_path / "out" / "adapter_model.safetensors")
    run(tmp_path, base, tuned.to(torch.bfloat16), epsilon=0.3)
    assert_same(exact, load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_models_are_left_as_they_were(pair, tmp_path):
    _, base, tuned = pair("t5")
    before, live = [weights(m) for m in (base, tuned)], len(Constraint.live)
    base.encoder.requires_grad_(False)
    run(tmp_path, base, tuned)
    for model, copies in zip((base, tuned), before, strict=True):
        assert_same(weights(model), copies)
        assert not any("_sparse" in name for name, _ in model.named_modules())
        assert not hasattr(model, "peft_config")
    assert not any(p.requires_grad for p in base.encoder.parameters())
    assert base.decoder.block[0].layer[0].SelfAttention.q.weight.requires_grad
    assert len(Constraint.live) <= live


@pytest.mark.parametrize(
    "kinds", ["model+folder", "folder+model", "dict+model", "model+dict", "folder+dict", "dict+folder"]
)
def test_any_mixture_of_sources(kinds, pair, tmp_path):
    _, base, tuned = pair("gpt2")
    run(tmp_path)
    expected = load_file(tmp_path / "out" / "adapter_model.safetensors")
    made = {
        "model": lambda which, model: model,
        "folder": lambda which, model: tmp_path / which,
        "dict": lambda which, model: model.state_dict(),
    }
    one, other = kinds.split("+")
    run(tmp_path, made[one]("base", base), made[other]("tuned", tuned))
    assert_same(load_file(tmp_path / "out" / "adapter_model.safetensors"), expected)


def test_what_transformers_converts_on_loading(pair, tmp_path):
    """Mixtral's experts are joined into one tensor while they are loaded: folders are refused, models are the remedy."""
    load, base, tuned = pair("mixtral")
    with pytest.raises(
        ValueError, match=r"has no tensor for 'model.layers.0.mlp.*but holds.*pass these instead of folders"
    ):
        run(tmp_path)
    assert not (tmp_path / "out").exists()
    run(tmp_path, load("base"), load("tuned"), epsilon=0.05)
    expected, _ = reference(base, tuned, epsilon=0.05)
    loaded = PeftModel.from_pretrained(load(), tmp_path / "out")
    assert_same(weights(loaded.get_base_model()), expected)


def other_head(labels):
    config = bert().config
    config.num_labels = labels
    return hf.BertForSequenceClassification(config)


class TestDenseModules:
    """A fresh head, and whatever else modules_to_save names."""

    @pytest.fixture
    def bodies(self, tmp_path):
        """A bare encoder as the base, and a classifier tuned from it."""
        torch.manual_seed(0)
        body = bert().bert
        body.save_pretrained(tmp_path / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        train(tuned, "bert")
        tuned.save_pretrained(tmp_path / "tuned")
        return body, tuned

    def test_a_fresh_head_is_kept_whole(self, bodies, tmp_path):
        _, tuned = bodies
        report = run(tmp_path, modules_to_save=["classifier"], epsilon=1.0)
        assert report.dense == ("classifier.weight", "classifier.bias")
        base = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "out"), "bert"), logits(tuned, "bert"))
        saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert torch.equal(saved["base_model.model.classifier.weight"], tuned.classifier.weight)

    def test_the_task_may_name_the_head(self, bodies, tmp_path):
        report = run(tmp_path, task_type="SEQ_CLS")
        assert report.dense == ("classifier.weight", "classifier.bias")
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"

    def test_a_fresh_head_without_modules_to_save(self, bodies, tmp_path):
        with pytest.raises(
            ValueError, match=r"'classifier.weight', 'classifier.bias'.*modules_to_save \('classifier'\)"
        ):
            run(tmp_path)
        assert not (tmp_path / "out").exists()

    def test_a_head_that_both_have(self, pair, tmp_path):
        load, base, tuned = pair()
        report = run(tmp_path, modules_to_save=["classifier"])
        loaded = PeftModel.from_pretrained(load(), tmp_path / "out")
        inner = loaded.get_base_model()
        assert torch.equal(inner.classifier.modules_to_save["default"].weight, tuned.classifier.weight)
        assert torch.equal(inner.classifier.original_module.weight, base.classifier.weight)
        assert not any("classifier" in silo.name for silo in report.silos)

    def test_a_head_of_another_shape(self, pair, tmp_path):
        _, base, _ = pair()
        tuned = other_head(5)
        with pytest.raises(
            ValueError, match=r"'classifier.weight' is \(3, 16\) in the base and \(5, 16\) in the tuned"
        ):
            run(tmp_path, base, tuned)
        report = run(tmp_path, base, tuned, modules_to_save=["classifier"])
        assert report.dense == ("classifier.weight", "classifier.bias")

    def test_a_head_only_in_the_base_is_left_out_and_reported(self, pair, tmp_path):
        _, base, tuned = pair()
        report = run(tmp_path, base, tuned.bert)
        assert report.only_in_base == ("classifier.weight", "classifier.bias")
        assert "only in the base, left out: classifier.weight, classifier.bias" in str(report)

    def test_heads_of_other_names_may_be_one(self, pair, tmp_path):
        _, base, tuned = pair()
        tuned.score = tuned.classifier
        del tuned.classifier
        message = r"'score.weight'.*The base holds 'classifier.weight', 'classifier.bias' instead.*load both models"
        with pytest.raises(ValueError, match=message):
            run(tmp_path, base, tuned)


def test_what_the_config_does_not_tune_goes_back_and_is_reported(pair, tmp_path):
    _, base, tuned = pair()
    report = run(tmp_path, target_modules=["attention"], layers_to_transform=1, epsilon=1.0)
    assert {w for w in SparseDelta.load(tmp_path / "out") if ".layer.1.attention." not in w} == set()
    outside = [n for n in weights(base) if ".layer.1.attention." not in n]
    changed = sum(int((weights(base)[n] != weights(tuned)[n]).sum()) for n in outside)
    assert (report.untuned.changed, report.untuned.free, report.untuned.share_of_absolute) == (changed, 0, 0.0)
    assert 0 < report.total.share_of_absolute < 1
    assert "not tuned" in str(report)


def test_buffers_that_differ_are_reported(tmp_path):
    base = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    tuned = copy.deepcopy(base)
    tuned(torch.randn(5, 3))
    with torch.no_grad():
        tuned[0].weight += 1
    report = run(tmp_path, base, tuned, epsilon=0.5)
    assert report.not_carried == ("1.num_batches_tracked", "1.running_mean", "1.running_var")
    report = run(tmp_path, base, tuned, epsilon=0.5, modules_to_save=["1"])
    assert report.not_carried == ()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.1.running_var"], tuned[1].running_var)


def test_the_prefix_of_the_body(pair, tmp_path):
    """A checkpoint of the bare body calls its tensors without the prefix, and from_pretrained knows that."""
    _, base, _ = pair()
    run(tmp_path, modules_to_save=["classifier"])
    expected = load_file(tmp_path / "out" / "adapter_model.safetensors")
    run(tmp_path, base.bert, modules_to_save=["classifier"])
    assert_same(load_file(tmp_path / "out" / "adapter_model.safetensors"), expected)


def test_names_of_the_base_in_the_config(pair, tmp_path):
    _, base, tuned = pair()
    for given, options, expected in (
        (None, {}, str(tmp_path / "base")),
        (None, {"base_model_name_or_path": "org/base"}, "org/base"),
        (base.state_dict(), {}, None),
    ):
        run(tmp_path, given, tuned, **options)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == expected


def test_the_config_is_left_alone(pair, tmp_path):
    pair()
    config = DSTConfig(epsilon=0.02, modules_to_save=["classifier"], task_type="SEQ_CLS")
    before = copy.deepcopy(config.__dict__)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", config, progress=False)
    assert config.__dict__ == before


def test_progress(pair, tmp_path, capsys):
    pair()
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", DSTConfig(epsilon=0.1))
    assert "6/6" in capsys.readouterr().err
    run(tmp_path)
    assert "6/6" not in capsys.readouterr().err


class TestOutput:
    def test_an_adapter_is_overwritten_and_its_card_kept(self, pair, tmp_path):
        pair()
        run(tmp_path)
        card = tmp_path / "out" / "README.md"
        card.write_text(card.read_text() + "\nOur own words.\n")
        report = run(tmp_path, epsilon=0.1)
        assert "Our own words." in card.read_text()
        assert sum(len(r.indices) for r in SparseDelta.load(tmp_path / "out").values()) == report.total.free > 600
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    @pytest.mark.parametrize("inside", ["tuned", "lora", "file"])
    def test_anything_else_is_not(self, inside, pair, tmp_path):
        pair()
        out = tmp_path / "out"
        if inside == "tuned":
            out = tmp_path / "tuned"
        elif inside == "lora":
            get_peft_model(bert(), LoraConfig(target_modules=["query"])).save_pretrained(out)
        else:
            out.write_text("")
        with pytest.raises(ValueError, match="holds something else than a DST adapter"):
            extract(tmp_path / "base", tmp_path / "tuned", out, DSTConfig(), progress=False)

    def test_nothing_is_left_where_saving_fails(self, pair, tmp_path, monkeypatch):
        pair()
        run(tmp_path)
        before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

        def fail(*args, **kwargs):
            raise OSError("no space left")

        monkeypatch.setattr("peft.peft_model.safe_save_file", fail)
        with pytest.raises(OSError, match="no space"):
            run(tmp_path, epsilon=0.3)
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
        assert {p.name for p in tmp_path.iterdir()} == {"base", "tuned", "out"}


def renamed(model, name):
    return {n.replace("LayerNorm.weight", f"LayerNorm.{name}"): t.contiguous() for n, t in model.state_dict().items()}


def test_names_that_transformers_changed(pair, tmp_path):
    _, base, _ = pair()
    run(tmp_path)
    expected = SparseDelta.load(tmp_path / "out")
    save_file(renamed(base, "gamma"), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "out")
    run(tmp_path)
    assert SparseDelta.load(tmp_path / "out") == expected


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, tmp_path):
        yield
        assert not (tmp_path / "out").exists()

    def test_the_same_model_twice(self, pair, tmp_path):
        pair()
        with pytest.raises(ValueError, match="the same weights"):
            run(tmp_path, tuned=tmp_path / "base")

    def test_two_state_dicts(self, pair, tmp_path):
        _, base, tuned = pair()
        with pytest.raises(ValueError, match="both state dicts"):
            run(tmp_path, base.state_dict(), tuned.state_dict())

    def test_no_folder(self, pair, tmp_path):
        pair()
        with pytest.raises(ValueError, match=r"base='org/model' is not a folder.*snapshot_download"):
            run(tmp_path, base="org/model")

    def test_no_safetensors(self, pair, tmp_path):
        pair()
        (tmp_path / "base" / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"holds neither model.safetensors nor"):
            run(tmp_path)

    def test_a_damaged_file(self, pair, tmp_path):
        pair()
        path = tmp_path / "base" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"cannot be read .*damaged"):
            run(tmp_path)

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ("{}", "no readable weight_map"),
            ("[", "no readable weight_map"),
            ('{"weight_map": {"a": "../model.safetensors"}}', "outside its folder"),
            ('{"weight_map": {"a": "gone.safetensors"}}', "cannot be read"),
            ('{"weight_map": {"a": "one.safetensors"}}', "does not hold 'a'"),
        ],
    )
    def test_a_damaged_index(self, index, message, tmp_path):
        save_file({"b": torch.zeros(1)}, tmp_path / "one.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match=message):
            Checkpoint(tmp_path)

    def test_no_config(self, pair, tmp_path):
        pair()
        (tmp_path / "tuned" / "config.json").unlink()
        with pytest.raises(ValueError, match=r"no config.json that transformers can read"):
            run(tmp_path)

    def test_an_unknown_architecture(self, pair, tmp_path):
        pair()
        path = tmp_path / "tuned" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["MyBert"]}))
        with pytest.raises(ValueError, match=r"'MyBert'.*model_class"):
            run(tmp_path)
        config = DSTConfig(epsilon=0.1)
        report = extract(
            tmp_path / "base",
            tmp_path / "tuned",
            tmp_path / "elsewhere",
            config,
            model_class=hf.BertForSequenceClassification,
            progress=False,
        )
        assert report.total.free > 0

    def test_names_that_nobody_knows(self, pair, tmp_path):
        _, base, _ = pair()
        save_file(renamed(base, "scale"), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"LayerNorm.weight.*LayerNorm.scale.*load both models with from_pretrained"
        ):
            run(tmp_path)

    def test_more_in_the_tuned_state_dict_than_the_base_has(self, pair, tmp_path):
        _, base, tuned = pair()
        with pytest.raises(ValueError, match=r"state dict holds 'classifier.weight'.*Pass the tuned model itself"):
            run(tmp_path, base.bert, {n.removeprefix("bert."): t for n, t in tuned.state_dict().items()})

    def test_embeddings_of_another_size(self, pair, tmp_path):
        _, base, tuned = pair()
        tuned.resize_token_embeddings(70, mean_resizing=False)
        with pytest.raises(ValueError, match=r"word_embeddings.weight' is \(61, 16\).*resize_token_embeddings"):
            run(tmp_path, base, tuned)

    def test_tied_here_and_not_there(self, pair, tmp_path):
        _, base, tuned = pair("gpt2")
        loose = {n: t.clone() for n, t in base.state_dict().items()}
        loose["lm_head.weight"] += 1
        with pytest.raises(ValueError, match=r"base: 'transformer.wte.weight' and 'lm_head.weight' are tied"):
            run(tmp_path, loose, tuned)

    @pytest.mark.parametrize("which", ["base", "tuned"])
    def test_values_that_are_not_finite(self, which, pair, tmp_path):
        _, base, tuned = pair()
        model = {"base": base, "tuned": tuned}[which]
        with torch.no_grad():
            model.bert.pooler.dense.weight[1, 2] = math.inf
        with pytest.raises(ValueError, match=rf"'bert.pooler.dense.weight' holds values in the {which} model"):
            run(tmp_path, base, tuned)

    def test_models_with_adapters(self, pair, tmp_path):
        _, base, tuned = pair()
        with pytest.raises(ValueError, match="tuned model has PEFT adapters"):
            run(tmp_path, base, get_peft_model(tuned, DSTConfig()))

    def test_models_without_data(self, pair, tmp_path):
        _, base, tuned = pair()
        with pytest.raises(ValueError, match="meta device"):
            run(tmp_path, base.to("meta"), tuned)

    def test_quantised_weights(self, tmp_path):
        base = nn.Sequential(nn.Linear(3, 3))
        integers = {n: t.to(torch.int8) for n, t in base.state_dict().items()}
        with pytest.raises(ValueError, match="int8"):
            run(tmp_path, integers, base)

    def test_no_budget(self, pair, tmp_path):
        pair()
        with pytest.raises(ValueError, match="leaves no free parameter"):
            run(tmp_path, epsilon=1e-9)


def own_memory_of_extract(folder: Path) -> float:
    """By how many MiB the process' own memory is larger at its peak; in a process that does nothing else."""

    def anonymous() -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    def watch() -> None:
        while not done.wait(0.001):
            peak.append(anonymous())

    small = bert()
    moved = {n: t + 1 for n, t in small.state_dict().items()}
    extract(small, moved, folder / "small", DSTConfig(epsilon=0.1), progress=False)
    before, peak, done = anonymous(), [0.0], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    config = DSTConfig(epsilon=1e-4, siloing="none")
    extract(folder / "base", folder / "tuned", folder / "out", config, progress=False)
    done.set()
    thread.join()
    return max(peak) - before


def test_a_tensor_of_a_checkpoint_is_not_in_the_process_own_memory(tmp_path, apart):
    """The whole pair is looked at, with one silo over all of it; what the process holds for itself is a fraction of it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("RssAnon is Linux's")
    shapes = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 4000}
    config = hf.LlamaConfig(
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4, dtype="bfloat16", **shapes
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        names = {n: p.shape for n, p in hf.LlamaForCausalLM(config).named_parameters()}
    for i, folder in enumerate(("base", "tuned")):
        tensors = {n: torch.full(shape, 1 + i / 64, dtype=torch.bfloat16) for n, shape in names.items()}
        config.save_pretrained(tmp_path / folder)
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    grown = apart(own_memory_of_extract, tmp_path)
    size = sum((tmp_path / folder / "model.safetensors").stat().st_size for folder in ("base", "tuned")) / 2**20
    assert size > 180
    assert grown < size / 2
