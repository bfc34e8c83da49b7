"""Threads at one base: each with the weights of its delta, and who came first goes first."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from peft_dst.delta import SparseDelta
from peft_dst.serving import placed
from peft_dst.serving.turns import Turn
from tests.serving.helpers import answer, bits_of, pool_of, same, until


def test_threads_get_what_they_ask_for(served, tasks):
    """Many threads, deltas that come and go: each forward pass is that of its delta."""
    seeds = {}
    for task in (None, *served.names()):
        with served.use(task) as model:
            seeds[task] = answer(model)
    assert len({tuple(t.flatten().tolist()) for t in seeds.values()}) == 4
    served_bytes = served.statistics.nbytes
    served.close()
    # So that they are read again, too.
    tight = pool_of(served.model, tasks[1:], budget=served_bytes // 2)
    wrong, errors = [], []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(30):
                task = rng.choice(list(seeds))
                if rng.random() < 0.2 and task:
                    tight.prefetch(task)
                with tight.use(task) as model:
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
    assert tight.statistics.evictions > 0
    tight.close()


@pytest.mark.parametrize("budget", [2**30, 0])
def test_those_who_come_beside_others_write_nothing(tasks, budget):
    """Also if there is no room to hold it beside the weights."""
    base, folder, *_ = tasks
    inside = []
    with pool_of(base, [folder], budget=budget) as made:

        def beside() -> None:
            with made.use("task0"):
                inside.append(same(bits_of(base), want))

        with made.use("task0"):
            want = bits_of(base)
            counted = made.statistics.switches
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join(60)
            assert inside == [True]
            assert (made.statistics.switches, made.statistics.loads) == (counted, 1)


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
        until(lambda number=number: served._turn.waiting == number)
    go.set()
    for thread in threads:
        thread.join(60)
    assert [error.args[0] for error in errors] == ["the delta 'task0' was removed."]


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
    for number, task in enumerate(("task1", "task0", "task1"), start=1):
        threads.append(threading.Thread(target=later, args=(f"{task}{number}", task)))
        threads[-1].start()
        until(lambda number=number: served._turn.waiting == number)
    assert order == ["beside"]
    go.set()
    for thread in threads:
        thread.join(60)
    assert order == ["beside", "first", "task11", "task02", "task13"]


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


def test_tasks_of_one_thread_are_counted(served):
    """As those of asyncio, or generators: who comes second keeps the delta there when the first one has ended."""

    def task(name):
        with served.use(name) as model:
            while True:
                yield bits_of(model)

    first, second = task("task0"), task("task0")
    want = next(first)
    next(second)
    first.close()
    with pytest.raises(RuntimeError, match="this thread uses 'task0', and would wait for itself to have 'task1'"):
        next(task("task1"))
    # Nor does another thread come in between.
    thread = threading.Thread(target=lambda: next(task("task1")))
    thread.start()
    until(lambda: served._turn.waiting)
    assert same(next(second), want)
    second.close()
    thread.join(60)
    with served.use("task1"):
        pass


def test_it_may_be_left_in_another_thread(served):
    """As what a web framework sets up for a request, and tears down after it."""
    entered = served.use("task0")
    entered.__enter__()
    thread = threading.Thread(target=entered.__exit__, args=(None, None, None))
    thread.start()
    thread.join(60)
    with served.use("task1"):
        assert served.shown == "task1"
    found = []

    def other() -> None:
        with served.use("task0"):
            found.append(served.shown)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(60)
    assert found == ["task0"]


def test_who_has_it_does_not_queue_behind_others(served):
    """Else it would wait for those who wait for it."""

    def other() -> None:
        with served.use("task1"):
            pass

    with served.use("task0"):
        thread = threading.Thread(target=other)
        thread.start()
        until(lambda: served._turn.waiting)
        with served.use("task0"):
            pass
    thread.join(60)
    assert served.shown == "task1"


def test_a_delta_that_is_checked_keeps_nobody_from_the_weights(served, tasks, monkeypatch):
    """A large upload takes seconds; what is read of the weights for it does not."""
    checking, go, switched = threading.Event(), threading.Event(), threading.Event()
    with served.use("task1"):
        pass
    served.ready("task2")

    def slowly(*arguments):
        checking.set()
        assert go.wait(60)

    def switch():
        with served.use("task2"):
            switched.set()

    monkeypatch.setattr(placed, "check_seed", slowly)
    threads = [
        threading.Thread(target=lambda: served.verify(SparseDelta.load(tasks[1]))),
        threading.Thread(target=switch),
    ]
    threads[0].start()
    assert checking.wait(60)
    threads[1].start()
    assert switched.wait(10)
    go.set()
    for thread in threads:
        thread.join(60)


def test_ctrl_c_when_a_turn_has_just_been_taken_leaves_it(monkeypatch):
    """It may come when the lock has been left already: nobody would ever end such a turn."""
    turn = Turn()

    class Interrupted:
        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()
            monkeypatch.undo()
            raise KeyboardInterrupt

    lock = turn._lock
    monkeypatch.setattr(turn, "_lock", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        turn.take("mine")
    thread = threading.Thread(target=turn.take, args=("another's",), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
