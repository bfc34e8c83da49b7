"""The engine while deltas are read: others go on, and whatever becomes of it is told to those who wait for it."""

from __future__ import annotations

import copy
import threading
import time

import pytest

from peft_dst.delta import DeltaError, SparseDelta
from peft_dst.server.engine import Engine, Stopped
from peft_dst.server.engine.loading import Loading
from peft_dst.serving import DeltaPool
from tests.server.engines import SECONDS, Gate, check_answers, expected, generating, noisy
from tests.serving.helpers import pool_of, until


class Slow:
    """Files that take until they may be read; an error instead of what is in them, if there is one."""

    def __init__(self, monkeypatch):
        self.reading, self.go = threading.Event(), threading.Event()
        self.read, self.by, self.error = [], [], None
        self._load = SparseDelta.load
        monkeypatch.setattr(SparseDelta, "load", self._slowly)

    def _slowly(self, path):
        self.read.append(path.name)
        self.by.append(threading.current_thread().name)
        if path.name.startswith("slow"):
            self.reading.set()
            if not self.go.wait(20):
                raise TimeoutError
            if self.error is not None:
                raise self.error
        return self._load(path)


@pytest.fixture
def slow(monkeypatch):
    made = Slow(monkeypatch)
    yield made
    made.go.set()


@pytest.fixture
def folders(causal, tmp_path):
    """Of deltas that no pool has read."""
    names = ["slow", "slow too", "other", "another"]
    for seed, name in enumerate(names, 20):
        noisy(causal.model, seed).save(tmp_path / name)
    return {name: tmp_path / name for name in names}


@pytest.fixture
def plain(causal, folders):
    """What is to be answered, with a copy of the base."""
    with pool_of(copy.deepcopy(causal.model), folders.values()) as pool:
        yield {name: expected(pool, name, [5, 6, 7], 4) for name in (None, *folders)}


@pytest.fixture
def engine(causal, folders, plain, slow):
    for name, folder in folders.items():
        causal.add(name, folder)
    made = Engine(causal)
    yield made
    slow.go.set()
    made.stop(SECONDS)


def ask(engine, name):
    made = generating(name, [5, 6, 7], 4)
    engine.submit(made.request)
    return made


def test_others_go_on_meanwhile(engine, slow, plain):
    """Those who are being answered get their tokens, and others that come later are answered before."""
    long = generating(None, [5], 10_000)
    engine.submit(long.request)
    waiting = ask(engine, "slow")
    assert slow.reading.wait(SECONDS)
    many = len(long.request.continuation.tokens)
    until(lambda: len(long.request.continuation.tokens) > many + 20)
    later = ask(engine, None)
    check_answers([later], [plain[None]])
    assert not waiting.ended.is_set()
    assert engine.waiting == 1
    slow.go.set()
    check_answers([waiting], [plain["slow"]])
    assert not long.ended.is_set()
    long.request.continuation.cancelled = True
    assert long.wait() is None
    assert engine.pool.statistics.loads == 1


def test_nothing_is_done_until_it_is_read(engine, slow, plain, monkeypatch):
    """The thread sleeps, and is woken."""
    looked, is_ready = [], engine.pool.is_ready
    monkeypatch.setattr(engine.pool, "is_ready", lambda name: (looked.append(name), is_ready(name))[1])
    waiting = ask(engine, "slow")
    assert slow.reading.wait(SECONDS)
    before = len(looked)
    time.sleep(0.3)
    assert len(looked) == before
    begin = time.monotonic()
    slow.go.set()
    check_answers([waiting], [plain["slow"]])
    assert time.monotonic() - begin < 10


def test_an_error_is_told_to_all_that_wait_for_it(engine, slow, plain, caplog):
    slow.error = DeltaError("it is damaged")
    waiting = [generating("slow", [5, 6, 7], 4) for _ in range(3)]
    engine.submit(*(one.request for one in waiting))
    assert slow.reading.wait(SECONDS)
    check_answers([ask(engine, None)], [plain[None]])
    slow.go.set()
    assert {one.wait() for one in waiting} == {slow.error}
    assert {one.request.continuation.finished for one in waiting} == {"error"}
    assert slow.read == ["slow"]
    # It passed; whoever comes now has it read again.
    slow.error = None
    check_answers([ask(engine, "slow")], [plain["slow"]])
    assert slow.read == ["slow", "slow"]
    assert not caplog.records


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_delta_that_is_removed_meanwhile(engine, slow, plain, folders, replaced, damaged):
    """Its files may be gone before they are read."""
    waiting = ask(engine, "slow")
    assert slow.reading.wait(SECONDS)
    engine.pool.remove("slow")
    if damaged:
        slow.error = DeltaError("it is not there")
    new = None
    if replaced:
        engine.pool.add("slow", folders["other"])
        new = ask(engine, "slow")
    slow.go.set()
    error = waiting.wait()
    assert isinstance(error, KeyError)
    assert "the delta 'slow' was removed" in error.args[0]
    if new is not None:
        check_answers([new], [plain["other"]])
    assert waiting.request.continuation.tokens == []


def test_a_stop_waits_for_it(engine, slow, plain):
    waiting = ask(engine, "slow")
    assert slow.reading.wait(SECONDS)
    threading.Timer(0.2, slow.go.set).start()
    assert engine.stop(SECONDS)
    check_answers([waiting], [plain["slow"]])


def test_a_stop_in_a_hurry_does_not(engine, slow):
    """Nor does the thread hang on it, and nothing else is read any more."""
    waiting = [ask(engine, name) for name in ("slow", "other")]
    assert slow.reading.wait(SECONDS)
    assert not engine.stop(0.05)
    assert all(isinstance(one.wait(), Stopped) and one.ends == 1 for one in waiting)
    engine._thread.join(10)
    assert not engine.alive
    slow.go.set()
    until(lambda: "peft-dst-loading" not in {thread.name for thread in threading.enumerate()})
    assert slow.read == ["slow"]


def test_who_goes_away_meanwhile(engine, slow, plain):
    """Frees its place at once; what only such would need is not read."""
    gone = [ask(engine, name) for name in ("slow", "other", "slow too")]
    stays = ask(engine, "slow too")
    assert slow.reading.wait(SECONDS)
    for one in gone:
        one.request.continuation.cancelled = True
    assert engine.waiting == 1
    slow.go.set()
    assert [one.wait() for one in gone] == [None] * 3
    assert {one.request.continuation.finished for one in gone} == {"cancelled"}
    check_answers([stays], [plain["slow too"]])
    assert engine.computed["tokens"] == 4
    assert slow.read == ["slow", "slow too"]


def test_who_wants_the_same_as_one_that_goes_away(engine, slow, plain, monkeypatch):
    """Before it is read at all."""
    stays, goes = (generating("slow", [5, 6, 7], 4) for _ in range(2))
    following = Loading._next

    def late(loading):
        goes.request.continuation.cancelled = True
        return following(loading)

    monkeypatch.setattr(Loading, "_next", late)
    slow.go.set()
    engine.submit(stays.request, goes.request)
    assert goes.wait() is None
    check_answers([stays], [plain["slow"]])


def test_who_waited_goes_first(engine, slow, plain):
    """Of those that wait when it has been read; it is not left behind for those who come later."""
    gate = Gate(engine.pool.model)
    engine._desk.capacity = 1
    ended = []
    waiting = ask(engine, "slow")
    assert slow.reading.wait(SECONDS)
    asked = {"overtakes": ask(engine, None)}
    assert gate.reached.wait(SECONDS)
    asked |= {"slow": waiting, "later": ask(engine, None)}
    for name, one in asked.items():
        one.request.on_end = lambda error, name=name, end=one.request.on_end: (ended.append(name), end(error))
    slow.go.set()
    until(lambda: engine.pool.is_ready("slow"))
    gate.open.set()
    check_answers(asked.values(), [plain[None], plain["slow"], plain[None]])
    assert ended == ["overtakes", "slow", "later"]


def test_without_room_it_is_read_in_place(causal, folders, plain, slow):
    """Once it is known that there is none, without being read twice for that."""
    slow.go.set()
    with pool_of(copy.deepcopy(causal.model), folders.values(), budget=0) as pool:
        engine = Engine(pool)
        for times in range(3):
            for name in ("other", "another"):
                check_answers([ask(engine, name)], [plain[name]])
            assert len(slow.read) == 4 + 2 * times
        assert engine.stop(SECONDS)


def test_what_others_push_out_is_read_in_place(causal, folders, plain, slow):
    """While all of them wait: none is read for ever for the others' sake."""
    slow.go.set()
    with pool_of(causal.model, folders.values()) as pool:
        size = max(pool.ready(name).nbytes for name in folders)
    slow.go.clear()
    slow.reading.clear()
    with pool_of(causal.model, folders.values(), budget=size) as pool:
        engine = Engine(pool)
        asked = [generating(name, [5, 6, 7], 1) for name in folders]
        engine.submit(*(one.request for one in asked))
        assert slow.reading.wait(SECONDS)
        # All four are read while the thread computes, of which there is room for the last one.
        gate = Gate(pool.model)
        first = ask(engine, None)
        assert gate.reached.wait(SECONDS)
        slow.go.set()
        until(lambda: pool.statistics.loads == 4)
        before = len(slow.by)
        gate.open.set()
        check_answers([first, *asked], [plain[None], *(plain[name][:1] for name in folders)])
        assert engine.stop(SECONDS)
    assert set(slow.by[before:]) == {"peft-dst-engine"}


def test_a_closed_pool_is_told_of(causal):
    engine = Engine(causal)
    other = DeltaPool(copy.deepcopy(causal.model))
    other.add("task0", noisy(other.model, 0))
    other.close()
    causal.is_ready, causal.ready = other.is_ready, other.ready
    waiting = ask(engine, "task0")
    error = waiting.wait()
    assert isinstance(error, RuntimeError)
    assert "the pool is closed" in str(error)
    check_answers([ask(engine, None)], [expected(causal, None, [5, 6, 7], 4)])
    assert engine.stop(SECONDS)


def test_where_no_thread_can_be_started_deltas_are_read_in_place(causal, folders, plain, monkeypatch):
    with pool_of(copy.deepcopy(causal.model), [folders["other"]]) as pool:
        engine = Engine(pool)
        start = threading.Thread.start

        def refuse(thread):
            if thread.name == "peft-dst-loading":
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        asked = generating("other", [5, 6, 7], 4)
        engine.submit(asked.request)
        assert asked.wait() is None
        assert asked.request.continuation.tokens == plain["other"]
        assert engine.stop(SECONDS)
