"""AdamW's step on tiles of zeros: what `select` finds on what torch's fused kernel makes of weights, to the last bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from peft_dst.core import adamw_tiles
from peft_dst.core.adamw import AdamWOptions, AdamWTensor, NonFiniteStepError, adamw_scalars
from peft_dst.core.adamw_tiles import _TILE, rounds_as_torch, step_and_select
from peft_dst.core.distances import DISTANCES
from peft_dst.core.selection import select


OPTIONS = AdamWOptions(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=0.0)


@dataclass
class Twin:
    """A silo stepped on tiles and, beside it, by torch's kernel on a dense Θ."""

    seeds: list[torch.Tensor]
    options: list[AdamWOptions]
    budget: int
    moments: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    dense: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    indices: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self):
        for seed in self.seeds:
            self.moments.append((torch.zeros(seed.shape), torch.zeros(seed.shape)))
            self.dense.append((torch.zeros(seed.shape), torch.zeros(seed.shape)))
            self.indices.append(torch.empty(0, dtype=torch.int64))
            self.values.append(torch.empty(0))

    def tensors(self, grads):
        self.options = [own._replace(step=own.step + 1) for own in self.options]
        found = []
        for i, seed in enumerate(self.seeds):
            at = self.indices[i]
            weight = seed.flatten().index_copy(0, at, self.values[i].to(seed.dtype)).view(seed.shape)
            bound = float(seed.float().abs().max()) if seed.numel() else 0.0
            seeds = seed.flatten()[at]
            found.append(
                AdamWTensor(weight, grads[i], *self.moments[i], self.options[i], at, seeds, self.values[i], bound)
            )
        return found

    def reference(self, grads, kind):
        updates = []
        for i, seed in enumerate(self.seeds):
            theta, options = seed.float().flatten().index_copy(0, self.indices[i], self.values[i]), self.options[i]
            parameter = torch.nn.Parameter(theta.view(seed.shape))
            parameter.grad = grads[i].float()
            optimizer = torch.optim.AdamW(
                [parameter],
                lr=options.lr,
                betas=(options.beta1, options.beta2),
                eps=options.eps,
                weight_decay=options.weight_decay,
                fused=True,
            )
            first, second = self.dense[i]
            optimizer.state[parameter] = {
                "step": torch.tensor(options.step - 1),
                "exp_avg": first,
                "exp_avg_sq": second,
            }
            optimizer.step()
            updates.append(parameter.detach().flatten())
        return select([seed.flatten() for seed in self.seeds], updates, self.budget, kind), updates

    def check(self, chosen, grads, kind):
        expected, updates = self.reference(grads, kind)
        for own, dense in zip(self.moments, self.dense, strict=True):
            assert torch.equal(own[0], dense[0])
            assert torch.equal(own[1], dense[1])
        for i, at in enumerate(expected.indices):
            assert torch.equal(chosen.selection.indices[i], at)
            assert torch.equal(chosen.values[i], updates[i][at])
        assert torch.equal(chosen.selection.threshold, expected.threshold)
        self.indices, self.values = chosen.selection.indices, chosen.values


def gradients(seeds, dtype=torch.float32, sparsity=0.3):
    return [(torch.randn(s.shape) * 1e-3 * (torch.rand(s.shape) > sparsity)).to(dtype) for s in seeds]


# A tile and more, a whole number of blocks, tails of all lengths, and nothing at all.
SHAPES = [(300, 333), (17,), (5,), (_TILE + 1001,), (0,), (64, 64)]


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("weights", "grads"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("budget", [0, 1, 60, 1000])
def test_as_the_dense_step(kind, weight_decay, weights, grads, budget):
    torch.manual_seed(0)
    seeds = [(torch.randn(shape) * 0.05).to(weights) for shape in SHAPES]
    seeds[0][:10] = 0.0
    twin = Twin(seeds, [OPTIONS._replace(weight_decay=weight_decay)] * len(seeds), budget)
    for _ in range(5):
        found = gradients(seeds, grads)
        (chosen,) = step_and_select([twin.tensors(found)], [budget], kind)
        twin.check(chosen, found, kind)


def test_several_silos_with_options_and_steps_of_their_own():
    torch.manual_seed(0)
    shapes = [[(200, 100), (100,)], [(300, 70), (33,), (70,)], [(50, 50)]]
    twins = []
    for number, own in enumerate(shapes):
        seeds = [torch.randn(shape) * 0.05 for shape in own]
        options = [
            OPTIONS._replace(lr=1e-2 / (1 + number), weight_decay=0.1 * (i == 0), step=float(number == 1 and i))
            for i in range(len(own))
        ]
        twins.append(Twin(seeds, options, 20))
    for _ in range(6):
        grads = [gradients(twin.seeds) for twin in twins]
        chosen = step_and_select(
            [twin.tensors(own) for twin, own in zip(twins, grads, strict=True)], [20] * 3, "inverse_relative"
        )
        for twin, made, own in zip(twins, chosen, grads, strict=True):
            twin.check(made, own, "inverse_relative")


@pytest.mark.parametrize("still", [(1, 2), (3,), (4, 5, 6)])
def test_where_the_learning_rate_is_zero_nothing_new_moves(still):
    torch.manual_seed(0)
    seeds = [torch.randn(400, 100) * 0.05]
    twin = Twin(seeds, [OPTIONS], 40)
    for step in range(1, 7):
        twin.options = [OPTIONS._replace(lr=0.0 if step in still else 1e-2, step=step - 1.0)]
        grads = gradients(seeds)
        (chosen,) = step_and_select([twin.tensors(grads)], [40], "inverse_relative")
        twin.check(chosen, grads, "inverse_relative")


@pytest.mark.parametrize("kind", DISTANCES)
def test_ties_are_chosen_from_a_dense_update(kind, monkeypatch):
    """Where a first step moves all components alike, most blocks reach the bound."""
    seeds = [torch.full((300, 100), 0.5), torch.full((3000,), 0.5)]
    grads = [torch.ones(seed.shape) for seed in seeds]
    whole = []
    wrapped = adamw_tiles._Batch._choose_on_the_whole
    monkeypatch.setattr(
        adamw_tiles._Batch,
        "_choose_on_the_whole",
        lambda batch, number: whole.append(number) or wrapped(batch, number),
    )
    twin = Twin(seeds, [OPTIONS] * 2, 50)
    for _ in range(3):
        (chosen,) = step_and_select([twin.tensors(grads)], [50], kind)
        twin.check(chosen, grads, kind)
    assert whole


def test_a_component_that_comes_back_to_its_seed_leaves():
    """It is not found again as one that was outside, either, though its block is looked at for those beside it."""
    torch.manual_seed(0)
    seed = torch.randn(20_000) * 0.05
    seed[6:9] = 5.0
    grads = gradients([seed], sparsity=0.0)
    # Of the values around the seed less its update, one is taken back to the seed exactly.
    around = seed[7] - torch.arange(-30_000, 30_000) * torch.finfo(torch.float32).eps * 4
    moved = torch.nn.Parameter(around.clone())
    moved.grad = grads[0][7].expand(len(around)).clone()
    torch.optim.AdamW([moved], lr=OPTIONS.lr, weight_decay=0.0, fused=True).step()
    before = around[moved.detach() == seed[7]]
    twin = Twin([seed], [OPTIONS], 10)
    twin.indices, twin.values = [torch.tensor([7])], [before[:1]]
    (chosen,) = step_and_select([twin.tensors(grads)], [10], "inverse_relative")
    found = chosen.selection.indices[0].tolist()
    assert {6, 8} < set(found)
    assert 7 not in found
    twin.check(chosen, grads, "inverse_relative")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["outside", "in the subset", "in a tail"])
def test_what_is_not_finite_is_named(value, where):
    torch.manual_seed(0)
    silos = [[torch.randn(30, 30)], [torch.randn(200, 100), torch.randn(77)]]
    twins = [Twin(seeds, [OPTIONS] * len(seeds), 5) for seeds in silos]
    for twin in twins:
        grads = gradients(twin.seeds)
        (chosen,) = step_and_select([twin.tensors(grads)], [5], "inverse_relative")
        twin.check(chosen, grads, "inverse_relative")
    grads = [gradients(twin.seeds) for twin in twins]
    inside = int(twins[1].indices[0][0])
    tensor, position = {"outside": (0, inside + 1), "in the subset": (0, inside), "in a tail": (1, 76)}[where]
    grads[1][tensor].view(-1)[position] = value
    with pytest.raises(NonFiniteStepError) as found:
        step_and_select([twin.tensors(own) for twin, own in zip(twins, grads, strict=True)], [5, 5], "inverse_relative")
    assert (found.value.silo, found.value.position) == (1, tensor)


def test_bounds_hold_next_to_large_weights():
    """Where seeds are large and steps small, rounding decides which component moved at all."""
    torch.manual_seed(0)
    seeds = [torch.randn(50_000) * torch.logspace(-3, 3, 50_000)]
    for lr in (1e-7, 1e-5, 1e-3):
        for kind in DISTANCES:
            twin = Twin(seeds, [OPTIONS._replace(lr=lr, weight_decay=0.01)], 100)
            for _ in range(4):
                grads = gradients(seeds)
                (chosen,) = step_and_select([twin.tensors(grads)], [100], kind)
                twin.check(chosen, grads, kind)


@pytest.mark.parametrize("default", ["meta", torch.float64, torch.bfloat16])
def test_defaults_are_of_no_concern(default):
    rounds_as_torch.cache_clear()
    adamw_tiles._count.cache_clear()
    adamw_scalars.cache_clear()
    torch.manual_seed(0)
    twin = Twin([torch.randn(100, 200) * 0.05], [OPTIONS], 20)
    for _ in range(3):
        grads = gradients(twin.seeds)
        tensors = twin.tensors(grads)
        if default == "meta":
            with torch.device("meta"):
                assert rounds_as_torch()
                (chosen,) = step_and_select([tensors], [20], "inverse_relative")
        else:
            torch.set_default_dtype(default)
            try:
                assert rounds_as_torch()
                (chosen,) = step_and_select([tensors], [20], "inverse_relative")
            finally:
                torch.set_default_dtype(torch.float32)
        twin.check(chosen, grads, "inverse_relative")


def test_this_build_rounds_as_torch():
    """Where it does not, nothing is stepped this way; here all of it is."""
    assert rounds_as_torch()


def test_another_rounding_is_noticed(monkeypatch):
    rounds_as_torch.cache_clear()
    own = adamw_tiles._updated
    monkeypatch.setattr(adamw_tiles, "_updated", lambda *given: torch.nextafter(own(*given), torch.tensor(torch.inf)))
    try:
        assert not rounds_as_torch()
    finally:
        rounds_as_torch.cache_clear()
