"""What a delta holds, as counted one entry at a time."""

from __future__ import annotations

import json
import math
import sys

import pytest

from peft_dst.analysis import inspect
from peft_dst.delta import SparseDelta


def test_counts_ranges_and_bytes(saved):
    folder, _, _ = saved(modules_to_save=["classifier"])
    delta = SparseDelta.load(folder)
    found = inspect(delta)
    assert found.tensors.keys() == delta.keys()
    for name, tensor in delta.items():
        values = tensor.values.tolist()
        contents = found.tensors[name]
        assert (contents.entries, contents.size) == (len(values), math.prod(tensor.shape))
        assert (contents.smallest, contents.largest) == (min(values), max(values))
        assert contents.bytes == 8 * len(values)
        assert contents.share == len(values) / contents.size
    assert found.total.entries == delta.num_entries == sum(kind.entries for kind in found.kinds.values())
    assert found.total.bytes == 8 * delta.num_entries
    assert found.kinds["attention"].entries == sum(len(t) for name, t in delta.items() if ".attention." in name)
    assert found.dense == {key: tuple(tensor.shape) for key, tensor in delta.dense.items()}
    assert json.loads(json.dumps(found.to_json()))["total"]["entries"] == delta.num_entries
    text = str(found)
    assert all(name in text for name in [*delta, *delta.dense, *found.kinds, "epsilon: 0.02"])


def test_an_empty_one():
    found = inspect(SparseDelta({}))
    assert found.total.entries == found.total.share == 0
    assert math.isnan(found.total.smallest)
    assert "total" in str(found)


def test_a_plot(saved, tmp_path, monkeypatch):
    folder, _, _ = saved()
    found = inspect(SparseDelta.load(folder))
    found.plot(tmp_path / "kinds.png")
    assert (tmp_path / "kinds.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="Format 'nothing'"):
        found.plot(tmp_path / "kinds.nothing")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'peft-dst\[plots\]'"):
        found.plot(tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()
