"""The command line on folders from strangers: one line that says what is wrong, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peft_dst.delta import DeltaError, SparseDelta, read_metadata
from tests.cli.conftest import WEIGHTS, bert_again


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, change=lambda tensors: None, **metadata):
    """The tensors again, changed, with other metadata."""
    path = folder / WEIGHTS
    tensors, said = load_file(path), {**read_metadata(path), **metadata}
    change(tensors)
    save_file(tensors, path, {"format": "pt", **{f"dst_{key}": json.dumps(value) for key, value in said.items()}})


def snapshot(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(result, expected):
    code, _, err = result
    assert code == 1
    assert err.splitlines()[-1].startswith("error: ")
    assert expected in err


def test_an_output_inside_of_what_is_read(desk, run):
    before = snapshot(desk)
    refused(run("merge", "base", "my-adapter", "-o", "base/sub/merged"), "is inside of base")
    refused(run("pack", "my-adapter", "my-adapter/packed"), "is inside of my-adapter")
    os.symlink("nowhere", desk / "dangling")
    refused(run("merge", "base", "my-adapter", "-o", "dangling"), "exists already")
    (desk / "dangling").unlink()
    assert snapshot(desk) == before


def test_packing_that_fails_leaves_nothing(desk, run):
    os.symlink("/etc/hostname", desk / "my-adapter" / "notes.md")
    before = snapshot(desk)
    refused(run("pack", "my-adapter", "packed"), "is a link that leads out of its folder")
    assert snapshot(desk) == before
    (desk / "my-adapter" / "notes.md").unlink()
    assert run("pack", "my-adapter", "packed")[0] == 0


def test_links_are_followed_to_files_of_the_folder_and_of_the_hubs_cache(desk, run):
    """A snapshot in the cache consists of links into blobs; a link to a folder may lead round in a circle."""
    snapshot = desk / "cache" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (desk / "cache" / "blobs").mkdir()
    for number, path in enumerate(sorted((desk / "my-adapter").iterdir())):
        shutil.move(path, desk / "cache" / "blobs" / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / path.name)
    os.symlink(".", snapshot / "loop")
    os.mkfifo(snapshot / "pipe")
    assert run("pack", snapshot, "packed")[0] == 0
    assert sorted(path.name for path in (desk / "packed").iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]
    assert SparseDelta.load("packed") == SparseDelta.load(snapshot)


def test_no_file_commands_the_terminal(desk, run):
    name = "bert.\x1b[31m\x07evil\n.weight"
    edit_config(desk / "my-adapter", base_model_name_or_path="a\x1b]0;title\x07b")
    for arguments in (("inspect", "my-adapter"), ("verify", "my-adapter")):
        code, out, _ = run(*arguments)
        assert code == 0
        assert "\x1b" not in out
        assert "\x07" not in out
    rewrite(desk / "my-adapter", lambda tensors: tensors.update({name: torch.ones(2)}))
    for arguments in (("inspect", "my-adapter"), ("merge", "base", "my-adapter", "-o", "merged")):
        _, out, err = run(*arguments)
        assert "\x1b" not in out + err


def test_a_base_that_cannot_be_compared_is_not_called_the_right_one(desk, run):
    rewrite(
        desk / "my-adapter", records={n: [*r[:2], {"float64": "00000000"}, *r[3:]] for n, r in records(desk).items()}
    )
    refused(run("verify", "my-adapter", "--base", "base"), "cannot be told")
    assert run("verify", "another-adapter", "--base", "base")[0] == 0


def records(folder):
    return read_metadata(folder / "my-adapter" / WEIGHTS)["records"]


@pytest.mark.parametrize("kept", [5, [5], True, [None], "classifier", [""]])
def test_modules_to_save_that_are_none(kept, desk, run):
    edit_config(desk / "my-adapter", modules_to_save=kept)
    refused(run("merge", "base", "my-adapter", "-o", "merged"), "malformed `modules_to_save`")
    refused(run("verify", "my-adapter", "--base", "base"), "malformed `modules_to_save`")


def test_a_pattern_of_a_stranger_is_not_run(desk, run):
    """Which takes longer than anybody waits."""
    config = {**read_metadata(desk / "my-adapter" / WEIGHTS)["config"], "silo_pattern": ["(?P<module>([a-z._]+)+!)"]}
    edit_config(desk / "my-adapter", silo_pattern=config["silo_pattern"])
    rewrite(desk / "my-adapter", config=config)
    assert run("inspect", "my-adapter")[0] == 0


def nested(depth):
    value = []
    for level in range(depth - 1):
        value = [value] if level % 2 else {"a": value}
    return value


@pytest.mark.parametrize("where", ["config", "records", "metadata", "metadata's records"])
@pytest.mark.parametrize("depth", [100, 500, 900])
def test_what_is_nested_deeply(depth, where, desk, run):
    """So deep that it can be read, and not be taken apart."""
    folder = desk / "my-adapter"
    said = read_metadata(folder / WEIGHTS)
    if where == "config":
        edit_config(folder, auto_mapping=nested(depth))
    elif where == "records":
        edit_config(folder, records={**said["records"], "a": nested(depth)})
    elif where == "metadata":
        rewrite(folder, config={**said["config"], "auto_mapping": nested(depth)})
    else:
        rewrite(folder, records={**said["records"], "a": nested(depth)})
    for path in ("my-adapter", f"my-adapter/{WEIGHTS}"):
        if path == "my-adapter" or "metadata" in where:
            for command in (("inspect", path, "--json"), ("inspect", path), ("verify", path)):
                # How deep the parser itself goes differs.
                refused(run(*command), "nested more than 50 levels deep" if depth < 900 else "adapter_")
    assert run("inspect", "another-adapter", "--json")[0] == 0


def test_what_is_nested_a_little(desk, run):
    edit_config(desk / "my-adapter", auto_mapping=nested(48))
    code, out, _ = run("inspect", "my-adapter", "--json")
    assert (code, json.loads(out)["config"]["auto_mapping"]) == (0, nested(48))


def test_dense_tensors_of_other_kinds(desk, run):
    more = "base_model.model.classifier.more"
    for tensor, key, expected in (
        (torch.ones(2, dtype=torch.complex64), more, "of torch.complex64"),
        (torch.ones(2), "classifier.bias", "begins with 'base_model.model.'"),
        (torch.tensor([1.0, float("nan")]), more, "is not finite at position 1"),
    ):
        shutil.copytree("my-adapter", "edited", dirs_exist_ok=True)
        rewrite(desk / "edited", lambda tensors, key=key, tensor=tensor: tensors.update({key: tensor}))
        refused(run("merge", "base", "edited", "-o", "merged"), expected)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": [5]},
        {"architectures": ["logging"]},
        {"architectures": ["pipeline"]},
        {"architectures": {"a": 1}},
        {"hidden_size": "x"},
        {"hidden_size": -4},
    ],
)
def test_configs_of_bases_that_say_nothing(config, desk, run):
    """Then names are taken as they stand in the file."""
    path = desk / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    code, _, err = run("merge", "base", "my-adapter", "-o", "merged")
    assert (code, err.startswith("note: ")) == (0, True), err


@pytest.mark.parametrize(
    "text", ["[]", "5", "{", '{"peft_type": null}', '{"peft_type": ["LORA"]}', '{"peft_type": "NEW"}', "{}"]
)
def test_configs_of_adapters_that_say_nothing(text, desk, run):
    (desk / "my-lora" / "adapter_config.json").write_text(text)
    refused(run("convert", "my-lora", "--base", "base", "-o", "converted", "-e", "0.1"), "It is damaged")
    assert not (desk / "converted").exists()


def test_an_adapter_without_weights_is_not_looked_for_elsewhere(desk, run):
    (desk / "my-lora" / WEIGHTS).unlink()
    refused(run("convert", "my-lora", "--base", "base", "-o", "converted", "-e", "0.1"), f"has no {WEIGHTS}")


@pytest.mark.parametrize(
    "index", ['{"metadata": 5, "weight_map": %s}', '{"metadata": {"total_parameters": "x"}, "weight_map": %s}']
)
def test_indices_with_other_metadata(index, desk, run):
    base = bert_again()
    shutil.rmtree("base")
    base.save_pretrained("base", max_shard_size="10kB")
    path = desk / "base" / "model.safetensors.index.json"
    path.write_text(index % json.dumps(json.loads(path.read_text())["weight_map"]))
    assert run("merge", "base", "my-adapter", "-o", "merged")[0] == 0
    path.write_text("[" * 100_000)
    refused(run("merge", "base", "my-adapter", "-o", "again"), "no readable weight_map")


def test_both_know_the_same_files(desk):
    """What PEFT refuses the command line does not merge."""
    rewrite(desk / "my-adapter", lambda tensors: tensors.update({"classifier.bias": torch.ones(3)}))
    with pytest.raises(DeltaError, match=r"'classifier\.bias'"):
        PeftModel.from_pretrained(bert_again(), "my-adapter")
