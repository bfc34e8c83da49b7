"""Mixed batches of a pool: each sample as if its delta alone were in the weights."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from peft_dst.delta import SparseDelta, SparseTensor
from peft_dst.serving import DeltaPool
from tests.serving.helpers import bits_of, deltas_of, same
from tests.serving.mixtures import NAMES, one_by_one, rows, twins_of


@pytest.mark.parametrize("names", [NAMES, sorted(NAMES, key=str), ["task1", "task1", None, None]], ids=len)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_each_sample_has_its_own_delta(name, names, tmp_path):
    base, *folders = deltas_of(name, tmp_path, dtype=torch.float64)
    plain = twins_of(base, folders)
    given = rows(name, len(names))
    wanted = one_by_one(plain, names, given)
    with DeltaPool(base) as pool:
        pool.add_folder(tmp_path)
        before = bits_of(base)
        # Twice: norms are then run once for all samples, and what was arranged is used again.
        for _ in range(2):
            with pool.mix(names) as model:
                found = model(**given).logits
                assert pool.shown is None
            assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-11)
            assert same(bits_of(base), before)
        assert not torch.allclose(wanted, one_by_one(plain, [None] * len(names), given), rtol=1e-3)


def test_generation_and_beams(tmp_path):
    base, *folders = deltas_of("llama", tmp_path, dtype=torch.float64)
    plain = twins_of(base, folders)
    names = ["task2", "task0", None]
    ids = torch.randint(3, 40, (3, 5))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 2):
        wanted = [
            plain[name].generate(
                row[None], attention_mask=torch.ones(1, 5, dtype=torch.int64), num_beams=beams, **options
            )
            for name, row in zip(names, ids, strict=True)
        ]
        with DeltaPool(copy.deepcopy(base)) as pool:
            pool.add_folder(tmp_path)
            with pool.mix(names, copies=beams) as model:
                found = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=beams, **options)
        assert torch.equal(found, torch.cat(wanted))


def test_whole_heads(tmp_path):
    base, *folders = deltas_of("bert", tmp_path, dtype=torch.float64, modules_to_save=["classifier"])
    plain = twins_of(base, folders)
    given = rows("bert", len(NAMES))
    with DeltaPool(base) as pool:
        pool.add_folder(tmp_path)
        with pool.mix(NAMES) as model:
            found = model(**given).logits
        assert torch.allclose(found, one_by_one(plain, NAMES, given), rtol=1e-9, atol=1e-11)
        assert same(bits_of(base), bits_of(plain[None]))


def test_one_delta_for_all_is_put_into_the_weights(twinned):
    pool, plain = twinned
    given = rows("bert", 3)
    with pool.mix(["task1"] * 3) as model:
        assert pool.shown == "task1"
        assert torch.allclose(model(**given).logits, one_by_one(plain, ["task1"] * 3, given), rtol=1e-9)


def test_it_is_arranged_while_another_delta_is_in_the_weights(twinned):
    """What norms have where nothing changes is the base's, not that of the delta that happens to be there."""
    pool, plain = twinned
    given = rows("bert", len(NAMES))
    with pool.use("task2"):
        for name in ("task0", "task1"):
            pool._shelf.mixable(name)
    with pool.mix(NAMES) as model:
        found = model(**given).logits
    assert torch.allclose(found, one_by_one(plain, NAMES, given), rtol=1e-9, atol=1e-11)


def test_a_new_delta_of_an_old_name(twinned, tmp_path):
    pool, plain = twinned
    names, given = ["task0", "task1"], rows("bert", 2)
    with pool.mix(names) as model:
        model(**given)
    pool.remove("task0")
    with pytest.raises(KeyError, match="task0"), pool.mix(names):
        pass
    pool.add("task0", tmp_path / "task2")
    with pool.mix(names) as model:
        found = model(**given).logits
    assert torch.allclose(found, one_by_one(plain, ["task2", "task1"], given), rtol=1e-9, atol=1e-11)


def test_whatever_goes_wrong_leaves_the_base(twinned):
    pool, plain = twinned
    with pytest.raises(ZeroDivisionError), pool.mix(NAMES):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="number of inputs"), pool.mix(NAMES) as model:
        model(**rows("bert", 2))
    with pytest.raises(KeyError, match="nobody"), pool.mix(["task0", "nobody"]):
        pass
    with pool.use("task0"), pytest.raises(RuntimeError, match="leave that first"), pool.mix(NAMES):
        pass
    with pool.mix(NAMES), pytest.raises(RuntimeError, match="would wait for itself"), pool.use("task0"):
        pass
    with pool.use(None):
        assert same(bits_of(pool.model), bits_of(plain[None]))
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in pool.model.modules())
    pool.model.train()
    with pytest.raises(ValueError, match=r"call model\.eval"), pool.mix(NAMES):
        pass
    pool.model.eval()


def test_others_wait_meanwhile(twinned):
    pool, plain = twinned
    given, seen = rows("bert", 1), []

    def other() -> None:
        with torch.no_grad(), pool.use("task2") as model:
            seen.append(model(**given).logits)

    with pool.mix(NAMES):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(60)
    assert torch.allclose(seen[0], one_by_one(plain, ["task2"], given), rtol=1e-9)


def test_a_mixed_batch_is_left_before_another_use(twinned):
    """Else what runs inside would be mixed, under the name of the base."""
    pool, _ = twinned
    with pool.mix(["task0", "task1"]):
        for use in (pool.use(None), pool.use("task0"), pool.mix([None, None]), pool.mix(["task1", "task0"])):
            with pytest.raises(RuntimeError, match="this thread computes a mixed batch"), use:
                pass


def test_pools_in_several_threads_leave_the_compiler_as_it_was(twinned, tmp_path):
    """Whoever leaves first, what is compiled runs uncompiled until the last one has left, and compiled from then on."""
    one, _ = twinned
    compiled: list[object] = []

    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    def compiles() -> bool:
        torch.compiler.reset()
        compiled.clear()
        torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
        return bool(compiled)

    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with pool.mix(NAMES):
            entered.set()
            leave.wait(60)

    with DeltaPool(copy.deepcopy(one.model)) as pool:
        pool.add_folder(tmp_path)
        assert compiles()
        thread = threading.Thread(target=other)
        with one.mix(NAMES):
            thread.start()
            assert entered.wait(60)
            assert not compiles()
        assert not compiles()
        leave.set()
        thread.join(60)
        assert compiles()
        with one.mix(NAMES):
            assert not compiles()
        assert compiles()
    torch.compiler.reset()


class WithPositions(nn.Module):
    """Positions are one row for all samples, however many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(5, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.positions(torch.arange(hidden.shape[1])[None])


def test_calls_with_and_without_repeated_samples_in_one_batch():
    """As where only some of a generation's calls have a row for each beam."""
    model = WithPositions().eval()
    hidden, tables = torch.randn(4, 5, 8), {}
    with DeltaPool(model) as pool:
        for name in "ab":
            tables[name] = torch.randn(5, 8)
            entries = SparseTensor((5, 8), torch.arange(40), tables[name].flatten())
            pool.add(name, SparseDelta({"positions.weight": entries}))
        with pool.mix(["a", "b"], copies=2) as mixed:
            for count, names in ((4, "aabb"), (2, "ab"), (4, "aabb")):
                want = hidden[:count] + torch.stack([tables[name] for name in names])
                assert torch.equal(mixed(hidden[:count]), want)
