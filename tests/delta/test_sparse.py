"""SparseDelta's algebra, by properties: every dtype, every shape, empty and 0-d tensors among them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dst.core.tiles import bits
from peft_dst.delta import DeltaError, SparseDelta, SparseTensor


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((), (1,), (7,), (3, 4), (2, 1, 5), (2, 2, 2, 2), (0,), (3, 0))
NAMES = ("scale", "encoder.layer.0.weight", "encoder.layer.0.bias", "head.weight")
settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("here")

# What weights are made of: ordinary values, zeros of both signs, and what is small enough to be lost.
VALUES = st.sampled_from([-2.5, -1.0, -0.0, 0.0, 1e-6, 0.3, 1.0, 3.0])


@st.composite
def bases(draw):
    """A few tensors, name → tensor of one dtype or of several."""
    dtypes = draw(st.one_of(st.sampled_from([[dtype] for dtype in DTYPES]), st.just(list(DTYPES))))
    base = {}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True)):
        shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(dtypes))
        values = draw(st.lists(VALUES, min_size=math.prod(shape), max_size=math.prod(shape)))
        base[name] = torch.tensor(values, dtype=dtype).view(shape)
    return base


@st.composite
def deltas(draw, base):
    """A delta of a base, with its seeds; some of its values may be their seed's."""
    tensors = {}
    for name, tensor in base.items():
        chosen = draw(st.lists(st.booleans(), min_size=tensor.numel(), max_size=tensor.numel()))
        indices = torch.tensor(chosen, dtype=torch.bool).nonzero().view(-1)
        values = draw(st.lists(VALUES, min_size=len(indices), max_size=len(indices)))
        flat = tensor.reshape(-1)
        tensors[name] = SparseTensor(
            tuple(tensor.shape), indices, torch.tensor(values, dtype=tensor.dtype), flat[indices]
        )
    return SparseDelta(tensors)


def copied(base):
    return {name: tensor.clone() for name, tensor in base.items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(bits(a[name]), bits(b[name])) for name in a)


def dense(base, delta):
    """The plain twin: a base with a delta's values, one at a time."""
    tuned = copied(base)
    for name, tensor in delta.items():
        for index, value in zip(tensor.indices.tolist(), tensor.values, strict=True):
            tuned[name].view(-1)[index] = value
    return tuned


@given(st.data())
def test_apply_then_revert_is_the_identity(data):
    base = data.draw(bases())
    delta = data.draw(deltas(base))
    weights = copied(base)
    undo = delta.apply(weights)
    assert same_bits(weights, dense(base, delta))
    undo.apply(weights)
    assert same_bits(weights, base)
    delta.apply(weights)
    delta.revert(weights)
    assert same_bits(weights, base)


@given(st.data())
def test_between_finds_what_differs(data):
    base = data.draw(bases())
    delta = data.draw(deltas(base))
    assert SparseDelta.between(base, dense(base, delta)) == delta.reduced()


@given(data=st.data())
def test_save_then_load_is_the_identity(tmp_path_factory, data):
    base = data.draw(bases())
    delta = data.draw(deltas(base))
    folder = tmp_path_factory.mktemp("delta")
    for path in (folder, folder / "alone.safetensors"):
        delta.save(path)
        loaded = SparseDelta.load(path)
        assert loaded == delta
        assert loaded.with_seeds(base).has_seeds
        if any(len(tensor) for tensor in delta.values()):
            name = next(iter(delta))
            other = {**base, name: base[name] + 1}
            with pytest.raises(DeltaError, match=f"{name!r}: the base model's values differ"):
                loaded.apply(other)
            loaded.apply(copied(other), check=False)


@given(st.data())
def test_compose_is_one_after_the_other(data):
    base = data.draw(bases())
    a, b, c = (data.draw(deltas(base)) for _ in range(3))
    weights = dense(dense(dense(base, a), b), c)
    composed = a.compose(b, c)
    assert same_bits(dense(base, composed), weights)
    assert composed == a.compose(b).compose(c)
    assert a.compose() == a.reduced()


@given(st.data())
def test_chains_of_differences_compose_in_any_order(data):
    base = data.draw(bases())
    a, b, c = (data.draw(deltas(base)) for _ in range(3))
    one, two = a.difference(b), b.difference(c)
    assert a.compose(one).compose(two) == a.compose(one.compose(two)) == c.reduced()
    assert one.compose(two) == a.difference(c)


@given(st.data())
def test_difference_leads_from_one_to_the_other(data):
    base = data.draw(bases())
    a, b = (data.draw(deltas(base)) for _ in range(2))
    assert a.compose(a.difference(b)) == b.reduced()
    weights = dense(base, a)
    a.difference(b).apply(weights)
    assert same_bits(weights, dense(base, b))
    assert a.difference(a).num_entries == 0


@given(st.data())
def test_sums_add_the_differences_up(data):
    base = data.draw(bases())
    parts = [data.draw(deltas(base)) for _ in range(data.draw(st.integers(2, 3)))]
    total = parts[0].add(*parts[1:])
    assert total == parts[1].add(parts[0], *parts[2:])
    summed = dense(base, total)
    for name, seed in base.items():
        values = [dense(base, part)[name] for part in parts]
        expected = (seed.double() + sum(value.double() - seed.double() for value in values)).to(seed)
        entries = [part[name].indices if name in part else torch.empty(0) for part in parts]
        has = torch.stack([torch.isin(torch.arange(seed.numel()), indices) for indices in entries])
        # Where only one has an entry its value stands exactly.
        for one, value in zip(has, values, strict=True):
            alone = one & (has.sum(0) == 1)
            expected.view(-1)[alone] = value.reshape(-1)[alone]
        assert torch.equal(summed[name], expected)
    assert parts[0].add() == parts[0].reduced()


@given(st.data(), st.sampled_from([0.0, 0.5, 1.0, -2.0]))
def test_scaled_by_a_factor(data, factor):
    base = data.draw(bases())
    delta = data.draw(deltas(base))
    scaled = dense(base, delta.scale(factor))
    for name, seed in base.items():
        tuned = dense(base, delta)[name]
        expected = (seed.double() + factor * (tuned.double() - seed.double())).to(seed)
        # What is rounded to at most 32 bits does not show in which order it was calculated in 64.
        exact = 1e-15 if seed.dtype == torch.float64 else 0.0
        torch.testing.assert_close(scaled[name], expected, rtol=exact, atol=exact)
    assert delta.scale(1.0) == delta.reduced()
    assert delta.scale(0.0).num_entries == sum(int((t.seeds == 0).sum()) for t in delta.scale(0.0).values())


@given(st.data())
def test_restricted_parts_make_the_whole(data):
    base = data.draw(bases())
    delta = data.draw(deltas(base)).reduced()
    inner = delta.restrict(lambda name: name.startswith("encoder"))
    outer = delta.restrict(lambda name: not name.startswith("encoder"))
    assert inner.keys() | outer.keys() == delta.keys()
    assert inner.add(outer) == delta
    if inner:
        assert delta.restrict(["encoder.layer.0"]) == delta.restrict("encoder") == inner
        assert delta.restrict(list(inner)) == inner


@given(st.data())
def test_pruned_to_the_furthest(data):
    base = data.draw(bases())
    delta = data.draw(deltas(base))
    kept = data.draw(st.integers(0, delta.num_entries))
    pruned = delta.prune(kept, "absolute")
    assert pruned.num_entries == kept
    size = sum(math.prod(tensor.shape) for tensor in delta.values())
    assert delta.prune(kind="absolute", epsilon=kept / size if size else 0.0) == pruned
    far = [
        (-abs(float(value) - float(seed)), order, index)
        for order, tensor in enumerate(delta.values())
        for index, value, seed in zip(tensor.indices.tolist(), tensor.values, tensor.seeds, strict=True)
    ]
    names = list(delta)
    expected = {(names[order], index) for _, order, index in sorted(far)[:kept]}
    assert {(name, index) for name, tensor in pruned.items() for index in tensor.indices.tolist()} == expected


@given(st.data(), st.sampled_from(DTYPES))
def test_in_another_dtype(data, dtype):
    base = data.draw(bases())
    delta = data.draw(deltas(base))
    changed = delta.to(dtype)
    assert all(t.values.dtype == dtype for t in changed.values())
    assert all(torch.equal(bits(changed[name].values), bits(delta[name].values.to(dtype))) for name in delta)
    if all(t.dtype.itemsize >= dtype.itemsize for t in base.values()):
        # It is recognised on the base it was made for, and on that one rounded to the dtype.
        rounded = {name: tensor.to(dtype) for name, tensor in base.items()}
        changed.apply(copied(base))
        changed.apply(rounded)
    assert delta.to(torch.float64).to(dtype) == changed


def one(values=(1.0, 2.0), indices=(0, 3), shape=(4,), seeds=(0.0, 0.0)):
    seeds = None if seeds is None else torch.tensor(seeds)
    return SparseDelta({"w": SparseTensor(shape, torch.tensor(indices), torch.tensor(values), seeds)})


def test_a_delta_is_immutable():
    delta = one()
    with pytest.raises(AttributeError):
        delta.tensors = {}
    with pytest.raises(TypeError):
        delta.tensors["v"] = delta["w"]
    with pytest.raises(TypeError):
        hash(delta)
    weights = {"w": torch.zeros(4)}
    undo = delta.apply(weights)
    weights["w"].fill_(9.0)
    assert undo["w"].values.tolist() == [0.0, 0.0]
    assert delta["w"].values.tolist() == [1.0, 2.0]


def test_modules_and_shared_parameters():
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(3, 2)})
    net["b"].weight = net["a"].weight
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    delta = SparseDelta({"b.weight": SparseTensor((2, 3), torch.tensor([1]), torch.tensor([5.0]))})
    undo = delta.apply(net)
    assert net["a"].weight[0, 1] == 5
    undo.apply(net)
    assert same_bits({name: p.detach() for name, p in net.named_parameters()}, before)


def test_layouts_other_than_contiguous():
    weights = {"w": torch.arange(6.0).view(2, 3).t()}
    delta = SparseDelta({"w": SparseTensor((3, 2), torch.tensor([1, 4]), torch.tensor([-1.0, -2.0]))})
    undo = delta.apply(weights)
    assert weights["w"].tolist() == [[0, -1], [1, 4], [-2, 5]]
    undo.apply(weights)
    assert torch.equal(weights["w"], torch.arange(6.0).view(2, 3).t())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "entries for 'w', which the weights do not have"),
        ({"w": torch.zeros(3, 1)}, r"'w' is of shape \(3, 1\)"),
        ({"w": torch.zeros(3)}, "entry 1 has position 3, outside a tensor of 3"),
        ({"v": torch.zeros(4), "w": torch.ones(4)}, "'w': the base model's values differ"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(weights, message):
    both = SparseDelta({"v": SparseTensor((4,), torch.tensor([0]), torch.tensor([1.0])), **one()})
    weights = {"v": torch.zeros(4), **weights}
    before = copied(weights)
    with pytest.raises(DeltaError, match=message):
        both.apply(weights)
    assert same_bits(weights, before)


def test_an_error_while_writing_is_undone(monkeypatch):
    from peft_dst.delta import sparse

    calls = []

    def failing(target, indices, values, scatter=sparse.scatter):
        scatter(target, indices, values)
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt

    base = {name: torch.zeros(4) for name in "abc"}
    delta = SparseDelta({name: one()["w"] for name in "abc"})
    monkeypatch.setattr(sparse, "scatter", failing)
    weights = copied(base)
    with pytest.raises(KeyboardInterrupt):
        delta.apply(weights)
    assert len(calls) == 4
    assert same_bits(weights, base)


def test_calculating_needs_the_seeds():
    bare = one(seeds=None)
    for calculate in (
        lambda: bare.scale(2.0),
        lambda: bare.reduced(),
        lambda: bare.prune(1),
        lambda: bare.revert({"w": torch.zeros(4)}),
        lambda: bare.compose(one()),
        lambda: one().add(bare),
        lambda: one().difference(bare),
    ):
        with pytest.raises(ValueError, match=r"delta\.with_seeds\(base\)"):
            calculate()
    assert bare.with_seeds({"w": torch.zeros(4)}).scale(2.0)["w"].values.tolist() == [2.0, 4.0]


def test_deltas_of_two_bases_are_not_mixed(tmp_path):
    with pytest.raises(DeltaError, match="different seeds in 'w'"):
        one().add(one(seeds=(0.0, 1.0)))
    # Neither has what the first has.
    others = one(indices=(0, 1)), one(indices=(0, 1), seeds=(0.0, 1.0))
    with pytest.raises(DeltaError, match="different seeds in 'w'"):
        one(indices=(2, 3)).add(*others)
    with pytest.raises(DeltaError, match=r"float32 \(4,\) in one delta and torch.float32 \(5,\)"):
        one().compose(one(shape=(5,)))
    with pytest.raises(ValueError, match=r"no entries in 'nothing'"):
        one().restrict(["nothing"])
    with pytest.raises(ValueError, match="2 entries, of which 3 cannot"):
        one().prune(3)
    with pytest.raises(ValueError, match="give one of num_entries and epsilon"):
        one().prune(1, epsilon=0.5)
    with pytest.raises(ValueError, match="finite"):
        one().scale(math.inf)
    with pytest.raises(DeltaError, match=r"not finite in torch\.float16"):
        one(values=(1.0, 1e6)).to(torch.float16)
    with pytest.raises(ValueError, match="recognise its base"):
        one(seeds=None).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_non_finite_values_on_request(tmp_path):
    with pytest.raises(DeltaError, match="entry 1 has the value nan"):
        one(values=(1.0, math.nan)).save(tmp_path)
    one(values=(1.0, math.nan)).save(tmp_path, allow_nonfinite=True)
    with pytest.raises(DeltaError, match="entry 1 has the value nan"):
        SparseDelta.load(tmp_path)
    loaded = SparseDelta.load(tmp_path, allow_nonfinite=True)
    assert loaded["w"].values.isnan().tolist() == [False, True]
    with pytest.raises(DeltaError, match="entry 1 has the value nan"):
        loaded.apply({"w": torch.zeros(4)})


@pytest.mark.parametrize("stood", [math.inf, -math.inf, math.nan])
def test_what_was_not_finite_comes_back(stood):
    """A mask's minus infinity, a weight that diverged: whatever stood there is put back."""
    weights = {"w": torch.tensor([stood, 1.0, 2.0])}
    before = weights["w"].clone()
    delta = SparseDelta.between(weights, {"w": torch.tensor([0.0, 1.0, 5.0])})
    undo = delta.apply(weights)
    assert weights["w"].tolist() == [0.0, 1.0, 5.0]
    undo.apply(weights, check=False)
    assert torch.equal(bits(weights["w"]), bits(before))
    delta.apply(weights)
    delta.revert(weights)
    assert torch.equal(bits(weights["w"]), bits(before))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_that_no_delta_changes_are_named(dtype):
    other = torch.ones(4).to(dtype)
    with pytest.raises(DeltaError, match=f"'w' is {dtype}: a delta has values for float64, float32"):
        one().apply({"w": other})
    with pytest.raises(DeltaError, match=f"'w' is {dtype}"):
        SparseDelta.between({"w": other}, {"w": torch.zeros(4).to(dtype)})
    assert not SparseDelta.between({"w": other}, {"w": other.clone()})
    with pytest.raises(ValueError, match="float16"):
        one().to(dtype)


@pytest.mark.parametrize(
    ("name", "indices"), [("w", [3, 1]), ("w", [1, 1]), ("w", [1, 4]), ("w", [-1, 1]), ("", [0, 1]), ("a\n.w", [0, 1])]
)
def test_what_cannot_be_read_is_not_written(name, indices, tmp_path):
    one().save(tmp_path)
    values = torch.ones(2)
    with pytest.raises(DeltaError):
        SparseDelta({name: SparseTensor((4,), torch.tensor(indices), values, values)}).save(tmp_path)
    assert SparseDelta.load(tmp_path) == one()
