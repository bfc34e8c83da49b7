"""Every kind of parameter: trained as a dense reference would, swapped out bit for bit, saved and loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from peft_dst import DSTConfig, DSTOptimizer
from peft_dst.core.reference import reference_step
from tests.models import assert_same, weights


class First(nn.Module):
    """The first of what a module returns; attention gets its input three times."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(*[x] * (3 if isinstance(self.inner, nn.MultiheadAttention) else 1))[0]


class Bare(nn.Module):
    """Parameters of the model itself, in lists and dictionaries, of no dimension, transposed, and empty."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.transposed = nn.Parameter(torch.randn(6, 8).t())
        self.strided = nn.Parameter(torch.randn(8, 12)[:, ::2])
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.listed = nn.ParameterList([torch.randn(8, 8), torch.randn(8)])
        self.named = nn.ParameterDict({"left": torch.randn(6, 8), "right": torch.randn(8)})

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.listed[0] + self.listed[1]
        return self.scale * torch.tanh(x @ (self.transposed + self.strided)) @ self.named["left"] * self.named["right"]


class Scaled(nn.Sequential):
    """A container that calls its children in turn, with a parameter of its own."""

    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


TOKENS = torch.arange(24).remainder(11).view(4, 6)
ROWS = torch.linspace(-1, 1, 32).view(4, 8).sin()
TIME = torch.linspace(-1, 1, 96).view(4, 8, 3).cos()
IMAGE = torch.linspace(-1, 1, 384).view(2, 4, 6, 8).cos()
VOLUME = torch.linspace(-1, 1, 512).view(2, 4, 4, 4, 4).cos()

KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear, LayerNorm": (lambda: nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)), ROWS),
    "RMSNorm, PReLU": (lambda: nn.Sequential(nn.RMSNorm(8), nn.PReLU(8), nn.Linear(8, 4, bias=False)), ROWS),
    "BatchNorm": (lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)), ROWS),
    "GroupNorm, InstanceNorm": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)),
        IMAGE,
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(12, 8, padding_idx=0), nn.Linear(8, 4)), TOKENS),
    "embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(12, 8), nn.Linear(8, 4)), TOKENS),
    "bilinear": (lambda: nn.Sequential(Pair(nn.Bilinear(8, 8, 5))), ROWS),
    "transformers' Conv1D": (lambda: nn.Sequential(Conv1D(16, 8), nn.Tanh(), Conv1D(4, 16)), ROWS),
    "conv 1d": (lambda: nn.Sequential(nn.Conv1d(8, 6, 2), nn.Tanh(), nn.ConvTranspose1d(6, 4, 2)), TIME),
    "conv 2d": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Tanh(), nn.ConvTranspose2d(8, 4, 2, stride=2)), IMAGE),
    "conv 2d, channels last": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 2)).to(memory_format=torch.channels_last),
        IMAGE.to(memory_format=torch.channels_last),
    ),
    "conv 2d, depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 4, 1)), IMAGE),
    "conv 3d": (lambda: nn.Sequential(nn.Conv3d(4, 4, 2), nn.Tanh(), nn.ConvTranspose3d(4, 2, 2)), VOLUME),
    "multi-head attention": (lambda: First(nn.MultiheadAttention(8, 2, bias=True, add_bias_kv=True)), ROWS),
    "multi-head attention, other widths": (lambda: First(nn.MultiheadAttention(8, 2, kdim=8, vdim=8)), ROWS),
    "LSTM": (lambda: First(nn.LSTM(3, 5, 2, bidirectional=True, batch_first=True)), TIME),
    "GRU": (lambda: First(nn.GRU(3, 5, 2)), TIME),
    "RNN cell": (lambda: nn.Sequential(nn.RNNCell(8, 6), nn.Linear(6, 3)), ROWS),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 3)), ROWS),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 6)), nn.Linear(6, 3)), ROWS),
    "orthogonal": (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 6)), nn.Linear(6, 3)), ROWS),
    "bare parameters": (Bare, ROWS),
    "a Sequential of its own": (Scaled, ROWS),
    "complex result": (lambda: nn.Sequential(nn.Linear(8, 6), Spectrum(), nn.Linear(4, 3)), ROWS),
}


class Pair(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.flip(1))


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs()


def make(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, x = KINDS[kind]
    base = build()
    with torch.no_grad():
        for parameter in base.parameters():
            # No zero seeds, whose distance would be zero.
            parameter.add_(torch.randn_like(parameter) * 0.02 + 0.01)
    return base, x


def step(model: nn.Module, x: Tensor, number: int, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(number)
    output = model(x)
    (output - torch.randn_like(output)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Running statistics move in training and are no part of an adapter."""
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if "_sparse." not in name:
            buffer.copy_(buffers[name])


@pytest.mark.parametrize("how", ["hook", "DSTOptimizer", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_parameter(kind, how, tmp_path):
    base, x = make(kind)
    fresh, dense = copy.deepcopy(base), copy.deepcopy(base)
    seed, modules = weights(base), [name for name, _ in base.named_modules()]
    model = get_peft_model(base, DSTConfig(epsilon=0.1, selection="random" if how == "static" else "dynamic"))
    constraint = model.constraint()
    assert {w.name for w in constraint.weights} == seed.keys()
    # The dense reference: the optimizer's full update, and the plain projection.
    silos = {silo.name: [w.name for w in silo.weights] for silo in constraint.silos}
    budgets = {silo.name: silo.budget for silo in constraint.silos}
    chosen = {w.name: w.indices.clone() for w in constraint.weights}
    optimizers = []
    for network in (model, dense):
        trained = [p for p in network.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
        optimizers.append(adam)
    if how == "DSTOptimizer":
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers[0] = DSTOptimizer(trained, torch.optim.AdamW, lr=0.05, weight_decay=0.0, kernels=False)
    for number in range(3):
        step(model, x, number, optimizers[0])
        step(dense, x, number, optimizers[1])
        if how == "static":
            parameters = {name: value.clone() for name, value in seed.items()}
            for name, at in chosen.items():
                flat = parameters[name].reshape(-1).clone()
                flat[at] = dense.get_parameter(name).detach().reshape(-1)[at]
                parameters[name] = flat.view(parameters[name].shape)
        else:
            parameters, _ = reference_step(seed, weights(dense), silos, budgets, "inverse_relative")
        with torch.no_grad():
            for name, value in parameters.items():
                dense.get_parameter(name).copy_(value)
        assert_same(weights(base), weights(dense))
    changed = sum(int((value != seed[name]).sum()) for name, value in weights(base).items())
    assert 0 < changed <= constraint.budget
    # Of a static subset some components have no gradient (an unused row of an embedding, a second bias).
    assert changed == constraint.budget or how == "static"
    tuned, expected = weights(base), output(model, x)
    assert torch.equal(expected, output(dense, x))
    # Swaps.
    with model.disable_adapter():
        assert_same(weights(base), seed)
    assert_same(weights(base), tuned)
    # On disk.
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        copy_buffers(base, loaded.get_base_model())
        assert torch.equal(output(loaded, x), expected)
        assert_same(weights(loaded.get_base_model()), tuned)
    # And gone.
    base = model.unload()
    assert_same(weights(base), seed)
    assert [name for name, _ in base.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert type(base) is type(fresh)

