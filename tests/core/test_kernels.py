"""The fused step against a dense one: on the CPU through Triton's interpreter, and on a GPU where there is one.

The interpreter runs each program of a kernel in numpy, so these tests need no GPU; what they cannot see is what the
compiler makes of the same code, which `test_compiled_kernels` looks at.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

from peft_dst.core import DISTANCES, NonFiniteDistanceError, distance, select
from peft_dst.core import kernels as K
from peft_dst.core.adamw import (
    AdamWOptions,
    AdamWScalars,
    AdamWTensor,
    adamw_scalars,
    supports_group,
    supports_tensors,
)
from peft_dst.core.distances import RELATIVE_FLOOR
from peft_dst.core.kernels_reference import adamw_maxima_reference, moments_reference, updated_reference
from peft_dst.core.tiles import bits


pytest.importorskip("triton", minversion="3.6", reason="triton is not installed (it is for Linux on x86-64), or is old")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass
class Dense:
    """A tensor as the plain method keeps it: dense seed and dense float32 weight, with the fused step's state beside."""

    seed: torch.Tensor
    theta: torch.Tensor
    moments: tuple[torch.Tensor, torch.Tensor]
    fused: AdamWTensor


def make(shape, dtype=F32, device="cpu", seed=None) -> Dense:
    seed = torch.randn(shape).mul_(0.02).to(dtype) if seed is None else seed
    seed = seed.to(device)
    moments = (0.002 * torch.randn(seed.shape, device=device), 1e-4 * (0.5 + torch.rand(seed.shape, device=device)))
    none = torch.empty(0, dtype=torch.int64, device=device)
    fused = AdamWTensor(
        seed.clone(), seed, *(m.clone() for m in moments), options(1), none, none.to(dtype), none.float()
    )
    return Dense(seed.flatten(), seed.flatten().float().clone(), tuple(m.flatten() for m in moments), fused)


def options(step, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0):
    return AdamWOptions(lr, *betas, 1e-8, weight_decay, step)


def dense_step(silo, grads, rates, budget, kind):
    """Step of the plain method on float32 copies; returns the selection."""
    updates = []
    for tensor, grad, rate in zip(silo, grads, rates, strict=True):
        scalars = adamw_scalars(rate)
        moments_reference(grad.flatten(), *tensor.moments, scalars)
        updates.append(updated_reference(tensor.theta, *tensor.moments, scalars))
    selection = select([tensor.seed.float() for tensor in silo], updates, budget, kind)
    for tensor, updated, indices in zip(silo, updates, selection.indices, strict=True):
        tensor.theta = tensor.seed.float().clone()
        tensor.theta[indices] = updated[indices]
    return selection


def fused_step(silos, grads, rates, budgets, kind):
    """The same by the kernels, from and into `Dense.fused`."""
    silos_before = []
    for silo, silo_grads, silo_rates in zip(silos, grads, rates, strict=True):
        silos_before.append([])
        for tensor, grad, rate in zip(silo, silo_grads, silo_rates, strict=True):
            f = tensor.fused
            silos_before[-1].append(
                AdamWTensor(f.weight, grad, f.exp_avg, f.exp_avg_sq, rate, f.indices, f.seeds, f.values)
            )
    steps = K.adamw_step(silos_before, budgets, kind)
    for silo, before, step in zip(silos, silos_before, steps, strict=True):
        new = zip(silo, before, step.selection.indices, step.seeds, step.values, strict=True)
        for tensor, b, indices, seeds, values in new:
            tensor.fused = AdamWTensor(b.weight, b.grad, b.exp_avg, b.exp_avg_sq, b.options, indices, seeds, values)
    return steps


def assert_same_bits(mine, wanted):
    assert mine.dtype == wanted.dtype
    assert torch.equal(bits(mine.contiguous()), bits(wanted.contiguous()))


def assert_equal_state(silo, step, selection):
    assert step.selection.threshold == selection.threshold
    for tensor, mine, wanted in zip(silo, step.selection.indices, selection.indices, strict=True):
        f = tensor.fused
        assert mine.tolist() == wanted.tolist()
        assert_same_bits(f.values, tensor.theta[wanted])
        assert_same_bits(f.seeds, tensor.seed[wanted])
        live = tensor.seed.clone()
        live[wanted] = tensor.theta[wanted].to(live.dtype)
        assert_same_bits(f.weight.flatten(), live)
        assert_same_bits(f.exp_avg.flatten(), tensor.moments[0])
        assert_same_bits(f.exp_avg_sq.flatten(), tensor.moments[1])


def subset(silos):
    return {(id(t), i) for silo in silos for t in silo for i in t.fused.indices.tolist()}


def run(silos, budgets, kind, steps=3, grad_dtype=None, rates=None):
    """Some steps of both, compared after each; returns how many entries stayed and how many came, over all steps."""
    stayed = came = 0
    for step in range(1, steps + 1):
        grads = [
            [(0.02 * torch.randn_like(t.fused.weight.float())).to(grad_dtype or t.seed.dtype) for t in silo]
            for silo in silos
        ]
        own = rates(step) if rates else [[options(step)] * len(silo) for silo in silos]
        before = subset(silos)
        selections = [dense_step(*args, kind) for args in zip(silos, grads, own, budgets, strict=True)]
        taken = fused_step(silos, grads, own, budgets, kind)
        for silo, mine, wanted in zip(silos, taken, selections, strict=True):
            assert_equal_state(silo, mine, wanted)
        stayed += len(before & subset(silos))
        came += len(subset(silos) - before)
    return stayed, came


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, F32) for kind in DISTANCES), ("inverse_relative", BF16), ("inverse_relative", F16)]
)
def test_equals_the_dense_step(device, kind, dtype):
    silo = [make((32, 64), dtype, device), make((33,), dtype, device), make((400,), dtype, device)]

    def rates(step):
        return [[options(step, betas=(0.3, 0.9), weight_decay=0.01)] * 3]

    stayed, came = run([silo], [90], kind, steps=3, rates=rates)
    assert stayed > 20
    assert came > 90 + 10


@pytest.mark.parametrize("budget", [0, 1, 2, 40, 300, 1498])
def test_budgets(device, budget):
    silo = [make((900,), F32, device), make((599,), F32, device)]
    run([silo], [budget], "inverse_relative", steps=2)
    assert sum(t.fused.indices.numel() for t in silo) == budget


def test_mixed_dtypes_rates_and_silos(device):
    silos = [
        [make((32, 48), BF16, device), make((48,), F32, device), make((1000,), F16, device)],
        [make((2100,), F32, device)],
        [make((5,), BF16, device), make((), F32, device)],
    ]

    def rates(step):
        decayed = options(step, lr=0.02, weight_decay=0.1)
        return [[decayed, options(step), options(step + 3, betas=(0.3, 0.95))], [decayed], [options(step)] * 2]

    run(silos, [20, 100, 0], "absolute", grad_dtype=BF16, rates=rates)


def test_empty_tensors_and_empty_silos(device):
    empty = [make((0,), F32, device), make((0, 3), BF16, device)]
    silos = [
        [make((0,), F32, device), make((), F32, device), make((20,), F32, device), make((0,), F32, device)],
        empty,
        [make((0,), F16, device), make((17,), F16, device)],
    ]
    run(silos, [3, 0, 2], "absolute")
    # A silo without tensors has no dense twin.
    assert (
        fused_step([[], empty], [[], [t.seed for t in empty]], [[], [options(1)] * 2], [0, 0], "absolute")[0].values
        == []
    )
    assert K.adamw_step([], [], "absolute") == []
    assert K.adamw_step([[]], [0], "absolute")[0].values == []


def test_unaligned_views_go_another_way(device):
    # Views of one flat buffer that begin anywhere, next to a tensor whose rows are whole cache lines.
    flat = torch.randn(3001).mul_(0.02).to(device)
    silo = [make((2048,), F32, device), make((3000,), F32, device, seed=flat[1:])]
    f = silo[1].fused
    weight = torch.empty(3001, device=device)[1:].copy_(f.weight)
    silo[1].fused = AdamWTensor(weight, f.grad, f.exp_avg, f.exp_avg_sq, f.options, f.indices, f.seeds, f.values)
    assert weight.data_ptr() % 16
    run([silo], [30], "relative")


def test_ties_go_to_the_lower_tensor_and_index(device):
    # A first step of Adam moves every component by the learning rate, so that equal seeds move equally far.
    silo = [make((n,), F32, device, seed=torch.ones(n)) for n in (500, 17, 300)]
    for tensor in silo:
        for moment in (*tensor.moments, tensor.fused.exp_avg, tensor.fused.exp_avg_sq):
            moment.zero_()
    grads = [torch.ones_like(t.seed) for t in silo]
    grads[0][:200] = 0.0
    rates = [options(1)] * 3
    selection = dense_step(silo, grads, rates, 330, "absolute")
    step = fused_step([silo], [grads], [rates], [330], "absolute")[0]
    assert_equal_state(silo, step, selection)
    assert [i.tolist() for i in step.selection.indices] == [[*range(200, 500)], [*range(17)], [*range(13)]]


def test_fewer_non_zero_distances_than_budget(device):
    silo = [make((500,), F32, device, seed=torch.zeros(500)), make((500,), F32, device)]
    for tensor in silo:
        for moment in (*tensor.moments, tensor.fused.exp_avg, tensor.fused.exp_avg_sq):
            moment.zero_()
    grads = [torch.zeros_like(t.seed) for t in silo]
    grads[1][[17, 400]] = 1.0
    step = fused_step([silo], [grads], [[options(1)] * 2], [100], "absolute")[0]
    assert [i.tolist() for i in step.selection.indices] == [[], [17, 400]]
    # Now without any gradient at all: nothing has moved, nothing is free.
    still = [make((500,), F32, device)]
    still[0].fused.exp_avg.zero_()
    step = fused_step([still], [[torch.zeros(500, device=device)]], [[options(1)]], [10], "absolute")[0]
    assert step.selection.indices[0].numel() == 0
    assert step.selection.threshold == 0


def test_an_entry_back_at_its_seed_is_not_free(device):
    tensor = make((300,), F32, device)
    for moment in (tensor.fused.exp_avg, tensor.fused.exp_avg_sq):
        moment.zero_()
    at = torch.tensor([7, 90], device=device)
    moved = tensor.seed[at] + torch.tensor([0.0, 0.5], device=device)
    tensor.fused.weight[at] = moved
    t = AdamWTensor(
        *(tensor.fused.weight, torch.zeros_like(tensor.seed), tensor.fused.exp_avg, tensor.fused.exp_avg_sq),
        *(options(1), at, tensor.seed[at], moved),
    )
    (step,) = K.adamw_step([[t]], [5], "absolute")
    assert step.selection.indices[0].tolist() == [90]
    assert step.selection.threshold == (moved[1] - tensor.seed[90]).abs()


@pytest.mark.parametrize("where", ["gradient", "seed", "subset"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_is_found_and_the_weights_are_put_back(device, where, value):
    silos = [[make((600,), BF16, device)], [make((1000,), BF16, device), make((1200,), BF16, device)]]
    run(silos, [10, 20], "absolute", steps=1)
    position = 0 if where == "subset" else 1
    culprit = silos[1][position].fused
    grads = [[torch.randn_like(t.seed) for t in silo] for silo in silos]
    if where == "gradient":
        grads[1][1][77] = value
    elif where == "subset":
        grads[1][0][culprit.indices[0]] = value
    else:
        culprit.weight[next(i for i in range(1200) if i not in culprit.indices.tolist())] = value
    before = [t.fused.weight.clone() for silo in silos for t in silo]
    with pytest.raises(NonFiniteDistanceError) as caught:
        fused_step(silos, grads, [[options(2)], [options(2)] * 2], [10, 20], "absolute")
    assert (caught.value.silo, caught.value.position) == (1, position)
    for tensor, weight in zip((t for silo in silos for t in silo), before, strict=True):
        assert_same_bits(tensor.fused.weight, weight)


def test_marked_weights_do_not_compete_but_their_moments_go_on(device):
    for dtype in (F32, BF16, F16):
        tensor = make((3000,), dtype, device)
        bits(tensor.fused.weight)[[0, 5, 2999]] = -1
        assert tensor.fused.weight.isnan().sum() == 3
        grad = 100 * torch.randn_like(tensor.seed)
        before = AdamWTensor(tensor.fused.weight, grad, *tensor.moments, options(3), *[torch.empty(0)] * 3)
        want = [m.clone() for m in tensor.moments]
        batch = K._Batch([[empty_subset(before)]], [3], "inverse_relative")
        scalars = adamw_scalars(before.options)
        wanted = adamw_maxima_reference(before.weight, grad, *want, scalars, "inverse_relative", batch.block)
        maxima, _ = batch.first_pass()
        assert_same_bits(maxima.view(F32), wanted)
        assert_same_bits(before.exp_avg, want[0])
        assert_same_bits(before.exp_avg_sq, want[1])


def empty_subset(t):
    none = torch.empty(0, dtype=torch.int64, device=t.weight.device)
    return AdamWTensor(
        t.weight, t.grad, t.exp_avg, t.exp_avg_sq, t.options, none, none.to(t.weight.dtype), none.float()
    )


def test_second_look_in_small_portions(device, monkeypatch):
    monkeypatch.setattr(K, "_CHUNK", 256)
    run([[make((1800,), F32, device)]], [200], "absolute", steps=2)


@pytest.mark.parametrize("aligned", [True, False])
def test_offsets_beyond_two_to_the_31(device, aligned):
    """The table's addresses lie so far before small tensors that the one tile in them begins at component 2^33."""
    far, n = 2**33, 4096 if aligned else 3000
    tensor = make((n,), BF16, device)
    grad = torch.randn_like(tensor.seed)
    t = AdamWTensor(tensor.fused.weight, grad, *tensor.moments, options(2), *[torch.empty(0)] * 3)
    batch = K._Batch([[empty_subset(t)]], [40], "absolute")
    moments = [m.clone() for m in tensor.moments]
    wanted = adamw_maxima_reference(t.weight, grad, *moments, adamw_scalars(t.options), "absolute", batch.block)
    for column, width in enumerate((2, 4, 4, 2)):
        batch.table[0, column] -= far * width
    # Components, first slot, first program: as if all tiles before were those of other launches.
    batch.table[0, 4] += far
    if aligned:
        # And many a tile behind.
        batch.table[0, 4] += 3 * 2**31
    batch.table[0, 5] -= far // batch.block
    batch.table[0, 6] -= far // K._TILE
    maxima, _ = batch.first_pass()
    assert_same_bits(maxima.view(F32), wanted)
    # The kernels for single weights, and for marked blocks.
    index = torch.tensor([far, far + n - 1], device=device)
    assert batch.read(torch.zeros_like(index), index).tolist() == bits(tensor.seed)[[0, -1]].tolist()
    batch.write(torch.zeros_like(index), index, torch.tensor([5, -1], dtype=torch.int32, device=device))
    assert bits(t.weight)[[0, -1]].tolist() == [5, -1]
    entries = batch.second_look(maxima, maxima.max().view(1))
    assert (int(entries[0].position[0]) - far) // batch.block == int(maxima.argmax())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.9)])
def test_close_to_torch_adamw(device, betas, weight_decay):
    """One step from the same state as torch.optim.AdamW (foreach): within a few roundings of what is added.

    Not bit-equal: torch fuses products and sums, on the CPU in lerp and addcmul, on CUDA everywhere.
    """
    theta = torch.randn(500, device=device).mul_(0.02).requires_grad_()
    optimizer = torch.optim.AdamW([theta], lr=1e-2, betas=betas, weight_decay=weight_decay, foreach=True)
    for step in range(1, 4):
        theta.grad = 0.01 * torch.randn_like(theta)
        if step > 1:
            before = theta.detach().clone(), *(optimizer.state[theta][k].clone() for k in ("exp_avg", "exp_avg_sq"))
        optimizer.step()
    rate = options(3, betas=betas, weight_decay=weight_decay)
    scalars = adamw_scalars(rate)
    none = torch.empty(0, dtype=torch.int64, device=device)
    t = AdamWTensor(before[0], theta.grad, before[1], before[2], rate, none, none.float(), none.float())
    # All but one compete, so all values are seen.
    (step,) = K.adamw_step([[t]], [theta.numel() - 1], "absolute")
    kept, unit = step.selection.indices[0], 2.0**-23
    state, old = optimizer.state[theta], before[0]
    larger = torch.maximum(before[1].abs(), theta.grad.abs())
    assert ((t.exp_avg - state["exp_avg"]).abs() <= 2 * unit * larger).all()
    assert ((t.exp_avg_sq - state["exp_avg_sq"]).abs() <= 2 * unit * state["exp_avg_sq"]).all()
    move = scalars.step * larger / (state["exp_avg_sq"].sqrt() / scalars.correction)
    allowed = unit * (theta.detach().abs() + old.abs() + 8 * move.abs())
    assert ((step.values[0] - theta.detach()[kept]).abs() <= allowed[kept]).all()


def test_what_is_supported():
    theta = torch.zeros(4, requires_grad=True)

    def supports(cls, **options):
        optimizer = cls([theta], lr=options.pop("lr", 1e-3), **options)
        return supports_group(optimizer, optimizer.param_groups[0])

    class Own(torch.optim.AdamW):
        pass

    assert supports(torch.optim.AdamW, weight_decay=0.1)
    assert supports(torch.optim.Adam)
    assert supports(torch.optim.Adam, weight_decay=0.1, decoupled_weight_decay=True)
    assert not supports(torch.optim.Adam, weight_decay=0.1)
    assert not supports(torch.optim.AdamW, amsgrad=True)
    assert not supports(torch.optim.AdamW, maximize=True)
    assert not supports(torch.optim.AdamW, lr=torch.tensor(1e-3), foreach=False)
    assert not supports(Own)
    assert not supports(torch.optim.SGD)


def test_which_tensors_are_supported(device):
    w = torch.zeros(4, 6, device=device)
    assert supports_tensors(w, w, w, w)
    assert supports_tensors(w.bfloat16(), w.half(), w, w)
    assert supports_tensors(w, w)
    assert not supports_tensors(w, w.double())
    assert not supports_tensors(w.t(), w.t(), w.t(), w.t())
    assert not supports_tensors(w.double(), w, w, w)
    assert not supports_tensors(w.bfloat16(), w.bfloat16(), w.bfloat16(), w.bfloat16())
    assert not supports_tensors(w, w.flatten(), w, w)
    assert not supports_tensors(w, w.to_sparse(), w, w)


def test_wrong_arguments_are_refused_before_anything_is_changed():
    tensor = make((10,))
    with pytest.raises(ValueError, match="budget of 10 for 10"):
        K.adamw_step([[tensor.fused]], [10], "absolute")
    with pytest.raises(ValueError, match="euclid"):
        K.adamw_step([[tensor.fused]], [3], "euclid")
    assert_same_bits(tensor.fused.weight, tensor.seed)


def test_nothing_follows_the_default_device(device):
    """Which may be a GPU, where a factor of the step would be computed and waited for, or one without memory."""
    silo = [make((300,), F32, device), make((), BF16, device)]
    grads = [torch.ones_like(t.seed) for t in silo]
    adamw_scalars.cache_clear()
    with torch.device("meta"):
        rates = [options(1), options(1, betas=(0.3, 0.9))]
        steps = fused_step([silo, []], [grads, []], [rates, []], [30, 0], "absolute")
        assert fused_step([[]], [[]], [[]], [0], "absolute")[0].selection.threshold == 0
    assert sum(indices.numel() for indices in steps[0].selection.indices) == 30
    assert steps[1].selection.threshold == 0


def test_silos_without_competition_cost_no_wait(device, monkeypatch):
    """`new_tensor` waits for the device until its number is there."""
    silos = [[make((n,), F32, device)] for n in (9, 700, 40, 0)]
    monkeypatch.setattr(torch.Tensor, "new_tensor", None)
    run(silos, [8, 50, 0, 0], "absolute", steps=2)


@pytest.mark.parametrize("budget", [2, 400], ids=["long blocks", "short blocks"])
def test_the_compiler_is_told_the_truth_about_alignment(budget, monkeypatch):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels are not interpreted")
    told = []

    def check(handle, name, values):
        told.append(name)
        assert not (handle.data % values[0]).any()

    monkeypatch.setattr("triton.runtime.interpreter.TensorHandle.set_attr", check)
    run([[make((1040,), F32), make((1000, 2), BF16)]], [budget], "absolute", steps=2)
    assert set(told) == {"tt.divisibility"}


def test_block_sizes():
    assert [K.block_size(10**8, k) for k in (0, 10**2, 10**4, 10**5, 10**6, 10**8)] == [1024, 1024, 256, 64, 16, 8]
    assert K.block_size(0, 0) == 8


@pytest.mark.parametrize(("version", "taken"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1234", True)])
def test_a_triton_that_flushes_subnormals_is_not_used(version, taken, monkeypatch):
    monkeypatch.setattr("triton.__version__", version)
    assert (K._device_code.__wrapped__() is not None) == taken


def test_constants_agree_with_the_device_code():
    code = K._device_code()
    assert code.FLOOR.value == RELATIVE_FLOOR
    assert code.LANES.value == K._LANES
    assert code.FIRST_SLOT.value == K._FIRST_SLOT
    assert code.COLUMNS.value == K._FIRST_COMPONENT + 1
    assert code.SCALARS.value == len(AdamWScalars._fields)


def test_the_plain_twin_is_the_method():
    """The twin's maxima against `distance` on whole tensors, without any kernel."""
    tensor = make((1000,))
    grad = torch.randn(1000)
    wanted = [m.clone() for m in tensor.moments]
    scalars = adamw_scalars(options(2))
    moments_reference(grad, *wanted, scalars)
    delta = distance("relative", tensor.seed, updated_reference(tensor.seed, *wanted, scalars))
    maxima = adamw_maxima_reference(tensor.seed, grad, *tensor.moments, scalars, "relative", 64)
    assert maxima.tolist() == [float(part.max()) for part in delta.split(64)]
