"""What of the deltas is held in memory: read once, within the budgets, and of the right name."""

from __future__ import annotations

import threading

import pytest
import torch

from peft_dst.delta import DeltaError, SparseDelta
from peft_dst.serving import DeltaPool, pool
from tests.serving.helpers import bits_of, pool_of, same, until


def test_deltas_are_held_within_the_budget(tasks):
    base, *folders = tasks
    with pool_of(base, folders[:1]) as made, made.use("task0"):
        size = made.statistics.nbytes
    assert size > 0
    with pool_of(base, folders, budget=2 * size + size // 2) as made:
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
    with pool_of(base, folders[:1], budget=0) as made:
        seed = bits_of(base)
        with made.use("task0"):
            assert not same(bits_of(base), seed)
            assert made.statistics.ready == 0


def test_what_was_read_is_kept_in_the_host_s_memory(tasks, monkeypatch):
    """Within its budget; a delta that was let go is then made ready without its file, and a removed one is forgotten."""
    base, *folders = tasks
    read = []
    load = SparseDelta.load
    monkeypatch.setattr(SparseDelta, "load", lambda path, **options: (read.append(path.name), load(path, **options))[1])
    with pool_of(base, folders, budget=0, host_budget=2**20) as kept:
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
    with pool_of(base, folders, budget=0, host_budget=size // 2) as small:
        for folder in folders:
            with small.use(folder.name):
                pass
        assert 0 < small.statistics.host_nbytes <= size // 2


def test_files_that_changed_are_not_taken_for_those_that_were_read(tasks):
    """Under one name and version there is one delta: who has computed half of something with it goes on with the same."""
    base, *folders = tasks
    want = SparseDelta.load(folders[1])
    with DeltaPool(base, budget=0) as made:
        made.add("task", folders[0])
        with made.use("task"), made.use("task"):
            pass
        with made.use(None):
            pass
        # Written again as they were, they are the same.
        SparseDelta.load(folders[0]).save(folders[0])
        with made.use("task"):
            pass
        with made.use(None):
            pass
        want.save(folders[0])
        with pytest.raises(DeltaError, match=r"'task'.* other files than those that were read first"), made.use("task"):
            pass
        made.remove("task")
        made.add("task", folders[0])
        with made.use("task") as model:
            for name, one in want.items():
                assert torch.equal(model.get_parameter(name).flatten()[one.indices], one.values)


def test_an_interrupt_is_that_of_the_thread_that_loads(served, monkeypatch):
    """Others that wait for the same delta do not get its Ctrl-C: one of them loads in its place."""
    read, go, found = threading.Event(), threading.Event(), []
    load = SparseDelta.load

    def interrupted(path):
        read.set()
        assert go.wait(60)
        monkeypatch.setattr(SparseDelta, "load", load)
        raise KeyboardInterrupt

    monkeypatch.setattr(SparseDelta, "load", interrupted)

    def use(name):
        try:
            found.append(served.ready(name))
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=use, args=("task0",)) for _ in range(2)]
    threads[0].start()
    assert read.wait(60)
    threads[1].start()
    # It waits for the other one then.
    until(lambda: served._shelf._loading["task0"]._condition._waiters)
    go.set()
    for thread in threads:
        thread.join(60)
    assert sorted(type(one).__name__ for one in found) == ["KeyboardInterrupt", "Placed"]
    assert served.statistics.loads == 1


def test_prefetched_deltas_are_ready(served, tmp_path):
    served.prefetch("task0", "task2", "task0")
    until(lambda: served.statistics.loads == 2)
    with served.use("task0"), served.use("task0"):
        pass
    assert (served.statistics.loads, served.statistics.hits) == (2, 1)
    # What goes wrong is told to whoever uses it.
    (tmp_path / "task1" / "adapter_model.safetensors").write_bytes(b"no tensors")
    served.prefetch("task1")
    with pytest.raises(DeltaError), served.use("task1"):
        pass


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
    until(lambda: served.statistics.loads)
    want = {name: one.values for name, one in SparseDelta.load(tasks[3]).items()}
    with served.use("task0") as model:
        for name, values in want.items():
            found = model.get_parameter(name).flatten()[SparseDelta.load(tasks[3])[name].indices]
            assert torch.equal(found, values)


def test_who_needs_what_has_not_begun_does_it(served, monkeypatch):
    """A prefetch that waits for others to be read keeps nobody waiting, and reads nothing again."""
    reading, go, read = threading.Event(), threading.Event(), []
    load = SparseDelta.load

    def slowly(path):
        read.append(path.name)
        if path.name == "task0":
            reading.set()
            if not go.wait(20):
                raise TimeoutError
        return load(path)

    monkeypatch.setattr(SparseDelta, "load", slowly)
    served.prefetch("task0", "task1")
    assert reading.wait(60)
    try:
        with served.use("task1"):
            assert not go.is_set()
    finally:
        go.set()
    with served.use("task0"):
        pass
    # The thread comes to the one that was taken over before this one.
    served.prefetch("task2")
    until(lambda: served.statistics.loads == 3)
    assert read == ["task0", "task1", "task2"]
