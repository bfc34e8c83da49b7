"""FlatStorage: parameters in one piece, and otherwise as they were."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import nn

from peft_dst.serving import DeltaPool, FlatStorage, storage
from tests.models import BUILDERS, logits
from tests.serving.helpers import bits_of, same


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_storage_changes_nothing_but_where_parameters_are(name):
    torch.manual_seed(0)
    model = BUILDERS[name]()
    before, want = bits_of(model), logits(model, name)
    ties = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    flat = FlatStorage(model)
    assert same(bits_of(model), before)
    assert torch.equal(logits(model, name), want)
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == ties
    assert len(flat.buffers) == 1
    assert set(flat.places) == set(ties)
    for n, p in model.named_parameters(remove_duplicate=False):
        place = flat.places[n]
        own = flat.buffers[place.buffer][place.start : place.start + p.numel()]
        assert own.data_ptr() == p.data_ptr()
        assert p.data_ptr() % storage.ALIGNMENT == flat.buffers[0].data_ptr() % storage.ALIGNMENT


def test_storage_of_several_dtypes_and_layouts():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(2, 2).bfloat16(), nn.Embedding(3, 2).half(), nn.Linear(1, 1))
    model.register_parameter("eight", nn.Parameter(torch.ones(5).to(torch.float8_e4m3fn), requires_grad=False))
    model[0].weight.data = model[0].weight.data.to(memory_format=torch.channels_last)
    model.register_parameter("counts", nn.Parameter(torch.arange(3), requires_grad=False))
    model.register_parameter("later", nn.Parameter(torch.empty(3, device="meta")))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_meta}
    flat = FlatStorage(model)
    dtypes = [torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.float16]
    assert [buffer.dtype for buffer in flat.buffers] == dtypes
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in before.items())
    assert "counts" not in flat
    assert "later" not in flat

    def check(*replaced: str) -> None:
        for _ in flat.places:
            flat.check(replaced)

    check()
    model[1].float()
    with pytest.raises(RuntimeError, match=r"1\.weight was moved, cast or replaced since the pool was made"):
        check()
    check("1.weight", "1.bias")


@pytest.mark.parametrize("refused", [False, True])
def test_large_buffers_are_in_huge_pages_where_there_are_some(refused, monkeypatch):
    """And are the same without them."""
    asked = []

    class Memory(mmap.mmap):
        def madvise(self, advice: int) -> None:
            asked.append(advice)
            if refused:
                raise OSError
            super().madvise(advice)

    monkeypatch.setattr(storage.mmap, "mmap", Memory)
    model = nn.Sequential(nn.Linear(700, 800), nn.Linear(800, 5))
    before = bits_of(model)
    (buffer,) = FlatStorage(model).buffers
    assert same(bits_of(model), before)
    # What is between the parameters is zero, too.
    assert buffer.count_nonzero() == sum(p.count_nonzero() for p in model.parameters())
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert asked == [mmap.MADV_HUGEPAGE]


def sharing(kind: str) -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    whole = model["embed"].weight.data
    model["head"].weight.data = {"same": whole, "rows": whole[:3], "transposed": whole.t(), "apart": whole[3:]}[kind]
    if kind == "apart":
        model["embed"].weight.data = whole[:3]
    return model


@pytest.mark.parametrize("kind", ["same", "rows", "transposed"])
def test_parameters_that_share_memory_without_being_one_are_refused(kind):
    """A delta on one would no longer reach the other."""
    model = sharing(kind)
    before = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"'embed.weight' and 'head.weight' share memory .* Tie them"):
        DeltaPool(model)
    assert [p.data_ptr() for p in model.parameters()] == before


def test_parameters_in_one_piece_already_are_moved():
    model = sharing("apart")
    before = bits_of(model)
    for _ in range(2):
        FlatStorage(model)
        assert same(bits_of(model), before)
