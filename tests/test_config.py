"""DSTConfig: what it accepts, what it refuses and how, and that refusals leave the model as it was."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from peft_dst import DSTConfig
from tests.models import assert_same, bert, loss, train, weights


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epsilon": 0.0}, r"epsilon must be a fraction with 0 < epsilon <= 1, got 0\.0"),
        ({"epsilon": 1.5}, "num_free_parameters"),
        ({"epsilon": -1e-3}, "0 < epsilon"),
        ({"epsilon": float("nan")}, "got nan"),
        ({"epsilon": "0.1"}, "got '0.1'"),
        ({"epsilon": 0.1, "num_free_parameters": 5}, "two ways to set one"),
        ({"num_free_parameters": 0}, "positive integer, got 0"),
        ({"num_free_parameters": 10.5}, r"positive integer, got 10\.5"),
        ({"selection": "bitfit", "num_free_parameters": 5}, "num_free_parameters=5 cannot be kept"),
        ({"selection": "bitfit", "epsilon": 0.1}, "epsilon=0.1 cannot be kept"),
        ({"siloing": "layer"}, "siloing must be one of 'module_and_layer', 'module', 'none', 'parameter'; got 'layer'"),
        (
            {"distance_normalization": "median"},
            "must be one of 'size', 'mean', 'module_size', 'module_mean'; got 'median'",
        ),
        (
            {"distance_normalization": "mean"},
            "siloing='module_and_layer': .* Set siloing to 'module' or 'none', or leave",
        ),
        (
            {"distance_normalization": "module_mean", "siloing": "module"},
            "siloing='module': .* Set siloing to 'none', or",
        ),
        ({"selection": "best"}, "selection must be one of 'dynamic', 'first_step', .*; got 'best'"),
        ({"selection_seed": 2**63}, "selection_seed must be an integer of at most 64 bits, got 9223372036854775808"),
        ({"selection_seed": 1.0}, "selection_seed must be an integer of at most 64 bits, got 1.0"),
        ({"churn_interval": 0}, "churn_interval must be a positive integer, got 0"),
        ({"churn_interval": True}, "churn_interval must be a positive integer, got True"),
        ({"churn_interval": 2.5}, "churn_interval must be a positive integer, got 2.5"),
        ({"churn_stop": 0}, "churn_stop must be a positive number of steps or a fraction .*, got 0"),
        ({"churn_stop": 1.5}, "churn_stop must be a positive number of steps or a fraction .*, got 1.5"),
        ({"churn_stop": 1.0}, "churn_stop must be a positive number of steps or a fraction .*, got 1.0"),
        (
            {"selection": "first_step", "churn_interval": 2},
            "churn_interval=2 and churn_stop=None say when .*first_step",
        ),
        (
            {"selection": "random", "churn_stop": 5},
            "churn_interval=1 and churn_stop=5 say when .*'random' chooses once",
        ),
        (
            {"selection": "random", "threshold": "iterative"},
            "measures no distances while training, so threshold='iterative'",
        ),
        (
            {"selection": "random", "siloing": "none", "distance_normalization": "size"},
            "measures no distances .*distance_normalization='size' have no meaning",
        ),
        ({"distance": "l2"}, "distance must be one of .*'absolute'; got 'l2'"),
        ({"bias": "all"}, "bias must be one of 'none'; got 'all'.*modules_to_save"),
        ({"silo_pattern": "("}, "not a valid regular expression"),
        ({"silo_pattern": "x"}, "no group named 'module'"),
        ({"task_type": "SINGING"}, "Invalid task type: 'SINGING'"),
        ({"layers_pattern": "h"}, "without layers_to_transform"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, "cannot be combined"),
        ({"format_version": 7}, "format version 7"),
        ({"threshold": "quantile"}, "threshold must be one of 'exact', 'iterative'; got 'quantile'"),
        ({"threshold_range": 3.0}, "threshold_range=3.0 belong to threshold='iterative'"),
        (
            {"threshold": "iterative", "threshold_iterations": 0},
            "threshold_iterations must be a positive integer, got 0",
        ),
        ({"threshold": "iterative", "threshold_range": 1.0}, "threshold_range must be a finite number greater than 1"),
    ],
)
def test_bad_values_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        DSTConfig(**options)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="'epsilonn'"):
        DSTConfig(epsilonn=0.1)


def test_defaults_and_round_trip(tmp_path):
    assert DSTConfig().epsilon == 1e-3
    assert DSTConfig(num_free_parameters=10).epsilon is None
    config = DSTConfig(
        epsilon=1e-4,
        siloing="module",
        silo_pattern=[r"(?P<module>x)"],
        distance="relative",
        target_modules=["b", "a"],
        modules_to_save=["head"],
        task_type="SEQ_CLS",
    )
    config.save_pretrained(tmp_path)
    assert dataclasses.asdict(PeftConfig.from_pretrained(tmp_path)) == dataclasses.asdict(config)


def test_every_option_is_explained():
    own = [f for f in dataclasses.fields(DSTConfig) if f.name not in {f.name for f in dataclasses.fields(PeftConfig)}]
    assert len(own) > 15
    assert all(len(field.metadata["help"]) > 20 for field in own)


class Quantised(torch.Tensor):
    """Stands for torchao's tensors: a subclass whose dtype says bfloat16."""


def integer_parameter(base):
    base.bert.pooler.dense.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False)


def float8_parameter(base):
    base.bert.pooler.dense.weight = nn.Parameter(base.bert.pooler.dense.weight.detach().to(torch.float8_e4m3fn))


def subclassed_parameter(base):
    data = base.bert.pooler.dense.weight.detach().as_subclass(Quantised)
    base.bert.pooler.dense.weight = nn.Parameter(data, requires_grad=False)


def packed_buffer(base):
    base.bert.pooler.dense.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize("quantise", [integer_parameter, float8_parameter, subclassed_parameter, packed_buffer])
def test_quantised_weights_are_refused_unless_left_out(quantise):
    base = bert()
    quantise(base)
    names = [n for n, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"'bert.pooler.dense.*quantised or integer weights.*target_modules"):
        get_peft_model(base, DSTConfig(epsilon=0.1))
    assert [n for n, _ in base.named_modules()] == names
    model = get_peft_model(base, DSTConfig(epsilon=0.1, exclude_modules=["pooler"]))
    assert not any("pooler" in n for members in model.silos().values() for n in members)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"epsilon": 1e-9}, ValueError, r"epsilon=1e-09 leaves no free parameter among the 6,451.*epsilon >= 1.6e-04"),
        ({"num_free_parameters": 10**6}, ValueError, "asks for 1,000,000 free parameters, but only 6,451"),
        ({"target_modules": ["nope"]}, NoMatchingPeftModuleError, "Target modules {'nope'} not found"),
        ({"target_parameters": ["nope"]}, NoMatchingPeftModuleError, "target_parameters"),
        ({"exclude_modules": ".*"}, NoMatchingPeftModuleError, "No parameter of the base model is left to tune"),
        ({"layers_to_transform": [7]}, NoMatchingPeftModuleError, "layers_to_transform"),
    ],
)
def test_refusals_leave_the_model_alone(options, error, match):
    base = bert()
    before = [(n, p.requires_grad) for n, p in base.named_parameters()]
    seed = weights(base)
    with pytest.raises(error, match=match):
        get_peft_model(base, DSTConfig(**options))
    assert [(n, p.requires_grad) for n, p in base.named_parameters()] == before
    assert not any("_sparse" in n for n, _ in base.named_modules())
    # And the same model can still be used, with the mistake put right.
    model = get_peft_model(base, DSTConfig(epsilon=0.01))
    train(model, "bert")
    assert_same(weights(model.unload()), seed)


def test_one_adapter_cannot_copy_what_another_edits():
    model = get_peft_model(bert(), DSTConfig(epsilon=0.01), "a")
    with pytest.raises(ValueError, match=r"keeps a dense copy of 'classifier'.*adapter 'a' tunes it in place"):
        model.add_adapter("b", DSTConfig(epsilon=0.01, modules_to_save=["classifier"]))
    assert list(model.peft_config) == ["a"]
    model = get_peft_model(bert(), DSTConfig(epsilon=0.01, modules_to_save=["classifier"]), "a")
    with pytest.raises(ValueError, match=r"tunes 'classifier' in place.*modules_to_save, or to its exclude_modules"):
        model.add_adapter("b", DSTConfig(epsilon=0.01))
    model.add_adapter("b", DSTConfig(epsilon=0.01, exclude_modules=["classifier"]))


# Changes that the constraint never saw


class Unhooked:
    """An optimizer that is no torch.optim.Optimizer, as some frameworks bring."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def step(self):
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.sub_(0.1 * parameter.grad)


def test_unconstrained_training_cannot_be_saved(tmp_path):
    model = get_peft_model(bert(), DSTConfig(epsilon=0.01))
    train(model, "bert")
    model.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    loss(model, "bert").backward()
    Unhooked([p for p in model.parameters() if p.requires_grad]).step()
    tuned = weights(model.get_base_model())
    with pytest.raises(RuntimeError, match=r"'bert\.embeddings.*differs from the seed outside the subset.*torch.optim"):
        model.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    assert_same(weights(model.get_base_model()), tuned)


def test_a_single_changed_component_is_noticed(tmp_path):
    model = get_peft_model(bert(), DSTConfig(epsilon=0.01, target_modules=["attention"]))
    train(model, "bert")
    weight = model.constraint().silos[0].weights[0]
    outside = next(i for i in range(256) if i not in set(weight.indices.tolist()))
    value = weight.data.view(-1)[outside].clone()
    weight.data.view(-1)[outside] = torch.nextafter(value, value + 1)
    with pytest.raises(RuntimeError, match=f"'{weight.name}' differs from the seed"):
        model.save_pretrained(tmp_path)
    weight.data.view(-1)[outside] = value
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_are_no_changes_and_hide_none(cast, tmp_path):
    model = get_peft_model(bert(), DSTConfig(epsilon=0.01))
    train(model, "bert")
    model.to(cast)
    model.save_pretrained(tmp_path)
    model.to(torch.float32)
    model.save_pretrained(tmp_path)
    model.to(cast)
    for parameter in model.get_base_model().bert.pooler.parameters():
        parameter.data += 1
    with pytest.raises(RuntimeError, match=r"'bert.pooler.dense.weight' differs from the seed"):
        model.save_pretrained(tmp_path)


def test_changes_are_noticed_in_any_state(tmp_path):
    for state in ("disabled", "inactive"):
        model = get_peft_model(bert(), DSTConfig(epsilon=0.01))
        train(model, "bert")
        if state == "inactive":
            model.add_adapter("other", DSTConfig(epsilon=0.01))
            model.set_adapter("other")
        else:
            model.base_model.disable_adapter_layers()
        model.get_base_model().bert.pooler.dense.weight.data += 1
        with pytest.raises(RuntimeError, match="differs from the seed"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.rglob("*.safetensors"))


def test_changes_are_noticed_in_an_adapter_that_was_loaded_to_be_used(tmp_path):
    model = get_peft_model(bert(), DSTConfig(epsilon=0.01))
    train(model, "bert")
    model.save_pretrained(tmp_path / "one")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "one")
    loaded.set_adapter("default")
    train(loaded, "bert")
    loaded.save_pretrained(tmp_path / "two")
    loaded.get_base_model().bert.pooler.dense.weight.data += 1
    with pytest.raises(RuntimeError, match="differs from the seed"):
        loaded.save_pretrained(tmp_path / "two")


def test_resizing_under_an_adapter_is_named(tmp_path):
    model = get_peft_model(bert(), DSTConfig(epsilon=0.01))
    train(model, "bert")
    model.get_base_model().resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(RuntimeError, match=r"word_embeddings.weight' has changed its shape.*before get_peft_model"):
        model.save_pretrained(tmp_path)


def test_a_seed_that_is_not_finite_is_named():
    base = bert()
    base.bert.pooler.dense.bias.data[0] = float("-inf")
    model = get_peft_model(base, DSTConfig(epsilon=0.01))
    with pytest.raises(FloatingPointError, match=r"'bert.pooler.dense.bias' holds non-finite values.*exclude_modules"):
        train(model, "bert")


def test_stepping_while_disabled_is_refused():
    model = get_peft_model(bert(), DSTConfig(epsilon=0.01))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with model.disable_adapter():
        loss(model, "bert").backward()
        before = weights(model.get_base_model())
        with pytest.raises(RuntimeError, match=r"while its adapter is disabled.*Leave `disable_adapter\(\)`"):
            optimizer.step()
        assert_same(weights(model.get_base_model()), before)
    optimizer.step()
    assert 0 < sum(silo.free() for silo in model.constraint().silos) <= model.constraint().budget
