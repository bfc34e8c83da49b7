"""FSDP2: weights that two or four processes hold together end up as those of one process do."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint
from peft import get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from peft_dst import DSTConfig
from peft_dst.core import Constraint, choice
from peft_dst.core.shards import Together
from tests.distributed.sharded import STEPS, assert_agree, divide, make, optimizer_of, step, subsets
from tests.models import BUILDERS, batch


def train(rank, world, architecture, options, kind, dtype=torch.float32):
    model = make(world, architecture, options, dtype)
    optimizer = optimizer_of(model, kind)
    for number in range(STEPS):
        step(rank, world, model, optimizer, architecture, number)
    return subsets(model), [float(silo.threshold) for silo in model.constraint().silos]


def check(together, worlds, architecture, options, kind="hook", dtype=torch.float32):
    ((alone, thresholds),) = together(1, train, architecture, options, kind, dtype)
    for world in worlds:
        for found, limits in together(world, train, architecture, options, kind, dtype):
            assert_agree(alone, found)
            assert limits == pytest.approx(thresholds, rel=1e-4)


@pytest.mark.parametrize("kind", ["hook", "AdamW"])
@pytest.mark.parametrize("architecture", ["bert", "t5", "llama", "mixtral", "vit"])
def test_processes_agree_with_one(together, architecture, kind):
    check(together, [2, 4] if architecture == "bert" else [2], architecture, {"epsilon": 0.02}, kind)


def train_by_parts(rank, world, *args):
    messages = []
    reduce = Together.reduce

    def counted(processes, tensor, *rest):
        messages.append(tensor.shape)
        return reduce(processes, tensor, *rest)

    with mock.patch.object(choice, "_MOST_PENDING", 100), mock.patch.object(Together, "reduce", counted):
        return *train(rank, world, *args), len(messages)


@pytest.mark.parametrize("kind", ["hook", "AdamW"])
def test_many_candidates_are_not_held_at_once(together, kind):
    options = {"epsilon": 0.02}
    ((alone, _),) = together(1, train, "bert", options, kind)
    parts = together(2, train_by_parts, "bert", options, kind)
    assert len({messages for *_, messages in parts}) == 1
    for found, _, messages in parts:
        assert_agree(alone, found)
        # At once it would be four a step, and one more at first.
        assert messages > 4 * STEPS + 10


@pytest.mark.parametrize(
    "options",
    [
        {"siloing": "none"},
        {"siloing": "parameter", "distance": "relative", "exclude_modules": ["key"]},
        {"siloing": "module", "distance": "absolute", "distance_normalization": "size", "exclude_modules": ["key"]},
        {"siloing": "none", "distance_normalization": "mean"},
        {"selection": "first_step"},
        {"churn_interval": 2},
        # Silos of one entry, which one process holds.
        {"epsilon": None, "num_free_parameters": 6, "churn_interval": 3},
        {"siloing": "module", "distance_normalization": "mean", "selection": "first_step"},
        # Gradients of keys' biases are nothing but rounding.
        {"epsilon": 1.0, "exclude_modules": ["key"]},
        {"epsilon": None, "num_free_parameters": 3},
    ],
)
def test_every_kind_of_silo_and_of_choice(together, options):
    check(together, [2], "bert", {"epsilon": 0.02, **options})


@pytest.mark.parametrize("kind", ["SGD", "Adagrad", "RMSprop"])
def test_dst_optimizer_of_others(together, kind):
    check(together, [2], "bert", {"epsilon": 0.02}, kind)


def test_half_precision_keeps_exact_values(together):
    ((alone, _),) = together(1, train, "bert", {"epsilon": 0.02}, "AdamW", torch.bfloat16)
    for found, _ in together(2, train, "bert", {"epsilon": 0.02}, "AdamW", torch.bfloat16):
        # Gradients are rounded to bfloat16 before they are summed, so what is next to the threshold may differ.
        same = sum(int(torch.isin(alone[name][0], found[name][0]).sum()) for name in alone)
        assert same > 0.8 * sum(indices.numel() for indices, _ in alone.values())


def accumulate(rank, world):
    model = make(world, "bert", {"epsilon": 0.02})
    optimizer = optimizer_of(model, "hook")
    for number in range(4):
        if world > 1:
            model.set_requires_gradient_sync(number % 2 == 1)
        rows = {k: v[rank::world] for k, v in batch("bert", number).items()}
        (model(**rows).loss / 2).backward()
        if number % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    return subsets(model)


def test_gradients_accumulate_and_are_clipped(together):
    (alone,) = together(1, accumulate)
    for found in together(2, accumulate):
        assert_agree(alone, found)


def train_under(rank, world, kind, policies):
    torch.manual_seed(0)
    model = get_peft_model(BUILDERS["llama"](), DSTConfig(epsilon=0.02))
    before = {weight.name: weight.parameter.detach().clone() for weight in model.constraint().weights}
    divide(model, **policies)
    optimizer = optimizer_of(model, kind)
    for number in range(2):
        step(rank, world, model, optimizer, "llama", number)
    now = {weight.name: weight.parameter.full_tensor() for weight in model.constraint().weights}
    assert all(parameter.dtype == torch.float32 for parameter in now.values())
    assert sum(int((now[name] != before[name]).sum()) for name in now) == model.constraint().budget
    return subsets(model)


@pytest.mark.parametrize(
    ("kind", "policies"),
    [
        # Computed in bfloat16 from float32 shards.
        ("hook", {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}),
        ("AdamW", {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}),
        ("hook", {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    ],
)
def test_policies_of_fsdp(together, kind, policies):
    one, other = together(2, train_under, kind, policies)
    assert_agree(one, other, rtol=0, atol=0)


def train_several(rank, world, kind):
    """Models whose constraints each process has in another order, which is that of addresses."""
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(get_peft_model(BUILDERS["bert"](), DSTConfig(epsilon=0.01 * (seed + 1))))
        if world > 1:
            divide(models[-1])
    optimizer = optimizer_of(nn.ModuleList(models), kind)
    found = [model.constraint() for model in models]
    with mock.patch.object(Constraint, "live", found[::-1] if rank else found):
        for number in range(2):
            rows = {k: v[rank::world].contiguous() for k, v in batch("bert", number).items()}
            sum(model(**rows).loss for model in models).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [subsets(model) for model in models]


@pytest.mark.parametrize("kind", ["hook", "AdamW"])
def test_several_models_under_one_optimizer(together, kind):
    (alone,) = together(1, train_several, kind)
    for found in together(2, train_several, kind):
        for mine, theirs in zip(alone, found, strict=True):
            assert_agree(mine, theirs)


def resume(rank, world, folder, options, kind, dtype, phase):
    """Straight on, or from a checkpoint of torch.distributed's in a fresh model; there what was loaded, or also the end."""
    model = make(world, "bert", options, dtype)
    optimizer = optimizer_of(model, kind)
    if phase == "train":
        for number in range(2):
            step(rank, world, model, optimizer, "bert", number)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        torch.distributed.checkpoint.save(state, checkpoint_id=folder)
    else:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        torch.distributed.checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    found = subsets(model)
    if phase == "look":
        return found
    for number in range(2, 4):
        step(rank, world, model, optimizer, "bert", number)
    return found, subsets(model)


@pytest.mark.parametrize(
    ("options", "kind", "dtype"),
    [
        ({"selection": "first_step"}, "AdamW", torch.float32),
        ({"churn_interval": 3}, "hook", torch.float32),
        ({}, "AdamW", torch.bfloat16),
    ],
)
def test_training_is_resumed(together, tmp_path, options, kind, dtype):
    arguments = str(tmp_path), {"epsilon": 0.02, **options}, kind, dtype
    straight = together(2, resume, *arguments, "train")
    resumed = together(2, resume, *arguments, "resume")
    for one, other in zip(straight, resumed, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert_agree(mine, theirs, rtol=0, atol=0)
    for taken_up in together(4, resume, *arguments, "look"):
        assert_agree(straight[0][0], taken_up, rtol=0, atol=0)
