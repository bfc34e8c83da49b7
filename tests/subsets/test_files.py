import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peft_dst.subsets import load_scores, save_scores
from tests.models import assert_same


SCORES = {"a.weight": torch.tensor([[0.0, 1.5], [2.0, 3.0]]), "b": torch.tensor(7.0), "empty": torch.empty(0)}


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "scores.safetensors"
    save_scores(path, SCORES, {"data": "trec"})
    assert_same(load_scores(path), SCORES)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"data": "trec", "format": "pt", "peft_dst_scores": "1"}
    save_scores(str(path), {"t": SCORES["a.weight"].t()})
    assert load_scores(str(path))["t"].tolist() == [[0.0, 2.0], [1.5, 3.0]]
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.safetensors"
    save_scores(path, SCORES)
    with pytest.raises(ValueError, match="not negative"):
        save_scores(path, {"w": -torch.ones(1)})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_scores(path, {"w": torch.ones(1)})
    assert_same(load_scores(path), SCORES)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, dtype=torch.bfloat16), "damaged: the score of 'w' is torch.bfloat16"),
        (torch.tensor([1.0, float("inf")]), "damaged: .* values from 1.0 to inf"),
        (torch.tensor([1.0, float("nan")]), "damaged: .* values from nan"),
        (torch.tensor([1.0, -2.0]), "damaged: .* values from -2.0"),
    ],
)
def test_values_that_are_no_scores(tmp_path, tensor, message):
    save_file({"w": tensor}, tmp_path / "x", metadata={"peft_dst_scores": "1"})
    with pytest.raises(ValueError, match=message):
        load_scores(tmp_path / "x")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"peft_dst_scores": "2"}])
def test_foreign_files(tmp_path, metadata):
    save_file({"w": torch.ones(1)}, tmp_path / "x", metadata=metadata)
    with pytest.raises(ValueError, match="not a file of scores of this version"):
        load_scores(tmp_path / "x")


def test_damaged_files(tmp_path):
    path = tmp_path / "x"
    save_scores(path, SCORES)
    whole = path.read_bytes()
    for broken in (b"", b"PK\x03\x04" * 20, whole[:-1], whole[:30], b"\xff" * 8 + whole[8:], whole + b"\0"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"not a whole safetensors file|not a file of scores"):
            load_scores(path)
    with pytest.raises(FileNotFoundError):
        load_scores(tmp_path / "none")
