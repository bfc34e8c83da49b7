"""FSDP2: weights that two or four processes hold together end up as those of one process do."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from peft_dst import DSTConfig, DSTOptimizer
from peft_dst.core import Constraint, choice
from peft_dst.core.shards import Together
from peft_dst.core.subset import Silo
from peft_dst.core.weights import join_checksums
from tests.models import BUILDERS, batch


STEPS = 4


def divide(model: nn.Module, **options: object) -> None:
    """fully_shard of every layer, and of the rest."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # From within: a layer of T5's has a list in it.
    for layer in (layer for layers in reversed(lists) for layer in layers):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def make(world: int, architecture: str, options: dict, dtype: torch.dtype = torch.float32) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(BUILDERS[architecture]().to(dtype), DSTConfig(**options))
    if world > 1:
        divide(model)
        assert all(weight.is_divided for weight in model.constraint().weights)
    return model


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Adam divides by the size of gradients. With its usual eps the smallest ones' rounding would show.
    if kind == "hook":
        return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)
    options = {"eps": 1e-4} if kind == "AdamW" else {}
    return DSTOptimizer(parameters, getattr(torch.optim, kind), lr=1e-2, **options)


def step(
    rank: int, world: int, model: nn.Module, optimizer: torch.optim.Optimizer, architecture: str, number: int
) -> None:
    """One step on a batch of which each process has its share."""
    rows = {k: v[rank::world].contiguous() for k, v in batch(architecture, number).items()}
    model(**rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def subsets(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name → positions in the whole tensor, and the values there. To be called by all processes."""
    own = {w.name: (w.noted()[0], w.values(), w.box) for w in model.constraint().weights}
    own = {name: (box.outwards(positions), values) for name, (positions, values, box) in own.items()}
    if dist.get_world_size() == 1:
        return own
    # At once: one by one they would send some hundred messages.
    parts: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {name: _merge([part[name] for part in parts]) for name in own}


def _merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of one tensor, each once: what is repeated is the same in all processes."""
    positions, values = (torch.cat(part) for part in zip(*parts, strict=True))
    merged, at = positions.unique(return_inverse=True)
    found = torch.empty(merged.shape, dtype=values.dtype).index_put_((at,), values)
    assert torch.equal(found[at], values)
    return merged, found


def train(rank, world, architecture, options, kind, dtype=torch.float32):
    model = make(world, architecture, options, dtype)
    optimizer = optimizer_of(model, kind)
    for number in range(STEPS):
        step(rank, world, model, optimizer, architecture, number)
    return subsets(model), [float(silo.threshold) for silo in model.constraint().silos]


def assert_agree(alone, divided, rtol=1e-4, atol=1e-6):
    assert sum(indices.numel() for indices, _ in alone.values()) > 0
    for name, (indices, values) in alone.items():
        assert torch.equal(indices, divided[name][0]), name
        torch.testing.assert_close(values, divided[name][1], rtol=rtol, atol=atol)


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


def switch(rank, world):
    """Seed, tuned, a second adapter, merged: what a forward pass sees, right after one without gradients."""
    model = make(world, "bert", {"epsilon": 0.02})
    optimizer = optimizer_of(model, "hook")
    rows = batch("bert", 0)

    def look():
        with torch.no_grad():
            return model.eval()(**rows).logits

    seed = look()
    model.train()
    for number in range(2):
        step(rank, world, model, optimizer, "bert", number)
    tuned = look()
    with model.disable_adapter():
        assert torch.equal(look(), seed)
    assert torch.equal(look(), tuned)
    model.add_adapter("other", DSTConfig(epsilon=0.01))
    model.set_adapter("other")
    # Before FSDP gathers what parameters() would give it.
    optimizer = optimizer_of(model, "hook")
    assert torch.equal(look(), seed)
    model.train()
    for number in range(5, 8):
        # Not one: Adam's first step moves every component by as much, and distances tie.
        step(rank, world, model, optimizer, "bert", number)
    other = look()
    assert not torch.equal(other, seed)
    model.set_adapter("default")
    assert torch.equal(look(), tuned)
    model.base_model.set_adapter(["default", "other"])
    both = look()
    model.set_adapter("other")
    assert torch.equal(look(), other)
    model.merge_adapter(["default"])
    assert torch.equal(look(), tuned)
    model.unmerge_adapter()
    # What is left is called through what was divided (here the PeftModel), or gathered.
    merged = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.merge_and_unload().parameters()]
    return seed, tuned, other, both, *merged


def test_adapters_are_switched_and_merged(together):
    (alone,) = together(1, switch)
    for world in (2, 4):
        for found in together(world, switch):
            for mine, theirs in zip(alone, found, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def save(rank, world, folder, options, packed=False):
    model = make(world, "bert", {"epsilon": 0.02, **options})
    if packed:
        model.peft_config["default"].packed = True
    optimizer = optimizer_of(model, "hook")
    for number in range(3):
        step(rank, world, model, optimizer, "bert", number)
        if number == 1:
            # Saving in the middle changes nothing.
            model.save_pretrained(folder)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**batch("bert", 0)).logits


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["classifier"]}])
def test_what_is_saved_is_what_was_trained(together, tmp_path, options, packed):
    one, other = together(2, save, str(tmp_path / "adapter"), options, packed)
    assert torch.equal(one, other)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch("bert", 0)).logits, one)
    assert not list(tmp_path.glob("adapter/.saving-*"))


def save_resized(rank, world, base, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70, mean_resizing=False)
    seed = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model = get_peft_model(model, DSTConfig(epsilon=0.02))
    if world > 1:
        divide(model)
    step(rank, world, model, optimizer_of(model, "hook"), "llama", 0)
    with pytest.warns(UserWarning, match="resized") if rank == 0 else contextlib.nullcontext():
        model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**batch("llama", 0)).logits, seed


def load_resized(rank, world, base, folder):
    """With the embeddings whole in the file, onto embeddings that are divided and other ones."""
    torch.manual_seed(world)
    fresh = AutoModelForCausalLM.from_pretrained(base)
    fresh.resize_token_embeddings(70, mean_resizing=False)
    if world > 1:
        divide(fresh)
    loaded = PeftModel.from_pretrained(fresh, folder).eval()
    with torch.no_grad():
        tuned = loaded(**batch("llama", 0)).logits
        with loaded.disable_adapter():
            parameters = loaded.get_base_model().named_parameters()
            return tuned, {n: getattr(p, "full_tensor", lambda p=p: p)().clone() for n, p in parameters}


def test_a_vocabulary_resized_before(together, tmp_path):
    base, folder = str(tmp_path / "base"), str(tmp_path / "adapter")
    BUILDERS["llama"]().save_pretrained(base)
    (saved, seed), (other, _) = together(2, save_resized, base, folder)
    assert torch.equal(saved, other)
    for world in (1, 2):
        for found, again in together(world, load_resized, base, folder):
            torch.testing.assert_close(found, saved, rtol=1e-5, atol=1e-6)
            assert all(torch.equal(again[name], parameter) for name, parameter in seed.items())


def load(rank, world, folder):
    """Onto a base that is divided already."""
    torch.manual_seed(0)
    base = BUILDERS["bert"]()
    divide(base)
    with torch.no_grad():
        base.eval()(**batch("bert", 0))
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    with torch.no_grad():
        logits = model.eval()(**batch("bert", 0)).logits
    optimizer = optimizer_of(model.train(), "hook")
    step(rank, world, model, optimizer, "bert", 9)
    return logits, subsets(model)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["classifier"]}])
def test_an_adapter_is_loaded_onto_a_divided_base(together, tmp_path, options):
    (saved,) = together(1, save, str(tmp_path), options)
    for logits, found in together(2, load, str(tmp_path)):
        torch.testing.assert_close(logits, saved, rtol=1e-5, atol=1e-6)
        assert sum(indices.numel() for indices, _ in found.values()) > 0


def load_onto_another(rank, world, folder):
    torch.manual_seed(1)
    base = BUILDERS["bert"]()
    divide(base)
    with pytest.raises(ValueError, match="base"):
        PeftModel.from_pretrained(base, folder)


def test_another_base_is_refused_by_all(together, tmp_path):
    together(1, save, str(tmp_path), {})
    together(2, load_onto_another, str(tmp_path))


def merge_nan(rank, world):
    model = make(world, "bert", {"epsilon": 0.02})
    step(rank, world, model, optimizer_of(model, "hook"), "bert", 0)
    weight = next(weight for weight in model.constraint().weights if weight.indices.numel())
    if rank == 1:
        weight.flat()[weight.indices[0]] = math.nan
        weight.stepped = True
    with pytest.raises((ValueError, RuntimeError)) as caught:
        model.merge_adapter(safe_merge=True)
    assert ("NaNs detected" if rank == 1 else "another process") in str(caught.value)
    model.merge_adapter()


def test_a_nan_in_one_process_is_merged_in_none(together):
    together(2, merge_nan)


def blow_up(rank, world, kind, most):
    model = make(world, "bert", {"epsilon": 0.02})
    optimizer = optimizer_of(model, kind)
    step(rank, world, model, optimizer, "bert", 0)
    before = subsets(model)
    rows = {k: v[rank::world] for k, v in batch("bert", 1).items()}
    model(**rows).loss.backward()
    if rank == 1:
        model.base_model.model.bert.pooler.dense.weight.grad._local_tensor[0, 0] = math.nan
    written = []
    write = Silo.write

    def noted(silo, *args):
        written.append(silo)
        write(silo, *args)

    with (
        mock.patch.object(choice, "_MOST_PENDING", most),
        mock.patch.object(Silo, "write", noted),
        pytest.raises(FloatingPointError, match=r"bert.pooler.dense.weight.*NaN or infinite"),
    ):
        optimizer.step()
    after = subsets(model)
    assert all(torch.equal(before[n][0], after[n][0]) and torch.equal(before[n][1], after[n][1]) for n in before)
    return len(written)


@pytest.mark.parametrize("kind", ["hook", "AdamW"])
@pytest.mark.parametrize("most", [1 << 26, 100])
def test_a_nan_in_one_process_is_told_by_all(together, kind, most):
    """Also where silos before it were written already."""
    for written in together(2, blow_up, kind, most):
        assert (written > 0) == (most == 100)


class Sharpness(torch.optim.AdamW):
    """AdamW that evaluates its closure at a moved point, too, as optimizers that look for flat minima do."""

    @torch.no_grad()
    def step(self, closure):
        self.losses = [float(closure())]
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        moves = [0.02 * p.grad.sign() for p in parameters]
        torch._foreach_add_(parameters, moves)
        self.losses.append(float(closure()))
        torch._foreach_sub_(parameters, moves)
        return super().step()


def step_with_closures(rank, world, refers):
    """The first forward pass ever is within a step, as Lightning has it."""
    model = make(world, "llama", {"epsilon": 0.02})
    optimizer = Sharpness([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
    losses = []
    for number in range(STEPS):
        rows = {k: v[rank::world].contiguous() for k, v in batch("llama", number).items()}

        @torch.enable_grad()
        def closure(rows=rows):
            optimizer.zero_grad()
            if refers:
                with torch.no_grad():
                    model(**rows)
            loss = model(**rows).loss
            loss.backward()
            loss = loss.detach()
            if world > 1:
                dist.all_reduce(loss)
            return loss / world

        optimizer.step(closure)
        losses.append(optimizer.losses)
    found = subsets(model)
    with torch.no_grad():
        return found, losses, model(**batch("llama", 9)).logits


@pytest.mark.parametrize("refers", [False, True])
def test_a_closure_sees_what_the_optimizer_has_written(together, refers):
    ((alone, losses, logits),) = together(1, step_with_closures, refers)
    assert all(abs(second - first) > 0.01 for first, second in losses)
    for found, own, served in together(2, step_with_closures, refers):
        assert_agree(alone, found)
        torch.testing.assert_close(own, losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(served, logits, rtol=1e-4, atol=1e-5)


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


def leave_out(rank, world, folder):
    """Process 0 saves a gathered state dict, which lacks something, while the other goes on."""
    model = make(world, "bert", {"epsilon": 0.02})
    step(rank, world, model, optimizer_of(model, "hook"), "bert", 0)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    for kept in ("_sparse", "weight") if rank == 0 else ():
        part = {name: tensor for name, tensor in state.items() if kept in name and "classifier" not in name}
        with pytest.raises(ValueError, match=r"the state dict that is to be saved lacks .*nothing left out"):
            model.save_pretrained(folder, state_dict=part)
    # Whom it was not gathered for has none of it, and may call with it, too.
    assert (state == {}) == (rank == 1)
    model.save_pretrained(folder, state_dict=state)


def test_a_gathered_state_dict_is_saved_by_one_alone(together, tmp_path):
    together(2, leave_out, str(tmp_path))
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
    assert sum(w.indices.numel() for w in loaded.constraint().weights) == loaded.constraint().budget


def step_within(rank, world):
    """An optimizer for each parameter, which steps in the backward pass as soon as the gradient is there."""
    model = make(world, "llama", {"epsilon": 0.02, "siloing": "parameter"})
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2, eps=1e-4) for p in model.parameters() if p.requires_grad}
    steps = []

    def at_once(parameter):
        steps.append(torch._C._current_graph_task_id())
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(at_once)
    for number in range(STEPS):
        rows = {k: v[rank::world].contiguous() for k, v in batch("llama", number).items()}
        model(**rows).loss.backward()
    assert len(steps) == STEPS * len(optimizers)
    assert -1 not in steps
    return subsets(model)


def test_steps_within_the_backward_pass(together):
    (alone,) = together(1, step_within)
    for found in together(2, step_within):
        assert_agree(alone, found)


def note(rank, world):
    model = make(world, "bert", {"epsilon": 0.02})
    first, second, *_ = model.constraint().weights
    sums = [first.whole_checksum, second.whole_checksum]
    for weight in (first, second):
        weight.own_checksum  # noqa: B018  notes it anew for what is held here
        weight.whole_checksum = None
    if rank == 1:
        second._checksum = None
    join_checksums([first, second])
    assert first.whole_checksum == sums[0]
    # What one process does not know is not known.
    assert second.whole_checksum is None


def test_checksums_are_joined(together):
    together(2, note)


def touch(rank, world, folder, gathered, base):
    torch.manual_seed(0)
    seed = BUILDERS["bert"]()
    if base == "divided before":
        divide(seed)
    model = get_peft_model(seed, DSTConfig(epsilon=0.02))
    if base != "divided before":
        divide(model)
    if base == "cast":
        model.double()
    optimizer = optimizer_of(model, "hook")
    step(rank, world, model, optimizer, "bert", 0)
    if base == "loaded again":
        set_model_state_dict(model, get_model_state_dict(model))
        step(rank, world, model, optimizer, "bert", 1)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {"state_dict": get_model_state_dict(model, options=options)} if gathered else {}
    if not gathered or rank == 0:
        model.save_pretrained(folder, **state)
    weight = model.base_model.model.bert.pooler.dense.weight
    if rank == 1:
        with torch.no_grad():
            weight._local_tensor[0, 0] += 1
    state = {"state_dict": get_model_state_dict(model, options=options)} if gathered else {}
    if not gathered or rank == 0:
        with pytest.raises(RuntimeError, match=r"bert.pooler.dense.weight.*without the constraint"):
            model.save_pretrained(folder, **state)


@pytest.mark.parametrize("base", ["divided after", "divided before", "loaded again", "cast"])
@pytest.mark.parametrize("gathered", [False, True])
def test_a_change_in_one_process_is_told(together, tmp_path, gathered, base):
    together(2, touch, str(tmp_path), gathered, base)


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


def track(rank, world):
    model = make(world, "bert", {"epsilon": 0.02, "threshold": "iterative"})
    before = subsets(model)
    for kind in ("hook", "AdamW"):
        optimizer = optimizer_of(model, kind)
        with pytest.raises(NotImplementedError, match=r"threshold='iterative'.*threshold='exact'"):
            step(rank, world, model, optimizer, "bert", 0)
    assert all(torch.equal(indices, before[name][0]) for name, (indices, _) in subsets(model).items())


def test_tracked_thresholds_are_refused(together):
    together(2, track)


class HalfWay(torch.optim.AdamW):
    """AdamW that can be made to stop half-way."""

    stops = False

    @torch.no_grad()
    def step(self, closure=None):
        if not self.stops:
            return super().step(closure)
        for parameter in self.param_groups[0]["params"][::2]:
            parameter.add_(1)
        raise MemoryError


def interrupt(rank, world):
    """An optimizer stops half-way, and somebody looks before the next step."""
    model = make(world, "bert", {"epsilon": 0.02})
    optimizer = HalfWay([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for number in range(2):
        step(rank, world, model, optimizer, "bert", number)
    before = subsets(model)
    rows = batch("bert", 0)
    with torch.no_grad():
        tuned = model(**rows).logits
    model.reshard()
    model(**{k: v[rank::world].contiguous() for k, v in batch("bert", 2).items()}).loss.backward()
    optimizer.stops = True
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.stops = False
    model.state_dict()
    after = subsets(model)
    with torch.no_grad():
        again = model(**rows).logits
    model.reshard()
    optimizer.zero_grad()
    step(rank, world, model, optimizer, "bert", 3)
    return before, after, tuned, again


def test_a_step_that_stops_half_way_changes_nothing(together):
    for before, after, tuned, again in together(2, interrupt):
        assert_agree(before, after, rtol=0, atol=0)
        assert torch.equal(tuned, again)
