"""Reading a saved adapter's records without its base, and files that are not what they say."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_dst import DSTConfig
from peft_dst.delta import DeltaError, SparseDelta
from peft_dst.tuner.layer import markers
from tests.models import bert


KEY = "base_model.model.bert.pooler.dense._sparse.dst_{}.weight"


def test_records_are_those_of_the_model(saved):
    folder, _, model = saved(modules_to_save=["classifier"])
    expected = {
        marker.weights[parameter].name: record
        for _, marker in markers(model)
        for parameter, record in marker.records("default").items()
        if len(record.indices)
    }
    found = SparseDelta.load(folder)
    assert found.keys() == expected.keys()
    for name, record in found.items():
        assert all(torch.equal(a, b) for a, b in zip(record.record(), expected[name], strict=True))


def test_a_parameter_of_the_model_itself(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(8))
            self.inner = torch.nn.Linear(8, 1)

        def forward(self, x):
            return self.inner(self.scale * x).sum() + (self.scale * x).sum() * 100

    model = get_peft_model(Net(), DSTConfig(num_free_parameters=2, siloing="none"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.arange(8.0)).backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    assert SparseDelta.load(tmp_path)["scale"].indices.tolist() == [6, 7]


def test_an_untrained_adapter_has_none(build, tmp_path):
    get_peft_model(build("bert"), DSTConfig(epsilon=0.02)).save_pretrained(tmp_path)
    assert SparseDelta.load(tmp_path) == SparseDelta({})


def test_no_adapter(tmp_path, saved):
    with pytest.raises(DeltaError, match="cannot be read"):
        SparseDelta.load(tmp_path / "nowhere")
    get_peft_model(bert(), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(DeltaError, match="type 'LORA', not 'DST'"):
        SparseDelta.load(tmp_path / "lora")
    folder, _, _ = saved()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(DeltaError, match=r"no adapter_model.safetensors.*saved again"):
        SparseDelta.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1]", "type None"),
        ('{"peft_type": "DST", "format_version": 7}', "format version 7"),
        ('{"peft_type": "DST", "format_version": 1, "records": [1]}', "malformed `records`"),
        ('{"peft_type": "DST", "format_version": 1, "records": {"a": [1]}}', "malformed entry for 'a'"),
    ],
)
def test_damaged_configs(text, message, saved):
    folder, _, _ = saved()
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(DeltaError, match=message):
        SparseDelta.load(folder)


def _edit(change):
    return lambda tensors, config: tensors.update(change(tensors))


DAMAGES = {
    "unsorted": (_edit(lambda t: {KEY.format("indices"): t[KEY.format("indices")].flip(0)}), "not strictly ascending"),
    "negative": (_edit(lambda t: {KEY.format("indices"): t[KEY.format("indices")] - 10_000}), "outside a tensor"),
    "dtype": (_edit(lambda t: {KEY.format("indices"): t[KEY.format("indices")].float()}), "expected int32"),
    "lengths": (_edit(lambda t: {KEY.format("values"): t[KEY.format("values")][1:]}), "two vectors of one length"),
    "infinite": (_edit(lambda t: {KEY.format("values"): t[KEY.format("values")] / 0}), "not finite"),
    "moved": (_edit(lambda t: {KEY.format("indices"): t[KEY.format("indices")] + 1}), "not those that adapter_config"),
    "half": (lambda tensors, config: tensors.pop(KEY.format("values")), "has no dst_values"),
    "more": (lambda tensors, config: config["records"].popitem(), "has entries for .*does not describe them"),
    "less": (
        lambda tensors, config: [tensors.pop(KEY.format(part)) for part in ("values", "indices")],
        "describes entries for 'bert.pooler.dense.weight', but has none",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors(damage, saved):
    folder, _, _ = saved()
    change, message = DAMAGES[damage]
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    # Without metadata, as the tensors of another writer: the config describes them.
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(DeltaError, match=message):
        SparseDelta.load(folder)


def test_a_damaged_file(saved):
    folder, _, _ = saved()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DeltaError, match="cannot be read"):
        SparseDelta.load(folder)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"dst_records": "{"}, "broken metadata"),
        ({"dst_records": "[" * 100_000}, "broken metadata"),
        ({"dst_records": "[1]"}, "malformed `records`"),
        ({"dst_records": "{}"}, "does not describe them"),
        ({"dst_records": "{}", "dst_format_version": "2"}, "format version 2"),
        ({"dst_records": "{}", "dst_format_version": "null"}, "format version None"),
        ({"dst_records": "{}", "dst_config": '{"peft_type": "LORA", "format_version": 1}'}, "of type 'LORA'"),
    ],
)
def test_damaged_metadata(metadata, message, saved):
    folder, _, _ = saved()
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"dst_format_version": "1", **metadata})
    with pytest.raises(DeltaError, match=message):
        SparseDelta.load(folder)


def test_what_a_later_version_may_add_is_ignored(saved):
    folder, _, _ = saved()
    path, delta = folder / "adapter_model.safetensors", SparseDelta.load(folder)
    for strange in ("no JSON", '{"of": "interest"}'):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(load_file(path), path, metadata=metadata | {"dst_strange": strange})
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"strange": strange}))
        assert (SparseDelta.load(folder), SparseDelta.load(path)) == (delta, delta)
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['strange'\]"):
            assert PeftConfig.from_pretrained(folder).epsilon == delta.config["epsilon"]


def test_a_file_alone(saved):
    folder, _, _ = saved(modules_to_save=["classifier"])
    path = folder / "adapter_model.safetensors"
    delta = SparseDelta.load(path)
    assert delta == SparseDelta.load(folder)
    assert delta.config == SparseDelta.load(folder).config
    assert {key.split(".")[-1] for key in delta.dense} == {"weight", "bias"}
    save_file(load_file(path), path)
    with pytest.raises(DeltaError, match="type None, not 'DST'"):
        SparseDelta.load(path)
