"""FSDP2: adapters are switched, merged, saved and loaded on divided weights."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.distributed.checkpoint
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from transformers import AutoModelForCausalLM

from peft_dst import DSTConfig
from peft_dst.core.checksums import join_checksums
from tests.distributed.sharded import divide, make, optimizer_of, step, subsets
from tests.models import BUILDERS, batch


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
    before = [parameter.to_local().clone() for parameter in base.parameters()]
    with pytest.raises(ValueError, match="the base model's values differ"):
        PeftModel.from_pretrained(base, folder)
    assert all(torch.equal(one, p.to_local()) for one, p in zip(before, base.parameters(), strict=True))


def test_another_base_is_refused_by_all(together, tmp_path):
    together(1, save, str(tmp_path), {})
    together(2, load_onto_another, str(tmp_path))


def note(rank, world):
    model = make(world, "bert", {"epsilon": 0.02})
    first, second, *_ = model.constraint().weights
    sums = [first.seed_checksum.whole, second.seed_checksum.whole]
    for weight in (first, second):
        weight.seed_checksum.own  # noqa: B018  notes it anew for what is held here
        weight.seed_checksum.whole = None
    if rank == 1:
        second.seed_checksum._own = None
    join_checksums([first, second])
    assert first.seed_checksum.whole == sums[0]
    # What one process does not know is not known.
    assert second.seed_checksum.whole is None


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
