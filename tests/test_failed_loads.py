"""Loads that fail for whatever reason leave the model as it was; what is awaited harms nobody else."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_dst import DSTConfig
from peft_dst.core import Constraint
from peft_dst.tuner import settling
from tests.models import assert_same, bert, logits, train, tuned_model, weights


def body(model):
    return {name: tensor for name, tensor in weights(model.get_base_model()).items() if "classifier" not in name}


def without_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def without_head(folder):
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if "classifier" not in key}, path)


def no_tensors(folder):
    """A value that is no tensor, in a file that can have some."""
    path = folder / "adapter_model.safetensors"
    state = {**load_file(path), "base_model.model.bert.pooler.dense._sparse.dst_values.weight": "a word"}
    path.unlink()
    torch.save(state, folder / "adapter_model.bin")


@pytest.fixture(params=[without_weights, without_head, no_tensors])
def damaged(request, saved):
    folder, _, _ = saved(modules_to_save=["classifier"])
    request.param(folder)
    return folder


def test_another_adapter_that_cannot_be_loaded(damaged, build, tmp_path):
    model, output = tuned_model(build, modules_to_save=["classifier"])
    names, live = [n for n, _ in model.named_modules()], set(Constraint.live)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    for _ in range(2):
        with pytest.raises(Exception):  # noqa: B017, PT011
            model.load_adapter(damaged, "b")
        assert [n for n, _ in model.named_modules()] == names
        assert list(model.peft_config) == ["default"]
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert set(Constraint.live) == live
    assert torch.equal(logits(model, "bert"), output["default"])
    model.save_pretrained(tmp_path / "again")


def test_the_first_adapter_cannot_be_loaded(damaged, build):
    base = build("bert")
    before, names, live = logits(base, "bert"), [n for n, _ in base.named_modules()], set(Constraint.live)
    with pytest.raises(Exception):  # noqa: B017, PT011
        PeftModel.from_pretrained(base, damaged)
    assert [n for n, _ in base.named_modules()] == names
    assert set(Constraint.live) == live
    assert torch.equal(logits(base, "bert"), before)


def test_an_adapter_loaded_over_is_kept(damaged, build):
    model, output = tuned_model(build, modules_to_save=["classifier"])
    with pytest.raises(Exception):  # noqa: B017, PT011
        model.load_adapter(damaged, "default")
    assert model.peft_config["default"].records is None
    assert torch.equal(logits(model, "bert"), output["default"])


def test_an_adapter_that_is_awaited_harms_no_other(saved, build, tmp_path, monkeypatch):
    folder, expected, _ = saved(epsilon=0.05)
    model, output = tuned_model(build)
    model.add_adapter("b", DSTConfig.from_pretrained(folder))
    looks = []
    settle = settling.settle
    monkeypatch.setattr(settling, "settle", lambda model: looks.append(1) or settle(model))
    for _ in range(3):
        assert torch.equal(logits(model, "bert"), output["default"])
    assert len(looks) == 1
    with pytest.raises(
        RuntimeError, match="adapter 'b' was added from a saved config, but its tensors were not loaded"
    ):
        model.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    # Nor is the whole model copied with one of its modules.
    model.add_adapter("c", DSTConfig(epsilon=0.02, modules_to_save=["other", "dropout"]))
    dropout = model.get_base_model().dropout.modules_to_save["c"]
    copied = [hook.args[0].model for hook in dropout._forward_pre_hooks.values()]
    assert copied == [model.get_base_model()]
    model.set_adapter("b")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="adapter 'b' was added from a saved config"):
            logits(model, "bert")
    model.load_adapter(folder, "b")
    assert torch.equal(logits(model, "bert"), expected)


@pytest.mark.parametrize("add", ["trained", "awaited"])
@pytest.mark.parametrize("load", [PeftModel.load_adapter, set_peft_model_state_dict])
def test_a_head_of_another_width(load, add, saved, build):
    """Found out before anything is loaded, unlike torch does; asked to ignore it, PEFT leaves the head out."""
    folder, _, model = saved(modules_to_save=["classifier"])
    wide = bert(num_labels=5)
    wide.load_state_dict({k: t for k, t in build("bert").state_dict().items() if "classifier" not in k}, strict=False)
    config = DSTConfig.from_pretrained(folder)
    if add == "trained":
        config.records, config.inference_mode = None, False
    other = get_peft_model(wide, config)
    if add == "trained":
        train(other, "bert", first=20)
    before = copy.deepcopy(other.state_dict())
    what = folder if load is PeftModel.load_adapter else get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match=r"classifier.*has shape \(5, 16\) in the model, and \(3, 16\) in the adapter"):
        load(other, what, adapter_name="default")
    assert_same(other.state_dict(), before)
    if add == "awaited":
        with pytest.raises(RuntimeError, match="adapter 'default' was added from a saved config"):
            logits(other, "bert")
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        load(other, what, adapter_name="default", ignore_mismatched_sizes=True)
    assert_same(body(other), body(model))
    assert logits(other, "bert").shape[-1] == 5


@pytest.mark.parametrize("others", [[], ["other"]])
def test_an_adapter_that_the_user_has_added_stays_awaited(others, saved, build, tmp_path):
    """A load that fails takes away what it has added, and nothing else."""
    folder, expected, _ = saved()
    model = get_peft_model(build("bert"), DSTConfig.from_pretrained(folder))
    for name in others:
        model.add_adapter(name, DSTConfig(epsilon=0.05))
    shutil.copytree(folder, tmp_path / "damaged")
    without_weights(tmp_path / "damaged")
    with pytest.raises(Exception):  # noqa: B017, PT011
        model.load_adapter(tmp_path / "damaged", "default")
    assert list(model.peft_config) == ["default", *others]
    with pytest.raises(RuntimeError, match="adapter 'default' was added from a saved config"):
        logits(model, "bert")
    model.load_adapter(folder, "default")
    assert torch.equal(logits(model, "bert"), expected)


@pytest.mark.parametrize("add", ["trained", "fresh"])
def test_sizes_that_do_not_matter(add, saved, build):
    """PEFT leaves out whatever has another shape than in the model."""
    folder, output, model = saved()
    tuned = weights(model.get_base_model())
    for load in ("load_adapter", "set_peft_model_state_dict"):
        other = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
        if add == "trained":
            train(other, "bert", first=20)
        if load == "load_adapter":
            other.load_adapter(folder, "default", ignore_mismatched_sizes=True)
        else:
            state = get_peft_model_state_dict(model)
            set_peft_model_state_dict(other, state, ignore_mismatched_sizes=True)
        assert_same(weights(other.get_base_model()), tuned)
        assert torch.equal(logits(other, "bert"), output)
