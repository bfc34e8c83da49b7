"""What was used last, within a budget."""

from __future__ import annotations

from peft_dst.serving.cache import Cache


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
    assert cache.put("g", Bytes(6), keep={"c"}) == ["e"]
    assert cache.put("e", Bytes(5), keep={"g"}) == ["e"]
    assert ("c" in cache, cache.nbytes) == (True, 9)
    cache.drop("g")
    assert cache.put("e", Bytes(5)) == []
    assert cache.nbytes == 8
    assert cache.put("e", Bytes(1)) == []
    assert cache.nbytes == 4
    assert cache.get("none") is None
