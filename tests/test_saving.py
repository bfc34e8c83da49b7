"""What is written, and what comes back: onto the same base, in any dtype, in memory and on disk."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from peft_dst import DSTConfig
from peft_dst.delta import DeltaError, read_metadata
from tests.models import assert_same, checkpoint_layers, compile_layers, logits, loss, native, train, weights


def test_logits_come_back_bit_for_bit(architecture, build, saved):
    folder, output, _ = saved(architecture)
    seed = weights(build(architecture))
    loaded = PeftModel.from_pretrained(build(architecture), folder)
    assert torch.equal(logits(loaded, architecture), output)
    with loaded.disable_adapter():
        assert_same(weights(loaded.get_base_model()), seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_come_back(dtype, build, tmp_path):
    model = get_peft_model(build("bert").to(dtype), DSTConfig(epsilon=0.02))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    model.save_pretrained(tmp_path)
    assert {t.dtype for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if "values" in n} == {dtype}
    loaded = PeftModel.from_pretrained(build("bert").to(dtype), tmp_path)
    assert_same(weights(loaded.get_base_model()), weights(model.get_base_model()))


def test_the_file_holds_sorted_indices_and_new_values_only(build, saved):
    folder, _, model = saved(modules_to_save=["classifier"])
    seed, tuned = weights(build("bert")), weights(model.get_base_model())
    tensors = load_file(folder / "adapter_model.safetensors")
    head = {n: tensors.pop(n) for n in ("base_model.model.classifier.weight", "base_model.model.classifier.bias")}
    assert head["base_model.model.classifier.bias"].shape == (3,)
    entries = 0
    for key, indices in tensors.items():
        if ".dst_indices." not in key:
            continue
        values = tensors[key.replace("dst_indices", "dst_values")]
        name = key.removeprefix("base_model.model.").replace("._sparse.dst_indices", "")
        assert indices.dtype == torch.int32
        assert values.dtype == torch.float32
        assert indices.tolist() == (tuned[name] != seed[name]).flatten().nonzero().flatten().tolist()
        assert torch.equal(values, tuned[name].flatten()[indices.long()])
        entries += len(indices)
    assert len(tensors) == 2 * sum(".dst_indices." in key for key in tensors)
    assert entries == model.constraint().budget
    payload = 8 * entries + 4 * (3 * 16 + 3)
    assert (folder / "adapter_model.safetensors").stat().st_size < payload + 300 * len(tensors) + 8000


def test_config_and_metadata_describe_the_file(saved):
    folder, _, model = saved()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "DST"
    assert config["format_version"] == 1
    assert "import peft_dst" in config["requires"]
    metadata = read_metadata(folder / "adapter_model.safetensors")
    assert metadata["format_version"] == 1
    assert metadata["records"] == config["records"]
    assert metadata["config"] == {key: value for key, value in config.items() if key != "records"}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert sum(entries for entries, *_ in config["records"].values()) == model.constraint().budget
    assert {"float32", "bfloat16", "float16"} == set(next(iter(config["records"].values()))[2])


def test_a_config_can_be_used_again(build, tmp_path):
    config = DSTConfig(epsilon=0.02)
    for _ in range(2):
        model = get_peft_model(build("bert"), config)
        assert torch.equal(logits(model, "bert"), logits(build("bert"), "bert"))
        train(model, "bert")
        model.save_pretrained(tmp_path)
    assert config.records is None
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))
    train(loaded, "bert", first=20)
    assert loaded.peft_config["default"].records is None
    # A config read from a saved adapter expects its tensors, and says so.
    fresh = get_peft_model(build("bert"), DSTConfig.from_pretrained(tmp_path))
    with pytest.raises(RuntimeError, match=r"'default' was added from a saved config.*set its `records` to None"):
        logits(fresh, "bert")


def test_several_adapters_and_their_folders(build, tmp_path):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02), "first")
    train(model, "bert")
    outputs = {"first": logits(model, "bert")}
    model.add_adapter("second", DSTConfig(epsilon=0.05, siloing="none"))
    model.set_adapter("second")
    train(model, "bert", first=7)
    outputs["second"] = logits(model, "bert")
    # The one that is not active is saved from its record, the other from the live weights.
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "second", adapter_name="b")
    loaded.load_adapter(tmp_path / "first", "a")
    assert torch.equal(logits(loaded, "bert"), outputs["second"])
    loaded.set_adapter("a")
    assert torch.equal(logits(loaded, "bert"), outputs["first"])
    assert loaded.peft_config["b"].siloing == "none"


def test_a_base_with_more_rows_of_embeddings_is_the_same_base(build, saved):
    """Tokens added after training stand behind the ones that were there; every position keeps its meaning."""
    folder, output, _ = saved()
    base = build("bert")
    base.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder), "bert"), output)


def test_saving_while_disabled_or_merged(build, saved, tmp_path):
    _, output, model = saved()
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    for folder in ("disabled", "merged"):
        assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), tmp_path / folder), "bert"), output)


def test_an_untrained_adapter(build, tmp_path):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors") == {}
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(logits(loaded, "bert"), logits(build("bert"), "bert"))


def test_loading_again_over_an_adapter(build, saved, tmp_path):
    """As Trainer does to resume and to fetch the best checkpoint; records may grow, shrink and vanish."""
    folder, output, model = saved(epsilon=0.003)
    train(model, "bert", first=30)
    model.save_pretrained(tmp_path / "later")
    later = logits(model, "bert")
    for _ in range(2):
        model.load_adapter(folder, "default", is_trainable=True)
        assert torch.equal(logits(model, "bert"), output)
        model.load_adapter(tmp_path / "later", "default")
        assert torch.equal(logits(model, "bert"), later)
    with model.disable_adapter():
        assert_same(weights(model.get_base_model()), weights(build("bert")))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_low_cpu_mem_usage(low_cpu_mem_usage, build, saved):
    folder, output, _ = saved()
    loaded = PeftModel.from_pretrained(build("bert"), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, "bert"), output)
    assert not any(p.is_meta for p in loaded.parameters())


def test_bare_state_dict_functions(build, saved):
    _, output, model = saved()
    state = get_peft_model_state_dict(model)
    twin = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    result = set_peft_model_state_dict(twin, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(twin, "bert"), output)


def test_state_dicts_in_memory(saved):
    """Keep-the-best-in-memory: several state dicts taken, then one put back."""
    _, _, model = saved()
    first, output = get_peft_model_state_dict(model), logits(model, "bert")
    first = {k: v.clone() for k, v in first.items()}
    train(model, "bert", first=9)
    get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, first)
    assert torch.equal(logits(model, "bert"), output)


def test_a_loaded_model_is_pickled_and_copied_before_its_first_use(build, saved, tmp_path):
    folder, output, _ = saved()
    loaded = PeftModel.from_pretrained(build("bert"), folder)
    torch.save(loaded, tmp_path / "model.pt")
    for twin in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(loaded)):
        assert torch.equal(logits(twin, "bert"), output)
        # The base model's own, for several processes, is what is left.
        assert sum(len(module._forward_pre_hooks) for module in twin.modules()) == 1


@pytest.mark.parametrize("finish", ["merge_and_unload", "unload"])
def test_a_loaded_model_is_unloaded_before_its_first_use(finish, build, saved):
    folder, output, _ = saved()
    base = getattr(PeftModel.from_pretrained(build("bert"), folder), finish)()
    expected = output if finish == "merge_and_unload" else logits(build("bert"), "bert")
    assert torch.equal(logits(copy.deepcopy(base), "bert"), expected)


# What the tracer asks of a tensor between two of the compiled layers.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("when", "packed"), [("before", False), ("after", True)])
@pytest.mark.parametrize("wrap", [compile_layers, checkpoint_layers])
def test_wrapped_layers(wrap, when, packed, build, tmp_path):
    """Torch's wrappers put their own names into those of modules, and some into state dicts; a file has none of them."""
    base = build("llama")
    if when == "before":
        wrap(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.02, packed=packed))
    if when == "after":
        wrap(base)
    train(model, "llama")
    model.save_pretrained(tmp_path)
    output = logits(model, "llama")
    assert not torch.equal(output, logits(build("llama"), "llama"))
    wrapped = build("llama")
    wrap(wrapped)
    for other in (build("llama"), wrapped):
        assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path), "llama"), output)
    silos = get_peft_model(build("llama"), DSTConfig(epsilon=0.02)).silos()
    assert model.silos() == silos
    # Without what wrappers put into names.
    model.save_pretrained(tmp_path / "gathered", state_dict=get_model_state_dict(model))
    assert_same(*(load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "gathered")))


def test_a_state_dict_without_records_is_refused(build, tmp_path):
    """Nothing would be saved."""
    model = get_peft_model(build("llama"), DSTConfig(epsilon=0.02))
    train(model, "llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if "dst_" not in name}
    with pytest.raises(ValueError, match=r"lacks '.*\.dst_indices\.default\.weight'.*nothing left out"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not any(tmp_path.iterdir())


def test_embeddings_that_peft_saves_whole(tmp_path):
    """Resized before training: PEFT saves the embeddings beside the records, and their seed comes back with them."""
    load = native(tmp_path, "llama")
    base = load()
    base.resize_token_embeddings(70, mean_resizing=False)
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.02))
    train(model, "llama")
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    fresh = load()
    fresh.resize_token_embeddings(70, mean_resizing=False)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    with loaded.disable_adapter():
        assert_same(weights(loaded.get_base_model()), seed)


def test_pickled_weights_are_read_without_running_code(build, saved, tmp_path):
    _, output, model = saved()
    model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert (tmp_path / "pickle" / "adapter_model.bin").is_file()
    assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), tmp_path / "pickle"), "bert"), output)


def test_an_adapter_trained_in_float32_serves_a_bfloat16_base(build, saved):
    folder, _, model = saved()
    base = build("bert").to(torch.bfloat16)
    seed = weights(base)
    loaded = PeftModel.from_pretrained(base, folder)
    assert_same(weights(loaded.get_base_model()), weights(model.get_base_model().to(torch.bfloat16)))
    with loaded.disable_adapter():
        assert_same(weights(loaded.get_base_model()), seed)


@pytest.mark.parametrize("kept", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]])
def test_resized_embeddings_that_are_trained_densely(kept, tmp_path):
    """What PEFT does not see is that it saves them anyway: they would stand in the file three times."""
    load = native(tmp_path, "llama")

    def resized():
        base = load()
        base.resize_token_embeddings(70, mean_resizing=False)
        return base

    model = get_peft_model(resized(), DSTConfig(epsilon=0.02, modules_to_save=kept))
    train(model, "llama")
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert not [key for key in keys if "original_module" in key or "modules_to_save" in key]
    # As transformers and older files have them.
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        state = get_peft_model_state_dict(model)
    assert [key for key in state if "original_module" in key]
    for fill in (
        lambda base: PeftModel.from_pretrained(base, tmp_path / "adapter"),
        lambda base: (m := get_peft_model(base, model.peft_config["default"]), set_peft_model_state_dict(m, state))[0],
    ):
        base = resized()
        # New rows start at random.
        base.load_state_dict({**base.state_dict(), **rows(model)}, strict=True)
        assert torch.equal(logits(fill(base), "llama"), logits(model, "llama"))


def rows(model):
    """The base's own embeddings, as its state dict has them."""
    with model.disable_adapter():
        return {
            key.replace("original_module.", ""): tensor.clone()
            for key, tensor in model.get_base_model().state_dict().items()
            if ("embed_tokens" in key or "lm_head" in key) and "_sparse" not in key and "modules_to_save" not in key
        }


def test_the_base_is_compared_whatever_config_is_given(build, saved):
    folder, output, _ = saved()
    config = DSTConfig.from_pretrained(folder)
    other = build("bert")
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.add_(1e-3)
    for given in (config, config, DSTConfig(epsilon=0.02)):
        loaded = PeftModel.from_pretrained(build("bert"), folder, config=given)
        assert torch.equal(logits(loaded, "bert"), output)
        with pytest.raises(DeltaError, match="the base model's values differ"):
            PeftModel.from_pretrained(copy.deepcopy(other), folder, config=given)


@pytest.mark.parametrize("native_loader", [False, True])
def test_an_optimizer_over_all_parameters_is_resumed(native_loader, tmp_path):
    """Frozen ones among them: records are parameters too, as many of them where an adapter was loaded."""
    load = native(tmp_path)
    model = get_peft_model(load(), DSTConfig(epsilon=0.001))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        loss(model, "bert", step).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    if native_loader:
        again = load()
        again.load_adapter(tmp_path / "adapter", is_trainable=True)
        logits(again, "bert")
    else:
        again = PeftModel.from_pretrained(load(), tmp_path / "adapter", is_trainable=True)
    resumed = torch.optim.AdamW(again.parameters(), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, twin in zip(optimizer.param_groups[0]["params"], resumed.param_groups[0]["params"], strict=True):
        assert own in optimizer.state or twin not in resumed.state
        assert own not in optimizer.state or resumed.state[twin]["exp_avg"].shape == own.shape == twin.shape
    for one, opt in ((model, optimizer), (again, resumed)):
        loss(one, "bert", 7).backward()
        opt.step()
    assert_same(weights(model.get_base_model()), weights(again.get_base_model() if not native_loader else again))
