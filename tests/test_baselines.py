"""LoRA and prompts of a given size; penalties towards the seed."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from torch import nn

from peft_dst.baselines import Match, SeedPenalty, lora_config_for_budget, prompt_tuning_config_for_budget
from tests.models import assert_same, loss, weights


# What PEFT says to LoRA on GPT-2's Conv1D.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
MATCHERS = {"lora": lora_config_for_budget, "prompt": prompt_tuning_config_for_budget}


def real_count(model: nn.Module, config: PeftConfig) -> int:
    """What PEFT counts on the model itself, without the heads that are trained densely."""
    wrapped = get_peft_model(model, config)
    dense = sum(p.numel() for n, p in wrapped.named_parameters() if p.requires_grad and "modules_to_save" in n)
    return wrapped.get_nb_trainable_parameters()[0] - dense


def other_size(config: PeftConfig, change: int, task: str) -> PeftConfig:
    if isinstance(config, LoraConfig):
        return LoraConfig(r=config.r + change, target_modules=config.target_modules, task_type=task)
    return PromptTuningConfig(num_virtual_tokens=config.num_virtual_tokens + change, task_type=task)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", MATCHERS)
@pytest.mark.parametrize("budget", [2500, 20_000])
def test_counts_are_those_of_peft_and_no_other_size_is_nearer(build, name, kind, budget):
    config, match = MATCHERS[kind](build(name), budget, task_type=TASKS[name])
    assert match.trainable == real_count(build(name), config)
    assert match.budget == budget
    for change in (-1, 1):
        other = real_count(build(name), other_size(config, change, TASKS[name]))
        assert abs(other - budget) >= abs(match.difference)


def test_lora_by_hand(build):
    """A layer's linear modules have 4 · (16 + 16) + 2 · (16 + 32) = 224 parameters a rank; with the pooler 480 in all."""
    config, match = lora_config_for_budget(build("bert"), 2000, task_type="SEQ_CLS")
    assert (config.r, config.target_modules) == (4, "all-linear")
    assert match == Match(trainable=1920, budget=2000)
    assert (match.difference, match.relative) == (-80, -0.04)
    assert str(match) == "1,920 trainable parameters for a budget of 2,000 (-4.0%)"


def test_of_two_equally_near_ranks_the_smaller(build):
    config, match = lora_config_for_budget(build("bert"), 1200, task_type="SEQ_CLS")
    assert (config.r, match.difference) == (2, -240)


def test_t5_has_a_prompt_for_each_half(build):
    config, match = prompt_tuning_config_for_budget(build("t5"), 100, task_type="SEQ_2_SEQ_LM")
    assert (config.num_virtual_tokens, match.trainable) == (3, 3 * 2 * 16)


@pytest.mark.parametrize("kind", MATCHERS)
def test_a_dense_head_is_not_counted(build, kind):
    bare, head = (
        MATCHERS[kind](build("bert"), 2000, task_type="SEQ_CLS", modules_to_save=modules)[1].trainable
        for modules in (None, ["pooler"])
    )
    # A pooler that is trained densely is no target of LoRA's any more: 448 a rank.
    assert (bare, head) == {"lora": (1920, 1792), "prompt": (2000, 2000)}[kind]


@pytest.mark.parametrize("kind", MATCHERS)
def test_options_are_passed_on_and_left_alone(build, kind):
    options = {"lora": {"lora_alpha": 3}, "prompt": {"prompt_tuning_init": "SAMPLE_VOCAB"}}[kind]
    modules = ["pooler"]
    config, _ = MATCHERS[kind](build("bert"), 2000, task_type="SEQ_CLS", modules_to_save=modules, **options)
    assert modules == config.modules_to_save == ["pooler"]
    for name, value in options.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize("name", TASKS)
def test_the_model_is_left_alone(build, name):
    model = build(name)
    first = next(iter(model.parameters())).requires_grad_(False)
    before, modules = weights(model), [type(module) for module in model.modules()]
    lora_config_for_budget(model, 500, narrow=True, task_type=TASKS[name])
    prompt_tuning_config_for_budget(model, 500, task_type=TASKS[name])
    assert_same(weights(model), before)
    assert [type(module) for module in model.modules()] == modules
    assert [p for p in model.parameters() if not p.requires_grad] == [first]


def test_too_small_a_budget_is_said(build):
    with pytest.warns(UserWarning, match=r"rank 1 has 480 .* budget of 100 \(\+380.0%\); narrow=True"):
        config, match = lora_config_for_budget(build("bert"), 100, task_type="SEQ_CLS")
    assert (config.r, match.trainable) == (1, 480)
    with pytest.warns(UserWarning, match="prompt of 1 virtual tokens has 16"):
        prompt_tuning_config_for_budget(build("bert"), 5, task_type="SEQ_CLS")


@pytest.mark.parametrize(
    ("budget", "rank", "trainable", "targets"),
    [
        # Queries and values of both layers have 128 a rank; all linear modules 480.
        (400, 1, 480, "all-linear"),
        (260, 2, 256, {"query", "value"}),
        (110, 1, 128, {"query", "value"}),
        (
            100,
            1,
            96,
            {f"bert.encoder.layer.{n}.attention.self.{m}" for n, m in ((1, "query"), (0, "value"), (1, "value"))},
        ),
        (30, 1, 32, {"bert.encoder.layer.1.attention.self.value"}),
    ],
)
def test_narrowed(build, budget, rank, trainable, targets):
    config, match = lora_config_for_budget(build("bert"), budget, narrow=True, task_type="SEQ_CLS")
    assert (config.r, match.trainable) == (rank, trainable)
    assert config.target_modules == targets
    assert real_count(build("bert"), config) == trainable


@pytest.mark.parametrize("name", TASKS)
def test_narrowed_counts_are_those_of_peft(build, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config, match = lora_config_for_budget(build(name), 150, narrow=True, task_type=TASKS[name])
    assert match.trainable == real_count(build(name), config)
    assert abs(match.relative) < 0.3


def test_narrowing_what_the_caller_targets(build):
    options = {"target_modules": ["key"], "task_type": "SEQ_CLS"}
    config, match = lora_config_for_budget(build("bert"), 30, narrow=True, **options)
    assert config.target_modules == {"bert.encoder.layer.1.attention.self.key"}
    assert match.trainable == 32


def test_even_the_last_module_can_be_too_much(build):
    with pytest.warns(UserWarning, match=r"rank 1 has 32 trainable parameters for a budget of 10 \(\+220.0%\)\."):
        lora_config_for_budget(build("bert"), 10, narrow=True, task_type="SEQ_CLS")


@pytest.mark.parametrize("budget", [0, -1, 1e3, True])
@pytest.mark.parametrize("kind", MATCHERS)
def test_budgets_are_positive_integers(build, kind, budget):
    with pytest.raises(ValueError, match="budget must be a positive integer"):
        MATCHERS[kind](build("bert"), budget)


def test_the_size_is_not_for_the_caller_to_give(build):
    with pytest.raises(ValueError, match="r=8 is given, but the budget of 100 decides it"):
        lora_config_for_budget(build("bert"), 100, r=8)
    with pytest.raises(ValueError, match="num_virtual_tokens=8 is given, but the budget of 100 decides it"):
        prompt_tuning_config_for_budget(build("bert"), 100, num_virtual_tokens=8)


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.body = nn.Linear(2, 1, dtype=dtype)
        self.head = nn.Linear(1, 1, dtype=dtype)


@pytest.mark.parametrize(("kind", "value", "gradient"), [("l1", 0.25, [0.1, -0.1]), ("l2", 0.425, [0.1, -0.4])])
def test_penalty_by_hand(kind, value, gradient):
    model = Two()
    penalty = SeedPenalty(model, kind, 0.1, exclude=["head"])
    assert penalty.names == ["body.weight", "body.bias"]
    assert penalty.penalty() == 0
    with torch.no_grad():
        model.body.weight += torch.tensor([[0.5, -2.0]])
        model.head.weight += 7
    assert penalty.penalty().item() == pytest.approx(value)
    penalty.add_gradient()
    assert model.body.weight.grad.flatten().tolist() == pytest.approx(gradient)
    assert model.body.bias.grad.tolist() == [0]
    assert model.head.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_gradient_without_a_graph_is_that_of_the_penalty(build, name, kind, dtype):
    gradients = []
    for way in ("graph", "add_gradient"):
        model = build(name).to(dtype)
        # Some parameters get no gradient from the loss: positions, or those that this takes out of it.
        penalty = SeedPenalty(model, kind, 0.01, exclude=["embeddings"] if name == "bert" else [])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
        objective = loss(model, name)
        if way == "graph":
            # In this order the loss's gradient is there when the penalty's is added.
            objective.backward()
            penalty.penalty().backward()
        else:
            objective.backward()
            penalty.add_gradient()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same(*gradients)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_a_parameter_without_a_gradient_gets_the_penaltys(kind):
    model = Two()
    penalty = SeedPenalty(model, kind, 0.1)
    with torch.no_grad():
        model.body.bias += 1
    penalty.penalty().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    penalty.add_gradient()
    assert_same({n: p.grad for n, p in model.named_parameters()}, expected)


def test_it_keeps_a_model_near_its_seed(build):
    distances = []
    for coefficient in (1e-9, 5.0):
        model = build("bert")
        seed = weights(model)
        penalty = SeedPenalty(model, "l2", coefficient)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(10):
            loss(model, "bert", step).backward()
            penalty.add_gradient()
            optimizer.step()
            optimizer.zero_grad()
        distances.append(sum((p.detach() - seed[n]).abs().sum().item() for n, p in model.named_parameters()))
    assert distances[1] < 0.8 * distances[0]


def test_which_parameters_are_penalised(build):
    model = build("bert")
    model.bert.embeddings.requires_grad_(False)
    everything = SeedPenalty(model, "l1", 1.0).names
    assert everything == [n for n, p in model.named_parameters() if p.requires_grad]
    without = SeedPenalty(model, "l1", 1.0, exclude=["pooler", "classifier", "encoder.layer.0"]).names
    assert without == [n for n in everything if ".layer.1." in n]
    given = SeedPenalty(model, "l1", 1.0, ["classifier.bias", "classifier.weight"], exclude=["bias"])
    assert given.names == ["classifier.weight"]


def test_a_shared_parameter_is_penalised_once(build):
    model = build("gpt2")
    assert SeedPenalty(model, "l2", 1.0).names.count("transformer.wte.weight") == 1
    assert "lm_head.weight" not in SeedPenalty(model, "l2", 1.0).names


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("l0", 1.0), {}, "kind must be 'l1' or 'l2', got 'l0'"),
        (("l1", 0.0), {}, "coefficient must be a positive number, got 0.0"),
        (("l1", float("nan")), {}, "coefficient must be a positive number, got nan"),
        (("l1", 1.0, ["body"]), {}, "the model has no parameter 'body'"),
        (("l1", 1.0), {"exclude": ["clasifier"]}, "exclude names 'clasifier'"),
        (("l1", 1.0), {"exclude": ["ead"]}, "exclude names 'ead'"),
        (("l1", 1.0), {"exclude": ["body", "head"]}, "no trainable parameter is left"),
    ],
)
def test_wrong_penalties_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        SeedPenalty(Two(), *arguments, **options)
