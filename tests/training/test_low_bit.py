"""DSTOptimizer around optimizers that keep their state in a few bits."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.optim import Optimizer

from peft_dst import DSTConfig, DSTOptimizer
from tests.models import assert_same, bert, loss, trainable, weights
from tests.training.resuming import assert_resumed_equals_uninterrupted


class Momentum8bit(Optimizer):
    """SGD whose momentum is in bytes: stands for the libraries', where those are not installed."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, momentum = self.state[parameter], parameter.grad
                if state:
                    momentum = momentum + 0.9 * (state["codes"].float() - 127) * state["scale"]
                state["scale"] = (momentum.abs().max() / 127).clamp_min(1e-30)
                state["codes"] = (momentum / state["scale"]).round_().add_(127).to(torch.uint8)
                parameter.sub_(momentum, alpha=group["lr"])


def torchao(name):
    return getattr(pytest.importorskip("torchao.optim", reason="torchao is not installed"), name)


def bitsandbytes(name):
    return getattr(pytest.importorskip("bitsandbytes.optim", reason="bitsandbytes is not installed"), name)


OPTIMIZERS = {
    "stand-in": lambda: Momentum8bit,
    "torchao, 8 bits": lambda: torchao("AdamW8bit"),
    "torchao, 4 bits": lambda: torchao("AdamW4bit"),
    "bitsandbytes, 8 bits": lambda: bitsandbytes("AdamW8bit"),
}


# The libraries keep tensors of less than 4,096 entries in float32.
@pytest.fixture
def model():
    def make(dtype=torch.float32):
        torch.manual_seed(0)
        base = bert(hidden_size=64, intermediate_size=128)
        return get_peft_model(base.to(dtype), DSTConfig(epsilon=0.02))

    return make


def kinds_of_state(optimizer):
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [
        {key: (type(value), value.dtype) for key, value in optimizer.state[parameter].items() if torch.is_tensor(value)}
        for parameter in parameters
    ]


@pytest.fixture(params=OPTIMIZERS)
def optimizer_cls(request):
    with torch.compiler.set_stance("force_eager"):
        yield OPTIMIZERS[request.param]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_resumed_equals_uninterrupted(optimizer_cls, dtype, model, tmp_path):
    def make():
        made = model(dtype)
        return made, DSTOptimizer(trainable(made), optimizer_cls, separable=True, lr=1e-2)

    def check(interrupted, resumed):
        kinds = kinds_of_state(resumed[1])
        assert kinds == kinds_of_state(interrupted[1])
        assert any(dtype == torch.uint8 or kind is not torch.Tensor for each in kinds for kind, dtype in each.values())

    assert_resumed_equals_uninterrupted(make, tmp_path, check)


def test_equals_the_hook(optimizer_cls, model):
    one, other = model(), model()
    plain = optimizer_cls(trainable(one), lr=1e-2)
    ours = DSTOptimizer(trainable(other), optimizer_cls, separable=True, lr=1e-2)
    for step in range(3):
        for each, optimizer in ((one, plain), (other, ours)):
            loss(each, "bert", step).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same(weights(one.base_model.model), weights(other.base_model.model))
