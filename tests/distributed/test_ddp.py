"""DDP: every process keeps the same subset, that of one process on the whole batch, without traffic of our own."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peft_dst import DSTConfig, DSTOptimizer
from tests.models import BUILDERS, assert_same, batch, checkpoint_layers, logits, weights


def make(world, options, **ddp):
    torch.manual_seed(0)
    model = get_peft_model(BUILDERS["bert"](), DSTConfig(**options))
    return model, DistributedDataParallel(model, **ddp) if world > 1 else model


def optimizer_of(model, own):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return DSTOptimizer(parameters, lr=1e-2) if own else torch.optim.AdamW(parameters, lr=1e-2)


def share(rank, world, number):
    return {k: v[rank::world].contiguous() for k, v in batch("bert", number).items()}


def subsets(model, adapter="default"):
    return {w.name: (w.indices, w.values()) for w in model.constraint(adapter).weights}


def train(rank, world, options, own=False, accumulate=1, **ddp):
    model, wrapped = make(world, options, **ddp)
    optimizer = optimizer_of(model, own)
    for number in range(4 * accumulate):
        last = number % accumulate == accumulate - 1
        with contextlib.nullcontext() if last or world == 1 else wrapped.no_sync():
            (wrapped(**share(rank, world, number)).loss / accumulate).backward()
        if last:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return weights(model.get_base_model()), subsets(model)


def compare(together, world, *arguments):
    ((_, subset),) = together(1, train, *arguments)
    first, *others = together(world, train, *arguments)
    for found, same in others:
        assert_same(found, first[0])
        assert all(torch.equal(same[name][0], first[1][name][0]) for name in same)
    assert sum(indices.numel() for indices, _ in subset.values()) > 0
    for name, (indices, values) in subset.items():
        assert torch.equal(indices, first[1][name][0]), name
        torch.testing.assert_close(values, first[1][name][1], rtol=1e-4, atol=1e-5)


# The gradients of keys' biases are nothing but rounding, of which Adam makes steps like any others.
RANDOM = {"selection": "random", "exclude_modules": ["key"]}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "options", [{}, RANDOM, {"modules_to_save": ["classifier"]}], ids=["dynamic", "random", "dense"]
)
def test_processes_agree_with_one(together, options, own, accumulate):
    compare(together, 2, {"epsilon": 0.02, **options}, own, accumulate)


def test_four_processes(together):
    compare(together, 4, {"epsilon": 0.02}, False, 2)


@pytest.mark.parametrize("options", [{}, RANDOM])
def test_gradients_in_buckets(together, options):
    alone, other = together(2, views, {"epsilon": 0.02, **options})
    assert_same(*alone)
    assert_same(*other)


def views(rank, world, options):
    """With and without gradients that are views of DDP's buckets."""
    return [train(rank, world, options, gradient_as_bucket_view=as_view)[0] for as_view in (False, True)]


def count(rank, world, options):
    """What DDP sends in its constructor and in a step, with DST and of a plain model."""
    sent = []
    kinds = (
        "broadcast",
        "all_reduce",
        "all_gather",
        "all_gather_object",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
    )
    with pytest.MonkeyPatch.context() as patched:
        for kind in kinds:
            real = getattr(dist, kind)
            patched.setattr(dist, kind, lambda *a, kind=kind, real=real, **k: (sent.append(kind), real(*a, **k))[1])
        model, wrapped = make(world, options)
        optimizer = optimizer_of(model, False)
        found = []
        for number in range(3):
            sent.clear()
            wrapped(**share(rank, world, number)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(list(sent))
    ignored = set(wrapped.parameters_to_ignore)
    synchronised = [name for name, _ in [*model.named_parameters(), *model.named_buffers()] if name not in ignored]
    return found, synchronised


@pytest.mark.parametrize("options", [{}, RANDOM])
def test_nothing_but_gradients_is_sent(together, options):
    for found, synchronised in together(2, count, {"epsilon": 0.02, **options}):
        # Once they tell each other what they train.
        assert found == [["all_gather_object"], [], []]
        assert not [name for name in synchronised if "_sparse" in name]


def save_in_the_middle(rank, world, folder, options, wrap):
    torch.manual_seed(0)
    base = BUILDERS["bert"]()
    if wrap == "before":
        checkpoint_layers(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.02, modules_to_save=["classifier"], **options))
    if wrap == "after":
        checkpoint_layers(base)
    steps_around_a_save(rank, world, model, DistributedDataParallel(model), folder)
    if rank == 0:
        model.save_pretrained(folder)
    return weights(model.get_base_model()), logits(model, "bert")


def steps_around_a_save(rank, world, model, wrapped, folder):
    """Process 0 saves in the middle: the sizes of its records are others from then on than in the other process."""
    optimizer = optimizer_of(model, False)
    for number in range(4):
        wrapped(**share(rank, world, number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and number == 1:
            model.save_pretrained(folder)


@pytest.mark.parametrize("options", [{}, RANDOM], ids=["dynamic", "random"])
@pytest.mark.parametrize("wrap", ["before", "after", None])
def test_one_process_saves(together, tmp_path, options, wrap):
    """Also where torch's wrapper for activation checkpointing puts its name into those of modules."""
    one, other = together(2, save_in_the_middle, str(tmp_path), options, wrap)
    assert_same(one[0], other[0])
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
    assert torch.equal(logits(loaded, "bert"), one[1])


class Outer(nn.Module):
    """A model in another module, as in a LightningModule."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **rows):
        return self.model(**rows)


def train_around(rank, world, around, options, folder):
    torch.manual_seed(0)
    base = BUILDERS["bert"]()
    config = DSTConfig(epsilon=0.02, **options)
    if around == "before the adapter":
        model = get_peft_model(base, DSTConfig(epsilon=0.05))
        wrapped = DistributedDataParallel(model)
        model.add_adapter("other", config)
        model.set_adapter("other")
    else:
        model = get_peft_model(base, config, "other")
        wrap = {"module": Outer, "compiled": lambda model: torch.compile(model, backend="eager")}[around]
        wrapped = DistributedDataParallel(wrap(model))
    steps_around_a_save(rank, world, model, wrapped, folder)
    return subsets(model, "other")


# DDP waits for gradients of whatever was to be trained when it was made.
@pytest.mark.parametrize(
    ("around", "options"),
    [("module", {}), ("module", RANDOM), ("compiled", {}), ("before the adapter", {})],
    ids=["module", "module-random", "compiled", "before"],
)
def test_ddp_around_anything(together, tmp_path, around, options):
    one, other = together(2, train_around, around, options, str(tmp_path))
    assert sum(indices.numel() for indices, _ in one.values()) > 0
    for name, (indices, values) in one.items():
        assert torch.equal(indices, other[name][0])
        assert torch.equal(values, other[name][1])


def resume(rank, world, folder, options, own):
    """Straight on, and from a checkpoint in a fresh model."""
    model, wrapped = make(world, options)
    optimizer = optimizer_of(model, own)

    def run(wrapped, optimizer, numbers):
        for number in numbers:
            wrapped(**share(rank, world, number)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    run(wrapped, optimizer, range(2))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, f"{folder}/{rank}.pt")
    run(wrapped, optimizer, range(2, 4))
    fresh, wrapped = make(world, options)
    state = torch.load(f"{folder}/0.pt", weights_only=True)
    fresh.load_state_dict(state["model"])
    optimizer = optimizer_of(fresh, own)
    optimizer.load_state_dict(state["optimizer"])
    run(wrapped, optimizer, range(2, 4))
    return weights(model.get_base_model()), weights(fresh.get_base_model())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("options", [{}, RANDOM])
def test_training_is_resumed(together, tmp_path, options, own):
    for straight, resumed in together(2, resume, str(tmp_path), {"epsilon": 0.02, **options}, own):
        assert_same(straight, resumed)


def disagree(rank, world, how, divided, what):
    torch.manual_seed(rank if how == "base" else 0)
    base = BUILDERS["bert"]()
    options = {"epsilon": 0.02 + 0.01 * rank} if how == "epsilon" else {"epsilon": 0.02}
    if how == "target_modules":
        options["target_modules"] = ["query", "value"][: rank + 1]
    if how == "modules_to_save":
        options["modules_to_save"] = ["classifier", "pooler"][: rank + 1]
    if how == "inference_mode":
        options["inference_mode"] = rank == 1
    if how == "seed":
        # Large enough for every tensor to have entries: DDP itself counts those that are trained.
        options = {"epsilon": 0.3, "siloing": "parameter", "selection": "random", "selection_seed": rank}
    model = get_peft_model(base, DSTConfig(**options))
    if divided:
        from tests.distributed.sharded import divide

        divide(model)
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    # All are told, and none has sent anything that another waits for.
    with pytest.raises(ValueError, match=f"process 1 does not train what process 0 does: {what}"):
        wrapped(**share(rank, world, 0))


@pytest.mark.parametrize(
    ("how", "divided", "what"),
    [
        ("epsilon", True, "the budget of the silo"),
        ("inference_mode", True, "what is trained is no adapter there and default in process 0"),
        ("modules_to_save", False, "modules_to_save .*'classifier'.* in process 0"),
        ("base", False, "the checksum of the base's"),
        ("target_modules", True, "the (budget|shape|checksum) of"),
        ("seed", False, "the (number of entries|sum of positions) in"),
    ],
)
def test_processes_that_disagree_are_told_so(together, how, divided, what):
    together(2, disagree, how, divided, what)


def train_without_ddp(rank, world):
    model, _ = make(1, {"epsilon": 0.02, **RANDOM})
    with pytest.raises(NotImplementedError, match="Train static selections under DistributedDataParallel"):
        model(**share(rank, world, 0)).loss.backward()


def test_fixed_subsets_want_to_know_who_averages(together):
    together(2, train_without_ddp)


def refer(rank, world):
    """A pass without gradients, past DDP, between a forward pass and its backward pass, as DPO makes one."""
    found = []
    for referring in (False, True):
        model, wrapped = make(world, {"epsilon": 0.02, **RANDOM})
        optimizer = optimizer_of(model, False)
        loss = wrapped(**share(rank, world, 0)).loss
        if referring:
            with torch.no_grad(), model.disable_adapter():
                model(**share(rank, world, 1))
        loss.backward()
        optimizer.step()
        found.append(weights(model.get_base_model()))
    return found


def test_a_reference_pass_changes_nothing(together):
    for plain, referring in together(2, refer):
        assert_same(plain, referring)
