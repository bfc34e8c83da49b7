"""DeltaPool: what is in the weights and what is not, in whatever order, and whatever goes wrong."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_dst import DSTConfig
from peft_dst.delta import DeltaError, SparseDelta, SparseTensor
from peft_dst.serving import DeltaPool, FlatStorage, pool
from peft_dst.serving.heads import heads_of
from peft_dst.serving.placed import Part, Placed, write
from tests.models import BUILDERS, bert, train
from tests.serving.helpers import answer, applied, bits_of, deltas_of, pool_of, same


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_weights_are_those_of_the_delta_in_use(name, tmp_path):
    base, *folders = deltas_of(name, tmp_path)
    seed, want = bits_of(base), {folder.name: bits_of(applied(base, folder)) for folder in folders}
    made = DeltaPool(base)
    assert made.add_folder(tmp_path) == [folder.name for folder in folders]
    for task in ("task0", "task1", "task1", "task2", "task0", None, "task2"):
        with made.use(task) as model:
            assert model is base
            assert made.shown == task
            assert same(bits_of(base), want[task] if task else seed)
    made.close()
    assert same(bits_of(base), seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_on_the_cpu_is_what_scatter_writes(dtype):
    values = torch.tensor([0.0, -0.0, math.inf, 1e30, 1e-7, -3.0], dtype=dtype)
    part = Part(0, torch.tensor([1, 2, 5, 6, 8, 11]), values, torch.randn(6).to(dtype))
    layer = nn.Linear(12, 1, bias=False, dtype=dtype)
    flat, plain = FlatStorage(copy.deepcopy(layer)), FlatStorage(layer)
    plain.arrays[0] = None
    for seeds in (False, True):
        before = plain.buffers[0].clone()
        for each in (flat, plain):
            write(each, Placed((part,)), seeds)
        one, other = (each.buffers[0].view(torch.uint8) for each in (flat, plain))
        assert torch.equal(one, other)
        assert not torch.equal(other, before.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    base = bert().to(dtype)
    seed = bits_of(base)
    delta = SparseDelta.between(base.state_dict(), _noisy(base).state_dict())
    want = copy.deepcopy(base)
    delta.apply(want)
    with DeltaPool(base) as made:
        made.add("noise", delta)
        with made.use("noise"):
            assert same(bits_of(base), bits_of(want))
    assert same(bits_of(base), seed)


def _noisy(base: nn.Module, share: float = 0.01) -> nn.Module:
    other = copy.deepcopy(base)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * (torch.rand(p.shape) < share))
    return other


def test_heads_of_other_shapes(tmp_path):
    """A delta's dense tensors stand in for the base's, and leave with it."""
    torch.manual_seed(0)
    base, made_from = bert(), bert(num_labels=5)
    made_from.bert.load_state_dict(base.bert.state_dict())
    model = get_peft_model(made_from, DSTConfig(epsilon=0.05, modules_to_save=["classifier"]))
    train(model, "bert")
    model.save_pretrained(tmp_path / "five")
    want = answer(model)
    seed, own = bits_of(base), answer(base)
    with DeltaPool(base) as made:
        made.add("five", tmp_path / "five")
        for _ in range(2):
            with made.use("five"):
                assert torch.equal(answer(base), want)
            with made.use(None):
                assert torch.equal(answer(base), own)
    assert same(bits_of(base), seed)


def test_a_delta_is_placed_while_a_head_of_another_shape_stands_in():
    torch.manual_seed(0)
    base = bert()
    head = {"weight": torch.rand(2, 16), "bias": torch.rand(2)}
    two = SparseDelta({}, dense={f"base_model.model.classifier.{name}": tensor for name, tensor in head.items()})
    index = torch.tensor([40])
    other = SparseDelta({"classifier.weight": SparseTensor((3, 16), index, torch.ones(1))})
    with DeltaPool(base) as made:
        made.add("two", two)
        made.add("other", other)
        with made.use("two"):
            made.verify(other)
        with made.use("other"):
            assert base.classifier.weight.flatten()[40] == 1


def test_seeds_are_the_base_s_also_below_another_delta(tasks):
    """Two deltas that change the same components: the second is read while the first is in the weights."""
    base, first, _, _ = tasks
    seed = bits_of(base)
    delta = SparseDelta.load(first)
    other = delta.with_seeds(base).scale(3.0)
    with DeltaPool(base) as made:
        made.add("first", first)
        made.add("other", other)
        with made.use("first"):
            pass
        with made.use("other"):
            assert same(bits_of(base), bits_of(_with(base, seed, other)))
        with made.use(None):
            assert same(bits_of(base), seed)


def _with(base: nn.Module, seed: dict, delta: SparseDelta) -> nn.Module:
    model = copy.deepcopy(base)
    for name, p in model.named_parameters():
        p.data = seed[name].view(p.dtype).clone()
    delta.apply(model)
    return model


def test_another_base_is_refused(tasks):
    base, folder, *_ = tasks
    with torch.no_grad():
        base.bert.encoder.layer[0].output.dense.weight.add_(1.0)
    before = bits_of(base)
    with DeltaPool(base) as made:
        made.add("a", folder)
        for _ in range(2):
            with pytest.raises(DeltaError, match="the base model's values differ"), made.use("a"):
                pass
        assert same(bits_of(base), before)
        assert made.shown is None
    with DeltaPool(base, check=False) as made:
        made.add("a", folder)
        with made.use("a"):
            assert not same(bits_of(base), before)


def test_what_does_not_fit_is_refused(tasks, tmp_path):
    base, folder, *_ = tasks
    delta = SparseDelta.load(folder)
    name = next(iter(delta))
    with DeltaPool(base) as made:
        made.add("elsewhere", SparseDelta({"no.such.weight": delta[name]}))
        made.add("dense", SparseDelta({}, {"base_model.model.score.weight": torch.zeros(2, 2)}))
        made.add("flat", SparseDelta({}, {"base_model.model.classifier.weight": torch.zeros(2)}))
        for task, message in (
            ("elsewhere", r"entries for 'no\.such\.weight', which is no plain floating parameter"),
            ("dense", r"a whole tensor for 'score\.weight', which this model does not have"),
            ("flat", r"a tensor of shape \(2,\) for 'classifier\.weight', which has \(3, 16\)"),
        ):
            with pytest.raises(DeltaError, match=message), made.use(task):
                pass
        with pytest.raises(KeyError, match="there is no delta 'none'"), made.use("none"):
            pass
        with pytest.raises(KeyError, match="there is no delta 'none'"):
            made.prefetch("none")
        with pytest.raises(ValueError, match="there is a delta 'flat' already"):
            made.add("flat", delta)
        with pytest.raises(ValueError, match="there is no "):
            made.add("nowhere", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has PEFT adapters in it"):
        DeltaPool(get_peft_model(base, DSTConfig()))
    with pytest.raises(ValueError, match="no floating parameters"):
        DeltaPool(nn.ReLU())


def test_tied_parameters_under_two_names():
    base = BUILDERS["gpt2"]()
    (one, other) = "transformer.wte.weight", "lm_head.weight"
    delta = SparseDelta.between({one: base.lm_head.weight.detach()}, {one: base.lm_head.weight.detach() + 1})
    with DeltaPool(base) as made:
        made.add("one", delta)
        made.add("both", SparseDelta({one: delta[one], other: delta[one]}))
        with made.use("one"):
            assert base.lm_head.weight is base.transformer.wte.weight
        with pytest.raises(DeltaError, match="for one parameter under two names"), made.use("both"):
            pass


def test_a_model_that_was_moved_is_refused(served):
    served.model.double()
    with pytest.raises(RuntimeError, match="was moved, cast or replaced"), served.use("task0"):
        pass
    served.model.float()
    served.storage._watched.clear()  # its parameters are gone; nothing to put back


def test_a_parameter_that_was_replaced_is_found_soon(served):
    """A check looks at one, and at all of them within some switches."""
    name, parameter = list(served.model.named_parameters())[-1]
    parameter.data = parameter.data.clone()
    turns = len(served.storage.places)

    def switch() -> None:
        for i in range(turns):
            with served.use(f"task{i % 2}"):
                pass

    with pytest.raises(RuntimeError, match=f"{name} was moved, cast or replaced"):
        switch()
    served.storage._watched.clear()


@pytest.mark.parametrize("at", range(4))
def test_an_error_in_a_switch_leaves_the_base(served, at, monkeypatch):
    """At each of its writes, half of it done."""
    seed = bits_of(served.model)
    with served.use("task1"):
        want = bits_of(served.model)
    with served.use("task0"):
        pass
    real, calls = pool.write, []

    def write(flat, placed, seeds=False):
        calls.append(None)
        if len(calls) == at // 2 + 1:
            if at % 2:
                real(flat, placed, seeds)
            raise KeyboardInterrupt
        real(flat, placed, seeds)

    monkeypatch.setattr(pool, "write", write)
    with pytest.raises(KeyboardInterrupt), served.use("task1"):
        pass
    assert same(bits_of(served.model), seed)
    assert served.shown is None
    with served.use("task1"):
        assert same(bits_of(served.model), want)


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("at", range(4))
def test_an_error_between_whole_tensors_leaves_the_base(tmp_path, at, done, monkeypatch):
    """A head has two: those of the delta that leaves are put back, then those of the other one come."""
    base, *folders = deltas_of("bert", tmp_path, count=2, modules_to_save=["classifier"])
    seed, own = bits_of(base), dict(base.named_parameters())
    with pool_of(base, folders) as made:
        with made.use("task1"):
            want = bits_of(base)
        with made.use("task0"):
            pass
        real, calls = made.storage.replace, []

        def replace(name, parameter):
            calls.append(name)
            if len(calls) != at + 1 or done:
                real(name, parameter)
            if len(calls) == at + 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(made.storage, "replace", replace)
        with pytest.raises(KeyboardInterrupt), made.use("task1"):
            pass
        assert len(calls) > at
        assert made.shown is None
        assert same(bits_of(base), seed)
        assert all(parameter is own[name] for name, parameter in base.named_parameters())
        with made.use("task1"):
            assert same(bits_of(base), want)
    assert same(bits_of(base), seed)


def test_a_folder_is_added_as_a_whole_or_not_at_all(tasks, tmp_path):
    base, *folders = tasks
    with DeltaPool(base) as made:
        made.add("task1", folders[0])
        with pytest.raises(ValueError, match="there is a delta 'task1' already; remove it first"):
            made.add_folder(tmp_path)
        assert made.names() == ["task1"]
        made.remove("task1")
        assert made.add_folder(tmp_path) == made.names() == ["task0", "task1", "task2"]


def test_an_error_while_in_use_changes_nothing(served):
    with pytest.raises(ZeroDivisionError), served.use("task0"):
        raise ZeroDivisionError
    with served.use("task1"):
        pass


def test_a_closed_pool(served):
    seed = bits_of(served.model)
    with served.use("task0"):
        pass
    served.close()
    assert same(bits_of(served.model), seed)
    for call in (
        lambda: served.add("x", "."),
        lambda: served.prefetch("task0"),
        lambda: served.use("task0").__enter__(),
    ):
        with pytest.raises(RuntimeError, match="the pool is closed"):
            call()
    served.close()


@pytest.mark.parametrize("host_budget", [0, 2**20])
def test_a_file_that_is_overwritten_changes_nothing_that_was_read(host_budget, tmp_path):
    """As `cp` does, in place: whole tensors and what is kept in the host's memory are copies."""
    base, folder = deltas_of("bert", tmp_path, count=1, modules_to_save=["classifier"])
    with DeltaPool(base, budget=2**20 - host_budget, host_budget=host_budget) as made:
        made.add("task", folder)
        with made.use("task"):
            want = answer(base)
        with made.use(None):
            pass
        file = folder / "adapter_model.safetensors"
        size = file.stat().st_size
        with file.open("r+b") as stream:
            stream.write(bytes(size))
        with made.use("task"):
            assert torch.equal(answer(base), want)
        assert made.statistics.loads == 1 + bool(host_budget)


def test_the_base_s_name_in_mixed_batches_is_no_delta_s(served, tasks):
    with pytest.raises(ValueError, match="'__base__' is what mixed batches call the base; give the delta another name"):
        served.add("__base__", tasks[1])


def test_a_version_is_another_one_s_after_a_delta_was_added_again(served, tasks):
    _, folder, *_ = tasks
    first = served.version("task0")
    assert first == served.version("task0") != served.version("task1")
    served.remove("task0")
    with pytest.raises(KeyError, match="there is no delta 'task0'"):
        served.version("task0")
    served.add("task0", folder)
    assert served.version("task0") > first


def test_parameters_that_were_assigned_anew_are_told(tasks):
    base, *folders = tasks
    made = pool_of(base, folders)
    base.load_state_dict({name: tensor.clone() for name, tensor in base.state_dict().items()}, assign=True)

    def switch() -> None:
        for _ in range(len(made.storage.places)):
            for name in ("task0", "task1"):
                with made.use(name):
                    pass

    with pytest.raises(RuntimeError, match="was moved, cast or replaced since the pool was made"):
        switch()


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        ({"classifier.weight": torch.zeros(0, 16), "classifier.bias": torch.zeros(0)}, r"a tensor of shape \(0, 16\)"),
        ({"classifier.weight": torch.zeros(2, 16)}, r"a tensor of shape \(2, 16\) for 'classifier.weight'"),
        ({"classifier.weight": torch.zeros(2, 16), "classifier.bias": torch.zeros(4)}, r"a tensor of shape \(2, 16\)"),
        ({"classifier.weight": torch.zeros(3, 8), "classifier.bias": torch.zeros(3)}, r"a tensor of shape \(3, 8\)"),
        ({"bert.embeddings.LayerNorm.weight": torch.zeros(7)}, r"a tensor of shape \(7,\)"),
        (
            {"bert.embeddings.LayerNorm.weight": torch.zeros(7), "bert.embeddings.LayerNorm.bias": torch.zeros(7)},
            r"a tensor of shape \(7,\)",
        ),
        ({"classifier.bias": torch.zeros(3, dtype=torch.int64)}, "a tensor of torch.int64 for 'classifier.bias'"),
        ({"classifier.bias": torch.zeros(3, dtype=torch.complex64)}, "a tensor of torch.complex64"),
        ({"classifier.bias": torch.full((3,), 1e300, dtype=torch.float64)}, "'classifier.bias' is not finite at"),
        (
            {"bert.embeddings.position_embeddings.weight": torch.zeros(7, 16)},
            r"a tensor of shape \(7, 16\) for 'bert.embeddings.position_embeddings.weight'",
        ),
    ],
)
def test_whole_tensors_that_do_not_fit_are_refused(served, dense, message):
    delta = SparseDelta({}, dense={f"base_model.model.{name}": tensor for name, tensor in dense.items()})
    with pytest.raises(DeltaError, match=message):
        served.verify(delta)


def test_heads_may_have_another_number_of_rows_and_embeddings_more():
    """Keys of one attention head would be broadcast to all; what is kept of such a text goes with that of no other."""
    base = BUILDERS["llama"]()
    for name, size, fits in (
        ("lm_head", 70, True),
        ("lm_head", 50, True),
        ("model.embed_tokens", 70, True),
        ("model.embed_tokens", 50, False),
        ("model.layers.0.self_attn.k_proj", 8, False),
        ("model.layers.0.mlp.down_proj", 1, False),
        ("model.layers.0.mlp.down_proj", 32, False),
    ):
        weight = torch.rand(size, base.get_submodule(name).weight.shape[1])
        delta = SparseDelta({}, dense={f"base_model.model.{name}.weight": weight})
        with DeltaPool(copy.deepcopy(base)) as made:
            if fits:
                made.verify(delta)
                continue
            with pytest.raises(
                DeltaError,
                match=rf"for '{name}\.weight', .* A head may have another number of rows, and embeddings more",
            ):
                made.verify(delta)


def test_what_is_a_head():
    bare, plain = bert().bert, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False))
    for model, heads in (
        (bert(), ["classifier"]),
        (BUILDERS["roberta"](), ["classifier"]),
        (BUILDERS["gpt2"](), ["lm_head"]),
        (BUILDERS["t5"](), ["lm_head"]),
        (BUILDERS["vit"](), ["classifier"]),
        (bare, []),
        # Of a plain module nobody can tell.
        (plain, ["0", "1"]),
    ):
        found = heads_of(model)
        names = [name for name, module in model.named_modules() if module in found and [*module.parameters(False)]]
        assert names == heads, type(model)


def test_a_pool_that_is_made_in_inference_mode_serves_outside(tasks):
    base, folder, *_ = tasks
    with torch.inference_mode():
        made = DeltaPool(base)
        made.add("task0", folder)
    with made, made.use("task0"):
        pass
    with torch.inference_mode():
        inside = bert()
    with pytest.raises(ValueError, match=r"was made under torch\.inference_mode"):
        DeltaPool(inside)
