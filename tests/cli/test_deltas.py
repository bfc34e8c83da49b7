"""The commands on deltas and checkpoints: what each does, what it says, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_dst import DSTConfig, overlap
from peft_dst.delta import Checkpoint, SparseDelta
from tests.cli.conftest import WEIGHTS, bert_again
from tests.models import BUILDERS, assert_same, bert, logits, train


PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_inspect(desk, run):
    delta = SparseDelta.load("my-adapter")
    code, out, _ = run("inspect", "my-adapter")
    assert code == 0
    assert f"{delta.num_entries:,}" in out
    code, out, _ = run("inspect", f"my-adapter/{WEIGHTS}", "--json")
    found = json.loads(out)
    assert found["total"]["entries"] == delta.num_entries
    assert found["tensors"].keys() == delta.keys()
    assert run("inspect", "my-lora")[::2] == (1, "error: " + message(lambda: SparseDelta.load("my-lora")))


def test_a_missing_library_is_named(desk, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("inspect", "my-adapter", "--plot", "kinds.png")
    assert code == 1
    assert "pip install 'peft-dst[plots]'" in err


def message(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError


def test_merge_is_what_peft_merges(desk, run):
    PeftModel.from_pretrained(bert_again(), "my-adapter").merge_and_unload().save_pretrained("expected")
    for command in ("merge", "apply"):
        code, out, _ = run(command, "base", "my-adapter", "-o", f"{command}d")
        assert code == 0
        assert "replaced whole: classifier.bias, classifier.weight" in out
        assert_same(dict(Checkpoint(f"{command}d")), dict(Checkpoint("expected")))
    assert run("merge", "base", "my-adapter", "-o", "silent", "--quiet") == (0, "", "")


def test_merge_says_what_config_json_does_not_know(desk, run):
    bert_again().bert.save_pretrained("body")
    code, out, err = run("merge", "body", "my-adapter", "-o", "merged")
    assert code == 0
    assert "added: classifier.bias, classifier.weight" in out
    assert "knows nothing of the shape of classifier.bias, classifier.weight" in err
    merged = type(bert()).from_pretrained("merged", num_labels=3)
    assert torch.equal(logits(merged, "bert"), logits(PeftModel.from_pretrained(bert_again(), "my-adapter"), "bert"))


def test_a_base_that_transformers_does_not_know(desk, run):
    (desk / "base" / "config.json").write_text('{"model_type": "bert", "architectures": ["Mine"]}')
    code, _, err = run("verify", "my-adapter", "--base", "base")
    assert code == 0
    assert "tensors are taken by their names in the file" in err


@pytest.mark.parametrize("command", ["merge", "export", "verify"])
def test_another_base_is_refused(command, desk, run):
    arguments = {
        "merge": ("tuned", "my-adapter", "-o", "out"),
        "export": ("my-adapter", "--base", "tuned", "-o", "out"),
        "verify": ("my-adapter", "--base", "tuned"),
    }[command]
    code, out, err = run(command, *arguments)
    assert (code, out) == (1, "")
    assert re.match(r"error: 'bert\..*': the base model's values differ .*Load it onto the base named in", err)
    assert not (desk / "out").exists()


def unsorted(path):
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if ".dst_indices." in key and tensors[key].numel() > 1)
    save_file({**tensors, key: tensors[key].flip(0)}, path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            r"adapter_model\.safetensors cannot be read .*download it again",
        ),
        (unsorted, r"error: 'bert\.\S+': positions are not strictly ascending at entry 1 .*download it again"),
        (lambda path: path.unlink(), r"holds no adapter_model\.safetensors.*loaded with PEFT and saved again"),
    ],
)
def test_verify_names_what_is_wrong(change, expected, desk, run):
    change(desk / "my-adapter" / WEIGHTS)
    code, out, err = run("verify", "my-adapter")
    assert (code, out) == (1, "")
    assert re.search(expected, err)


@pytest.mark.parametrize("command", ["merge", "diff", "convert", "export", "pack", "unpack"])
def test_nothing_is_overwritten(command, desk, run):
    (desk / "out").mkdir()
    (desk / "out" / "mine").write_text("precious")
    arguments = {
        "merge": ("base", "my-adapter", "-o", "out"),
        "diff": ("base", "tuned", "-o", "out"),
        "convert": ("my-shira", "--base", "base", "-o", "out"),
        "export": ("my-adapter", "--base", "base", "-o", "out"),
        "pack": ("my-adapter", "out"),
        "unpack": ("my-adapter", "out"),
    }[command]
    code, _, err = run(command, *arguments)
    assert code == 1
    assert err == "error: out exists already. Give another name, or remove it first."
    assert [path.read_text() for path in (desk / "out").iterdir()] == ["precious"]


def test_folders_that_are_missing_are_wrong_usage(desk, run):
    for arguments in (
        ("inspect", "nothing"),
        ("merge", "nothing", "my-adapter", "-o", "x"),
        ("merge", "base", "my-adapter"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert "Usage" in err


def test_diff_is_extract(desk, run):
    code, out, _ = run(
        "diff", "base", "tuned", "-o", "one", "-e", "0.01", "--siloing", "none", "--exclude-module", "embeddings"
    )
    assert code == 0
    delta = SparseDelta.load("one")
    assert f"one: {delta.num_entries:,} entries." in out
    assert not any("embeddings" in name for name in delta)
    assert (delta.config["epsilon"], delta.config["siloing"]) == (0.01, "none")
    assert run("diff", "base", "tuned", "-o", "two", "-n", "30", "--target-module", "query", "-q") == (0, "", "")
    assert SparseDelta.load("two").num_entries == 30
    code, _, err = run("diff", "base", "base", "-o", "three")
    assert (code, err) == (
        1,
        "error: base and tuned have the same weights: there is nothing to extract. Check which two were given.",
    )
    code, _, err = run("diff", "base", "tuned", "-o", "three", "-e", "2")
    assert code == 1
    assert "epsilon must be a fraction" in err
    assert run("diff", "base", "tuned", "-o", "three", "--siloing", "nothing")[0] == 2
    assert not (desk / "three").exists()


def test_overlap(desk, run):
    code, out, _ = run("overlap", "my-adapter", "another-adapter")
    assert code == 0
    row = next(line.split() for line in out.splitlines() if line.startswith("total"))
    a, b = SparseDelta.load("my-adapter"), SparseDelta.load("another-adapter")
    assert row[1:3] == [f"{a.num_entries:,}", f"{b.num_entries:,}"]
    # What chance gives is known from the shapes in the files.
    chance = sum(len(a[n]) * len(b[n]) / torch.Size(a[n].shape).numel() for n in a.keys() & b.keys())
    assert row[5] == f"{chance / a.num_entries:.2%}"


def test_overlap_as_json(desk, run):
    found = json.loads(run("overlap", "my-adapter", "another-adapter", "--json")[1])
    expected = overlap("my-adapter", "another-adapter")
    assert found["total"] == vars(expected.total)
    assert found["parameters"].keys() == expected.parameters.keys()


def test_overlap_of_several(desk, run):
    """Of what runs leave, whose folders all end alike."""
    for i, name in enumerate(("my-adapter", "another-adapter", "my-adapter")):
        shutil.copytree(name, f"runs/task-{i}/adapter")
    folders = [f"runs/task-{i}/adapter" for i in range(3)]
    code, out, _ = run("overlap", *folders)
    assert code == 0
    share = overlap("my-adapter", "another-adapter").total.of_a
    lines = out.splitlines()
    assert lines[1].split() == ["task-0", "task-1", "task-2"]
    assert lines[3].split() == ["task-0", "100.0%", f"{share:.1%}", "100.0%"]
    assert lines[-1].startswith("by chance: ")
    found = json.loads(run("overlap", *folders, "--json")[1])
    assert found["names"] == ["task-0", "task-1", "task-2"]
    assert found["shared"][0] == [1.0, share, 1.0]
    # What has nothing in common has no shorter name.
    out = run("overlap", "my-adapter", f"another-adapter/{WEIGHTS}", "runs/task-0/adapter")[1]
    assert all(name in out for name in ("(1) my-adapter", f"(2) another-adapter/{WEIGHTS}", "(3) runs/task-0/adapter"))
    out = run("overlap", "my-adapter", "my-adapter", "my-adapter")[1]
    assert out.splitlines()[3].split() == ["my-adapter", "100.0%", "100.0%", "100.0%"]
    assert run("overlap", "my-adapter")[0] == 2
    code, _, err = run("overlap", "my-adapter", "another-adapter", "my-lora")
    assert (code, err) == (1, "error: " + message(lambda: SparseDelta.load("my-lora")))


@pytest.mark.parametrize("names", [("my-adapter", "another-adapter"), ("my-adapter", "another-adapter", "a" * 30)])
def test_overlap_as_a_picture(names, desk, run, monkeypatch):
    shutil.copytree("my-adapter", "a" * 30)
    plain = run("overlap", *names)
    assert run("overlap", *names, "--plot", "overlap.png") == plain
    assert Path("overlap.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run("overlap", *names, "--plot", "overlap.nothing")
    assert (code, "Format 'nothing'" in err) == (1, True)
    monkeypatch.setitem(sys.modules, "peft_dst.recipes.report", None)
    code, _, err = run("overlap", *names, "--plot", "other.png")
    assert code == 1
    assert "which is not installed: pip install 'peft-dst[recipes,plots]'" in err
    assert not Path("other.png").exists()


def test_pack_and_unpack(desk, run):
    delta = SparseDelta.load("my-adapter")
    before = (desk / "my-adapter" / WEIGHTS).read_bytes()
    code, out, _ = run("pack", "my-adapter", "packed")
    assert code == 0
    assert (desk / "packed" / "README.md").read_text() == (desk / "my-adapter" / "README.md").read_text()
    assert (desk / "packed" / WEIGHTS).stat().st_size < len(before)
    assert f"{len(before):,} bytes before" in out
    assert SparseDelta.load("packed") == delta
    assert SparseDelta.load("packed").config["packed"] is True
    assert run("unpack", "packed")[0] == 0
    assert load_file(desk / "packed" / WEIGHTS).keys() == load_file(desk / "my-adapter" / WEIGHTS).keys()
    assert SparseDelta.load("packed").config["packed"] is False
    assert run("pack", f"my-adapter/{WEIGHTS}", "alone.safetensors")[0] == 0
    assert SparseDelta.load("alone.safetensors") == delta
    assert (desk / "my-adapter" / WEIGHTS).read_bytes() == before


def test_convert_states_the_error(desk, run):
    code, out, _ = run("convert", "my-lora", "--base", "base", "-o", "out", "-e", "0.1")
    assert code == 0
    errors = dict(re.findall(r"^  (\S+): (\d\.\d{4})$", out, re.MULTILINE))
    assert errors.keys() == {"total", *(f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1))}
    assert 0 < float(errors["total"]) < 1
    code, _, err = run("convert", "my-lora", "--base", "base", "-o", "more")
    assert code == 1
    assert "Say how many may be kept: epsilon" in err
    # Of what comes over exactly nothing can be cut off.
    for source, what in (("base", "a checkpoint"), ("my-adapter", "a delta")):
        for option in (("-e", "0.1"), ("--distance", "relative")):
            code, _, err = run("convert", source, "--base", "base", "-o", "more", *option)
            assert (code, f"{source} is {what}" in " ".join(err.split())) == (2, True)
    assert not (desk / "more").exists()


def test_export_knows_one_form(desk, run):
    code, _, err = run("export", "my-adapter", "--base", "base", "--form", "other", "-o", "out")
    assert code == 2
    assert "'other'" in err
    assert "--form" in err


class Patch(NamedTuple):
    """The fields of vLLM's CheckpointWeightPatch, in its order."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None = None


def load_as_vllm_does(weights, patches):
    """Patches of one kind, each staged as a whole tensor of NaN in which only the patch's own values are taken over."""
    assert len({patch.indices is None for patch in patches}) <= 1
    for patch in patches:
        size = torch.Size(patch.shape).numel()
        assert patch.values.ndim == 1
        assert patch.values.dtype == patch.dtype
        if patch.indices is None:
            weights[patch.name] = patch.values.view(patch.shape)
        else:
            assert patch.indices.dtype == torch.int32
            staged = torch.full((size,), float("nan"), dtype=patch.dtype)
            staged.index_copy_(0, patch.indices.long(), patch.values)
            staged = staged.view(patch.shape)
            weights[patch.name] = torch.where(staged.isnan(), weights[patch.name], staged)


def test_the_pages_reader_makes_the_merged_weights(desk, run, monkeypatch):
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("checkpoint_weight_patch")
    module.CheckpointWeightPatch, module.load_checkpoint_weight_patches = Patch, load_as_vllm_does
    monkeypatch.setitem(sys.modules, "vllm.model_executor.model_loader.checkpoint_weight_patch", module)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    reader: dict = {}
    exec(code, reader)
    assert run("export", "my-adapter", "--base", "base", "-o", "patch.safetensors")[0] == 0
    assert run("merge", "base", "my-adapter", "-o", "merged")[0] == 0
    weights = {name: tensor.clone() for name, tensor in Checkpoint("base").items()}
    reader["load_patches"](weights, "patch.safetensors")
    assert_same(weights, dict(Checkpoint("merged")))


def test_progress_is_shown_on_a_terminal_only(desk, run, monkeypatch):
    shown = []

    class Bar:
        def __init__(self, **options):
            shown.append(options)

        def __enter__(self):
            return self

        def __exit__(self, *unused):
            pass

        def update(self, count):
            shown[-1]["done"] = shown[-1].get("done", 0) + count

    monkeypatch.setattr("peft_dst.cli.deltas.tqdm", Bar)
    size = sum(tensor.nbytes for tensor in Checkpoint("base").values())
    for terminal, quiet, visible in ((True, (), True), (True, ("-q",), False), (False, (), False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        assert run("merge", "base", "my-adapter", "-o", f"out{len(shown)}", *quiet)[0] == 0
        assert shown[-1]["disable"] is not visible
        assert shown[-1]["done"] == size


def test_experts_are_refused_by_name(desk, run):
    torch.manual_seed(0)
    BUILDERS["mixtral"]().save_pretrained("experts")
    model = get_peft_model(BUILDERS["mixtral"](), DSTConfig(epsilon=0.05))
    train(model, "mixtral")
    model.save_pretrained("experts-adapter")
    for command in (
        ("verify", "experts-adapter", "--base", "experts"),
        ("merge", "experts", "experts-adapter", "-o", "out"),
    ):
        code, _, err = run(*command)
        assert code == 1
        assert re.match(
            r"error: 'model\.layers\.\d\.mlp\.experts\.\w+': the checkpoint experts has no such tensor", err
        )
