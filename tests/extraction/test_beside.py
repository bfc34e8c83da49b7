"""What checkpoints hold besides tuned parameters of the same names: heads, buffers, prefixes, renamed tensors."""

from __future__ import annotations

import copy
import json
import shutil
import warnings

import pytest
import torch
import transformers as hf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from peft_dst.delta import SparseDelta
from tests.extraction.runs import renamed, run
from tests.models import assert_same, bert, checkpoint_layers, compile_layers, logits, train, weights


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


def test_names_that_transformers_changed(pair, tmp_path):
    _, base, _ = pair()
    run(tmp_path)
    expected = SparseDelta.load(tmp_path / "out")
    save_file(renamed(base, "gamma"), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "out")
    run(tmp_path)
    assert SparseDelta.load(tmp_path / "out") == expected


class TestWrappers:
    """What torch puts around a model or its layers puts its own names into those of parameters."""

    @pytest.mark.parametrize("which", ["base", "tuned", "both"])
    @pytest.mark.parametrize("wrap", [compile_layers, checkpoint_layers, "whole"])
    def test_wrapped_models(self, wrap, which, pair, tmp_path):
        _, base, tuned = pair("llama")
        options = {"modules_to_save": ["lm_head"], "distance_normalization": "size", "siloing": "none"}
        expected_report = run(tmp_path, base, tuned, **options)
        expected = load_file(tmp_path / "out" / "adapter_model.safetensors")
        models = {"base": base, "tuned": tuned}
        for name in models if which == "both" else [which]:
            if wrap == "whole":
                models[name] = torch.compile(models[name], backend="eager")
            else:
                wrap(models[name])
        before = [list(model.state_dict()) for model in models.values()]
        report = run(tmp_path, *models.values(), **options)
        assert report == expected_report
        assert_same(load_file(tmp_path / "out" / "adapter_model.safetensors"), expected)
        assert [list(model.state_dict()) for model in models.values()] == before

    def test_a_state_dict_of_a_wrapped_model(self, pair, tmp_path):
        _, base, tuned = pair()
        run(tmp_path, base, tuned)
        expected = load_file(tmp_path / "out" / "adapter_model.safetensors")
        compiled = torch.compile(tuned, backend="eager").state_dict()
        assert all(name.startswith("_orig_mod.") for name in compiled)
        run(tmp_path, base, compiled)
        assert_same(load_file(tmp_path / "out" / "adapter_model.safetensors"), expected)

    def test_the_base_s_name(self, pair, tmp_path):
        load, _, tuned = pair()
        run(tmp_path, torch.compile(load(), backend="eager"), tuned)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "base")
