"""Static subsets: where they come from, and what is refused."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_dst import (
    DSTConfig,
    fix_subset,
    start_from,
)
from tests.models import BUILDERS, assert_same, logits, loss, train, trainable, weights
from tests.training.test_fixed import fixed, subset


def test_random_subsets_follow_their_seed(build):
    one, same, other = (subset(fixed(build, selection_seed=seed)) for seed in (0, 0, 1))
    assert_same(one, same)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("siloing", ["module_and_layer", "module", "none", "parameter"])
def test_magnitude_takes_the_largest_of_each_silo(siloing, build):
    base = build("bert")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.02, selection="magnitude", siloing=siloing))
    for silo in model.constraint().silos:
        values = torch.cat([seed[w.name].flatten().abs() for w in silo.weights])
        kept = torch.cat([seed[w.name].flatten()[w.indices].abs() for w in silo.weights])
        assert kept.numel() == silo.budget
        assert torch.equal(kept.sort().values, values.sort().values[values.numel() - silo.budget :])


def test_scores_choose_the_subset(build):
    model = get_peft_model(build("bert"), DSTConfig(num_free_parameters=3, selection="fisher", siloing="none"))
    scores = {name: torch.zeros_like(parameter) for name, parameter in build("bert").named_parameters()}
    scores["bert.pooler.dense.bias"][5] = 2.0
    scores["bert.encoder.layer.1.output.dense.weight"][3, 4] = 1.0
    scores["classifier.bias"][1] = 0.5
    scores["classifier.bias"][0] = 0.25
    positions = fix_subset(model, scores)
    assert {name: at.tolist() for name, at in positions.items() if at.numel()} == {
        "bert.pooler.dense.bias": [5],
        "bert.encoder.layer.1.output.dense.weight": [3 * 32 + 4],
        "classifier.bias": [1],
    }
    assert [tuple(p.shape) for p in trainable(model) if p.dim() == 1 and p.numel() == 1] == [(1,)] * 3


def test_the_subset_of_another_adapter(build, tmp_path):
    dynamic = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    optimizer = torch.optim.AdamW(trainable(dynamic), lr=1e-2)
    loss(dynamic, "bert").backward()
    optimizer.step()
    dynamic.save_pretrained(tmp_path / "a")
    model = get_peft_model(build("bert"), DSTConfig(selection="transfer"))
    fix_subset(model, tmp_path / "a")
    assert_same(subset(model), subset(dynamic))
    assert model.peft_config["default"].num_free_parameters == model.constraint().budget
    assert_same(weights(model.get_base_model()), weights(build("bert")))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    loss(model, "bert", 1).backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "b")
    again = PeftModel.from_pretrained(build("bert"), tmp_path / "b")
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))


@pytest.mark.parametrize("values", [False, True])
def test_a_dynamic_run_started_from_a_subset(values, build, tmp_path):
    first = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    optimizer = torch.optim.AdamW(trainable(first), lr=1e-2)
    loss(first, "bert").backward()
    optimizer.step()
    first.save_pretrained(tmp_path / "a")
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    start_from(model, tmp_path / "a", values=values)
    assert_same(subset(model), subset(first))
    wanted = first.get_base_model() if values else build("bert")
    assert_same(weights(model.get_base_model()), weights(wanted))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    kept = []
    for step in range(1, 4):
        loss(model, "bert", step).backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append(all(torch.equal(subset(model)[key], at) for key, at in subset(first).items()))
    assert kept[0]
    assert not all(kept)


@contextlib.contextmanager
def refused(model, match):
    """What is refused changes nothing: no weight, no subset, no budget, no config."""

    def state():
        silos = [(silo.name, silo.budget, silo.free()) for silo in model.constraint().silos]
        return silos, dict(vars(model.peft_config["default"])), subset(model)

    silos, config, positions = copy.deepcopy(state())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        yield
    assert state()[:2] == (silos, config)
    assert_same(positions, state()[2])
    assert_same(before, dict(model.state_dict()))


def test_refusals_of_sources(build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    ones = {name: torch.ones_like(parameter) for name, parameter in build("bert").named_parameters()}
    with refused(model, "takes no subset from outside"):
        fix_subset(model, ones)
    with refused(model, "no DST adapter 'other'"):
        fix_subset(model, ones, "other")
    with refused(model, "whose budget is"):
        start_from(model, {"classifier.weight": torch.arange(48)})
    with refused(model, "give its folder"):
        start_from(model, {"classifier.weight": torch.arange(1)}, values=True)
    with refused(model, "must ascend"):
        start_from(model, {"classifier.weight": torch.tensor([47, 46])})
    with refused(model, "must ascend"):
        start_from(model, {"classifier.weight": torch.tensor([48])})
    with refused(model, "does not have"):
        start_from(model, {"decoder.weight": torch.tensor([1])})
    with refused(model, "sorted positions"):
        start_from(model, ones)
    static = fixed(build, selection="transfer")
    with refused(static, "never leaves its subset"):
        start_from(static, {"classifier.weight": torch.arange(1)})
    once = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, selection="first_step"))
    with refused(once, "selection='first_step', which never leaves its subset"):
        start_from(once, {"classifier.weight": torch.arange(1)})
    scored = fixed(build, selection="fisher")
    with refused(scored, "chooses by scores"):
        fix_subset(scored, {"classifier.weight": torch.arange(1)})
    with refused(scored, r"classifier\.bias"):
        fix_subset(scored, {**ones, "classifier.bias": torch.ones(4)})
    fix_subset(scored, ones)
    optimizer = torch.optim.SGD(trainable(scored), lr=0.1)
    loss(scored, "bert").backward()
    optimizer.step()
    with refused(scored, "trained values already"):
        fix_subset(scored, ones)


def test_magnitudes_of_a_model_that_was_cast_since_a_step(build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    train(model, "bert", steps=1)
    model.to(torch.bfloat16)
    model.add_adapter("b", DSTConfig(epsilon=0.02, selection="magnitude"))
    alone = get_peft_model(build("bert").bfloat16(), DSTConfig(epsilon=0.02, selection="magnitude"))
    model.set_adapter("b")
    for one, other in zip(model.constraint("b").weights, alone.constraint().weights, strict=True):
        assert torch.equal(one.indices, other.indices)


def test_bitfit_needs_biases():
    with pytest.raises(ValueError, match="none of the tuned parameters is one"):
        get_peft_model(BUILDERS["llama"](), DSTConfig(selection="bitfit"))


def test_untrained_is_asked_of_the_adapter_itself(build):
    """Not of whatever is active: another adapter's training is no obstacle, and its own is one while it is inactive."""
    ones = {name: torch.ones_like(parameter) for name, parameter in build("bert").named_parameters()}
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, selection="fisher"))
    fix_subset(model, ones)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    loss(model, "bert").backward()
    optimizer.step()
    model.add_adapter("b", DSTConfig(epsilon=0.02, selection="fisher"))
    fix_subset(model, ones, "b")
    model.set_adapter("b")
    with pytest.raises(ValueError, match="trained values already"):
        fix_subset(model, ones)


def test_an_empty_subset_is_refused(build):
    model = get_peft_model(build("bert"), DSTConfig(selection="transfer"))
    with refused(model, "no free parameter"):
        fix_subset(model, {})


@pytest.mark.parametrize("selection", ["transfer", "fisher"])
def test_a_base_that_is_still_to_be_loaded_is_given_nothing(selection):
    with torch.device("meta"):
        model = get_peft_model(BUILDERS["bert"](), DSTConfig(epsilon=0.02, selection=selection))
    before = [silo.budget for silo in model.constraint().silos], dict(vars(model.peft_config["default"]))
    source = {"classifier.weight": torch.arange(3)}
    if selection == "fisher":
        source = {weight.name: torch.ones(weight.shape) for weight in model.constraint().weights}
    with pytest.raises(ValueError, match=r"has none yet \(device 'meta'\). Load the base model first"):
        fix_subset(model, source)
    assert before == ([silo.budget for silo in model.constraint().silos], dict(vars(model.peft_config["default"])))


def test_values_of_another_base_are_not_taken_over(build, saved):
    folder, _, _ = saved()
    other = build("bert")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    model = get_peft_model(other, DSTConfig(epsilon=0.02))
    with pytest.raises(ValueError, match="values differ"):
        start_from(model, folder, values=True)
    assert not any(silo.free() for silo in model.constraint().silos)


@pytest.mark.parametrize("selection", ["random", "bitfit", "magnitude", "fisher", "transfer", "dynamic"])
def test_the_default_device_is_of_no_concern(selection, build):
    """As after torch.set_default_device("cuda"); here it is one on which nothing can be calculated."""

    def made():
        epsilon = None if selection == "bitfit" else 0.02
        model = get_peft_model(build("bert"), DSTConfig(epsilon=epsilon, selection=selection))
        return model, {name: parameter.detach().abs() for name, parameter in build("bert").named_parameters()}

    (reference, scores), (model, _) = made(), made()
    positions = {"bert.pooler.dense.weight": torch.arange(0, 200, 7)}
    for one, device in ((reference, "cpu"), (model, "meta")):
        if selection in ("random", "bitfit", "magnitude"):
            with torch.device(device):
                one.add_adapter("b", DSTConfig(epsilon=one.peft_config["default"].epsilon, selection=selection))
            with one.disable_adapter():
                assert_same(weights(one.get_base_model()), weights(build("bert")))
            one.set_adapter("b")
        elif selection == "dynamic":
            train(one, "bert")
            with torch.device(device):
                one.add_weighted_adapter(["default"], [0.5], "b")
            one.set_adapter("b")
        else:
            with torch.device(device):
                fix_subset(one, scores if selection == "fisher" else positions)
    assert_same(subset(reference), subset(model))
    assert torch.equal(logits(reference, "bert"), logits(model, "bert"))


def test_chosen_under_inference_mode(build):
    model = fixed(build)
    model.add_adapter("b", DSTConfig(epsilon=0.02, selection="random"))
    with torch.inference_mode():
        model.set_adapter("b")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    loss(model, "bert").backward()
    optimizer.step()


def test_a_start_survives_a_warm_up(build, saved):
    folder, _, first = saved()
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    start_from(model, folder)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    for lr, kept in ((0.0, True), (0.1, True), (0.1, False)):
        optimizer.param_groups[0]["lr"] = lr
        loss(model, "bert", 1).backward()
        optimizer.step()
        same = all(torch.equal(subset(model)[key], at) for key, at in subset(first).items())
        assert same == kept
