"""Modules that are corrected, where others have a hand in what they are given and return."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_dst.delta import SparseDelta, SparseTensor
from peft_dst.mixing.corrections import Norm
from peft_dst.serving import DeltaPool
from tests.test_mixed import NAMES, check, with_adapters


def double(kind: type[nn.Module], *sizes: int) -> nn.Module:
    return kind(*sizes, dtype=torch.float64)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_hooks_of_others_see_and_change_what_a_subset_returns(kind):
    """They are called as if the subset were in the weights: what they make of an output is not corrected again."""
    base = nn.Sequential(double(nn.Embedding, 9, 4), double(nn.Linear, 4, 5), double(kind, 5))
    for module in base:
        module.register_forward_hook(lambda module, args, output: 2 * output + output.square())
    base[1].register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    model = with_adapters(base, "a", "b")
    check(model, NAMES, lambda ids, **names: model(ids, **names), ids=torch.randint(9, (4, 3)))


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_a_forward_that_others_have_replaced_is_called(kind):
    """As accelerate does, to move what a module is given to its device."""
    base = nn.Sequential(double(kind, *((4, 4) if kind is nn.Linear else (4,))))
    model = with_adapters(base, "a", "b")
    forward, calls = base[0].forward, []

    def moving(hidden: Tensor) -> Tensor:
        calls.append(hidden.shape)
        return forward(hidden)

    base[0].forward = moving
    hidden = torch.randn(4, 3, 4, dtype=torch.float64)
    check(model, NAMES, lambda hidden, **names: model(hidden, **names), hidden=hidden)
    calls.clear()
    model(hidden, adapter_names=NAMES)
    assert calls == [hidden.shape]


def test_one_row_for_all_samples():
    """Moments of a norm's input are then one row, too."""

    class Common(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = double(nn.LayerNorm, 4)

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.norm(hidden.new_tensor([0, 1, 4, 9]).view(1, 1, 4).expand(1, hidden.shape[1], 4))

    model = with_adapters(Common(), "a", "b")
    check(
        model, NAMES, lambda hidden, **names: model(hidden, **names), hidden=torch.randn(4, 3, 4, dtype=torch.float64)
    )


def test_a_model_that_is_a_single_module():
    base = double(nn.Linear, 4, 3).eval()
    hidden = torch.randn(3, 4, dtype=torch.float64)
    with DeltaPool(base) as pool:
        for name in "ab":
            values = torch.rand(2, dtype=torch.float64)
            pool.add(name, SparseDelta({"weight": SparseTensor((3, 4), torch.tensor([1, 7]), values)}))
        wanted = []
        for name, row in zip("aba", hidden, strict=True):
            with torch.no_grad(), pool.use(name):
                wanted.append(base(row[None]))
        with pool.mix(list("aba")):
            assert torch.allclose(base(hidden), torch.cat(wanted), rtol=1e-12)


class WrittenNorm(nn.Module):
    """As libraries write them out in Python."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden


def test_a_norm_with_a_whole_tensor_of_a_subset_s():
    """It is no norm of which entries are all that differs, whatever was found out when it was."""
    base = nn.Sequential(double(nn.Linear, 4, 4), WrittenNorm()).eval()
    entries = {name: SparseTensor((4,), torch.tensor([i]), torch.rand(1).double()) for i, name in enumerate("ab")}
    hidden = torch.randn(2, 3, 4, dtype=torch.float64)
    with DeltaPool(base) as pool:
        for name, tensor in entries.items():
            pool.add(name, SparseDelta({"1.weight": tensor}))
        pool.add("c", SparseDelta({}, dense={"1.weight": torch.rand(4, dtype=torch.float64)}))
        for names in ("ab", "ac"):
            wanted = []
            for name, row in zip(names, hidden, strict=True):
                with torch.no_grad(), pool.use(name):
                    wanted.append(base(row[None]))
            with pool.mix(list(names)):
                assert torch.allclose(base(hidden), torch.cat(wanted), rtol=1e-12)


def test_moments_are_used_where_they_are_exact():
    norm, hidden = nn.LayerNorm(4), torch.randn(2, 3, 4)
    output, mean, scale = Norm.call(norm.forward, hidden)
    assert torch.equal(output, norm(hidden))
    assert torch.allclose((hidden - mean) * scale, output, atol=1e-6)
    assert len(Norm.call(nn.RMSNorm(4).forward, hidden)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert len(Norm.call(norm.forward, hidden)) == 1
    assert len(Norm.call(norm.bfloat16().forward, hidden.bfloat16())) == 1
