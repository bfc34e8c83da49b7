"""DeltaPool: what is in the weights and what is not, whoever asks, in whatever order, and whatever goes wrong."""

from __future__ import annotations

import copy
import random
import threading
import time

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_dst import DSTConfig
from peft_dst.delta import DeltaError, SparseDelta, SparseTensor
from peft_dst.serving import DeltaPool, FlatStorage, pool, storage
from peft_dst.serving.cache import Cache
from tests.models import BUILDERS, bert, logits, train


def deltas_of(name: str, folder, count: int = 3, **options) -> list:
    """Folders of adapters of one base, trained on different data."""
    torch.manual_seed(0)
    base = BUILDERS[name]()
    base.save_pretrained(folder / "base")
    found = []
    for i in range(count):
        model = get_peft_model(copy.deepcopy(base), DSTConfig(epsilon=0.05, **options))
        train(model, name, first=10 * i)
        model.save_pretrained(folder / f"task{i}")
        found.append(folder / f"task{i}")
    return [base, *found]


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def applied(base: nn.Module, folder) -> nn.Module:
    """The plain twin: a copy of the base with a delta written into it tensor by tensor."""
    model = copy.deepcopy(base)
    delta = SparseDelta.load(folder)
    delta.apply(model)
    for key, tensor in delta.dense.items():
        model.get_parameter(key.removeprefix("base_model.model.")).data = tensor
    return model


@pytest.fixture
def tasks(tmp_path):
    """A tiny BERT and three deltas of it."""
    return deltas_of("bert", tmp_path)


@pytest.fixture
def served(tasks):
    base, *folders = tasks
    with DeltaPool(base) as made:
        for folder in folders:
            made.add(folder.name, folder)
        yield made


# Storage


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
    model[0].weight.data = model[0].weight.data.to(memory_format=torch.channels_last)
    model.register_parameter("counts", nn.Parameter(torch.arange(3), requires_grad=False))
    model.register_parameter("later", nn.Parameter(torch.empty(3, device="meta")))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_meta}
    flat = FlatStorage(model)
    assert [buffer.dtype for buffer in flat.buffers] == [torch.float32, torch.bfloat16, torch.float16]
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in before.items())
    assert "counts" not in flat
    assert "later" not in flat
    flat.check()
    model[1].float()
    with pytest.raises(RuntimeError, match=r"1\.weight was moved, cast or replaced since the pool was made"):
        flat.check()
    flat.check(["1.weight", "1.bias"])


# What is in the weights


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
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


BATCH = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=BATCH).logits


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
    two = SparseDelta({}, dense={"base_model.model.classifier.weight": torch.rand(2, 16)})
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


# What is refused


def test_another_base_is_refused(tasks, tmp_path):
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


def test_tied_parameters_under_two_names(tmp_path):
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
    """A check looks at a few, and at all of them within some switches."""
    name, parameter = list(served.model.named_parameters())[-1]
    parameter.data = parameter.data.clone()
    turns = -(-len(served.storage.places) // storage.LOOKED_AT)

    def switch() -> None:
        for i in range(turns):
            with served.use(f"task{i % 2}"):
                pass

    with pytest.raises(RuntimeError, match=f"{name} was moved, cast or replaced"):
        switch()
    served.storage._watched.clear()


# Memory


class Bytes:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_the_least_recently_used_go_first():
    cache: Cache[Bytes] = Cache(10)
    for name in "abc":
        assert cache.put(name, Bytes(3)) == []
    assert cache.get("a") is not None
    assert cache.put("d", Bytes(4)) == ["b"]
    assert (cache.nbytes, len(cache)) == (10, 3)
    assert cache.put("e", Bytes(5), keep={"c"}) == ["a", "d"]
    assert ("c" in cache, cache.nbytes) == (True, 8)
    # Nothing goes for what has no room in any case.
    assert cache.put("f", Bytes(11)) == ["f"]
    assert cache.put("g", Bytes(8), keep={"c", "e"}) == ["g"]
    assert cache.nbytes == 8
    assert cache.put("e", Bytes(1)) == []
    assert cache.nbytes == 4
    assert cache.get("none") is None


def test_deltas_are_held_within_the_budget(tasks):
    base, *folders = tasks
    with DeltaPool(base) as made:
        made.add("task0", folders[0])
        with made.use("task0"):
            size = made.statistics.nbytes
    assert size > 0
    with DeltaPool(base, budget=2 * size + size // 2) as made:
        for folder in folders:
            made.add(folder.name, folder)
        for task in ("task0", "task1", "task0", "task2", "task0", "task1"):
            with made.use(task):
                assert made.statistics.nbytes <= made.budget
        found = made.statistics
        assert (found.deltas, found.ready, found.hits, found.loads, found.evictions, found.switches) == (
            3,
            2,
            2,
            4,
            2,
            6,
        )
    with DeltaPool(base, budget=0) as made:
        seed = bits_of(base)
        made.add("task0", folders[0])
        with made.use("task0"):
            assert not same(bits_of(base), seed)
            assert made.statistics.ready == 0


def test_what_was_read_is_kept_in_the_host_s_memory(tasks, monkeypatch):
    """Within its budget; a delta that was let go is then made ready without its file, and a removed one is forgotten."""
    base, *folders = tasks
    read = []
    load = SparseDelta.load
    monkeypatch.setattr(SparseDelta, "load", lambda path, **options: (read.append(path.name), load(path, **options))[1])
    with DeltaPool(base, budget=0, host_budget=2**20) as kept:
        for folder in folders:
            kept.add(folder.name, folder)
        want = []
        for _ in range(2):
            for folder in folders:
                with kept.use(folder.name) as model:
                    want.append(bits_of(model))
        assert read == [folder.name for folder in folders]
        assert all(same(one, other) for one, other in zip(want[:3], want[3:], strict=True))
        assert kept.statistics.loads == 6
        size = kept.statistics.host_nbytes
        assert size == sum(
            one.indices.nbytes + one.values.nbytes for folder in folders for one in load(folder).values()
        )
        kept.remove("task0")
        assert kept.statistics.host_nbytes < size
        kept.add("task0", folders[1])
        with kept.use("task0") as model:
            assert same(bits_of(model), want[1])
        assert len(read) == 4
    with DeltaPool(base, budget=0, host_budget=size // 2) as small:
        for folder in folders:
            small.add(folder.name, folder)
        for folder in folders:
            with small.use(folder.name):
                pass
        assert 0 < small.statistics.host_nbytes <= size // 2


def test_prefetched_deltas_are_ready(served, tmp_path):
    served.prefetch("task0", "task2", "task0")
    deadline = time.monotonic() + 60
    while served.statistics.loads < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    with served.use("task0"), served.use("task0"):
        pass
    assert (served.statistics.loads, served.statistics.hits) == (2, 1)
    # What goes wrong is told to whoever uses it.
    (tmp_path / "task1" / "adapter_model.safetensors").write_bytes(b"no tensors")
    served.prefetch("task1")
    with pytest.raises(DeltaError), served.use("task1"):
        pass


# Errors in the middle


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


def test_an_error_while_in_use_changes_nothing(served):
    with pytest.raises(ZeroDivisionError), served.use("task0"):
        raise ZeroDivisionError
    with served.use("task1"):
        pass


# Threads


def test_threads_get_what_they_ask_for(served):
    """Many threads, deltas that come and go: each forward pass is that of its delta."""
    seeds = {}
    for task in (None, *served.names()):
        with served.use(task) as model:
            seeds[task] = answer(model)
    assert len({tuple(t.flatten().tolist()) for t in seeds.values()}) == 4
    served._ready.budget = served.statistics.nbytes // 2  # so that they are read again, too
    wrong, errors = [], []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(30):
                task = rng.choice(list(seeds))
                if rng.random() < 0.2 and task:
                    served.prefetch(task)
                with served.use(task) as model:
                    found = answer(model)
                if not torch.equal(found, seeds[task]):
                    wrong.append(task)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert (wrong, errors) == ([], [])


def test_those_who_come_beside_others_write_nothing(served):
    """Also if the delta was let go and read again meanwhile: the weights change under nobody's eyes."""
    with served.use("task0"):
        want = bits_of(served.model)
        counted = served.statistics.switches
        inside = []

        def beside() -> None:
            with served.use("task0"):
                inside.append(same(bits_of(served.model), want))

        thread = threading.Thread(target=beside)
        thread.start()
        thread.join(60)
        assert inside == [True]
        served._ready.drop("task0")
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join(0.2)
        # Another copy of it waits its turn.
        assert len(inside) == 1
        assert served.statistics.switches == counted
    thread.join(60)
    assert inside == [True, True]


def test_a_new_delta_of_an_old_name(served, tasks):
    """Whoever waited for the old one is told that it was removed, not given the new one."""
    inside, go = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def hold() -> None:
        with served.use("task1"):
            inside.set()
            go.wait(60)

    def ask() -> None:
        try:
            with served.use("task0"):
                pass
        except KeyError as error:
            errors.append(error)

    threads = [threading.Thread(target=hold)]
    threads[0].start()
    inside.wait(60)

    def replace() -> None:
        served.remove("task0")
        served.add("task0", tasks[3])

    # The removal first in the queue, and then somebody who still knows the old one.
    for number, target in enumerate((replace, ask), start=1):
        threads.append(threading.Thread(target=target))
        threads[-1].start()
        deadline = time.monotonic() + 60
        while len(served._turn._waiting) < number and time.monotonic() < deadline:
            time.sleep(0.005)
    go.set()
    for thread in threads:
        thread.join(60)
    assert [error.args[0] for error in errors] == ["the delta 'task0' was removed."]


def test_a_new_delta_of_an_old_name_while_that_is_read(served, tasks, monkeypatch):
    """What was read of the old one is not taken for the new one's."""
    read, go = threading.Event(), threading.Event()
    place = pool.place

    def slowly(*arguments):
        made = place(*arguments)
        read.set()
        go.wait(60)
        return made

    monkeypatch.setattr(pool, "place", slowly)
    served.prefetch("task0")
    assert read.wait(60)
    monkeypatch.setattr(pool, "place", place)
    served.remove("task0")
    served.add("task0", tasks[3])
    go.set()
    deadline = time.monotonic() + 60
    while not served.statistics.loads and time.monotonic() < deadline:
        time.sleep(0.005)
    want = {name: one.values for name, one in SparseDelta.load(tasks[3]).items()}
    with served.use("task0") as model:
        for name, values in want.items():
            found = model.get_parameter(name).flatten()[SparseDelta.load(tasks[3])[name].indices]
            assert torch.equal(found, values)


def test_who_came_first_goes_first(served):
    """Those who want what is in the weights do not overtake those who wait for something else."""
    order: list[str] = []
    inside, go = threading.Event(), threading.Event()

    def first() -> None:
        with served.use("task0"):
            inside.set()
            go.wait(60)
            order.append("first")

    def later(name: str, task: str) -> None:
        with served.use(task):
            order.append(name)

    threads = [threading.Thread(target=first)]
    threads[0].start()
    inside.wait(60)
    # One beside it, at once.
    later("beside", "task0")
    for number, task in enumerate(("task1", "task0", "task1")):
        threads.append(threading.Thread(target=later, args=(f"{task}{number}", task)))
        threads[-1].start()
        deadline = time.monotonic() + 60
        while len(served._turn._waiting) <= number and time.monotonic() < deadline:
            time.sleep(0.005)
    assert order == ["beside"]
    go.set()
    for thread in threads:
        thread.join(60)
    assert order == ["beside", "first", "task10", "task01", "task12"]


def test_a_delta_is_removed_when_nobody_uses_it(served):
    seed = bits_of(served.model)
    inside, go, removed = threading.Event(), threading.Event(), threading.Event()
    with served.use("task0"):
        want = bits_of(served.model)

    def use() -> None:
        with served.use("task0"):
            inside.set()
            go.wait(60)
            if same(bits_of(served.model), want) and not removed.is_set():
                inside.clear()

    def remove() -> None:
        served.remove("task0")
        removed.set()

    threads = [threading.Thread(target=use), threading.Thread(target=remove)]
    threads[0].start()
    inside.wait(60)
    threads[1].start()
    assert not removed.wait(0.1)
    go.set()
    for thread in threads:
        thread.join(60)
    assert removed.is_set()
    assert not inside.is_set()
    assert same(bits_of(served.model), seed)
    assert "task0" not in served
    with pytest.raises(KeyError, match="no delta 'task0'"), served.use("task0"):
        pass


def test_a_thread_does_not_wait_for_itself(served):
    with served.use("task0"):
        with served.use("task0"):
            pass
        with (
            pytest.raises(RuntimeError, match="this thread uses 'task0', and would wait for itself"),
            served.use("task1"),
        ):
            pass
        for call in (lambda: served.remove("task1"), served.close):
            with pytest.raises(RuntimeError, match="this thread uses 'task0'; leave that first"):
                call()
    assert len(served) == 3


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
