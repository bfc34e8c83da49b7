"""What is written, and what comes back: through PEFT, through transformers, onto the same base and onto others."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from peft_dst import DSTConfig
from peft_dst.delta import DeltaError, read_metadata
from tests.models import assert_same, bert, logits, train, weights


@pytest.fixture
def saved(build, tmp_path):
    """Folder of a saved adapter for the tiny BERT, with its logits."""

    def make(name="bert", **options):
        model = get_peft_model(build(name), DSTConfig(**{"epsilon": 0.02, **options}))
        train(model, name)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(model, name), model

    return make


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
    assert (metadata["epsilon"], metadata["siloing"], metadata["distance"]) == (
        0.02,
        "module_and_layer",
        "inverse_relative",
    )
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert sum(entries for entries, *_ in config["records"].values()) == model.constraint().budget
    assert {"float32", "bfloat16", "float16"} == set(next(iter(config["records"].values()))[2])


def test_the_model_card_says_what_to_import(saved):
    folder, _, model = saved(task_type="SEQ_CLS")
    model.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert card.count("import peft_dst") == 1
    assert "pip install peft-dst" in card
    assert "AutoModelForSequenceClassification" in card
    assert "dynamic-subset-tuning" in card
    assert f"| default | ε = 0.02 | {model.constraint().budget:,} | module_and_layer | inverse_relative |" in card


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


def test_state_dicts_in_memory(build, saved):
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
        assert not any(m._forward_pre_hooks for m in twin.modules())


@pytest.mark.parametrize("finish", ["merge_and_unload", "unload"])
def test_a_loaded_model_is_unloaded_before_its_first_use(finish, build, saved):
    folder, output, _ = saved()
    base = getattr(PeftModel.from_pretrained(build("bert"), folder), finish)()
    expected = output if finish == "merge_and_unload" else logits(build("bert"), "bert")
    assert torch.equal(logits(copy.deepcopy(base), "bert"), expected)


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


# transformers' own integration


def native(tmp_path, name="bert"):
    """A tiny base on disk, as users have one, and how to load it."""
    from tests.models import BUILDERS

    torch.manual_seed(0)
    model = BUILDERS[name]()
    model.save_pretrained(tmp_path / "base")
    return lambda: type(model).from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "t5"])
def test_transformers_load_adapter_and_from_pretrained(name, tmp_path):
    load = native(tmp_path, name)
    model = get_peft_model(load(), DSTConfig(epsilon=0.02))
    train(model, name)
    model.save_pretrained(tmp_path / "adapter")
    output, seed = logits(model, name), weights(load())

    base = load()
    base.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(base, name), output)
    base.disable_adapters()
    assert_same(weights(base), seed)
    base.enable_adapters()
    assert torch.equal(logits(base, name), output)

    auto = {"bert": AutoModelForSequenceClassification, "t5": AutoModelForSeq2SeqLM}.get(name, AutoModelForCausalLM)
    direct = auto.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(direct, name), output)


def test_transformers_add_train_save_load_switch_delete(tmp_path):
    load = native(tmp_path)
    base = load()
    seed = weights(base)
    base.add_adapter(DSTConfig(epsilon=0.02), "one")
    train(base, "bert")
    one = logits(base, "bert")
    assert 0 < sum(int((p != seed[n]).sum()) for n, p in weights(base).items()) <= base.dst_constraints["one"].budget
    base.save_pretrained(tmp_path / "one")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        # transformers makes a tuner anew for every adapter, and PEFT remarks on it, whatever the method.
        base.add_adapter(DSTConfig(epsilon=0.02), "two")
    train(base, "bert", first=9)
    two = logits(base, "bert")
    base.set_adapter("one")
    assert torch.equal(logits(base, "bert"), one)
    base.set_adapter("two")
    assert torch.equal(logits(base, "bert"), two)
    for loaded in (PeftModel.from_pretrained(load(), tmp_path / "one"), type(base).from_pretrained(tmp_path / "one")):
        assert torch.equal(logits(loaded, "bert"), one)
    base.set_adapter("one")
    base.delete_adapter("two")
    assert torch.equal(logits(base, "bert"), one)


def test_transformers_load_is_complete_before_any_part_is_used(tmp_path, capfd):
    """T5's generate calls the encoder before the model; a tuned decoder must not meet a seed encoder."""
    load = native(tmp_path, "t5")
    model = get_peft_model(load(), DSTConfig(epsilon=0.05))
    train(model, "t5", lr=0.3)
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(2, 9)[None]
    capfd.readouterr()
    direct = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    assert "MISSING" not in capfd.readouterr().err
    direct.encoder(tokens)
    assert_same(weights(direct), weights(model.get_base_model()))
    direct = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(direct.generate(tokens, **options), model.generate(input_ids=tokens, **options))


def test_transformers_load_with_a_dense_head(tmp_path):
    load = native(tmp_path)
    model = get_peft_model(load(), DSTConfig(epsilon=0.02, modules_to_save=["classifier"]))
    train(model, "bert")
    model.save_pretrained(tmp_path / "adapter")
    base = load()
    base.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(base, "bert"), logits(model, "bert"))


def test_transformers_load_onto_another_base_is_refused(tmp_path):
    load = native(tmp_path)
    model = get_peft_model(load(), DSTConfig(epsilon=0.02))
    train(model, "bert")
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(99)
    other = bert()
    seed = weights(other)
    other.load_adapter(tmp_path / "adapter")
    other.set_adapter("default")
    with pytest.raises(DeltaError, match="belongs to another base"):
        logits(other, "bert")
    assert_same(weights(other), seed)


# Refusals: each names the thing and the remedy, and leaves the model as it was.


def assert_refused(base, folder, match):
    seed, output = weights(base), logits(base, "bert")
    model = get_peft_model(base, DSTConfig(epsilon=0.01), "mine")
    train(model, "bert", first=40)
    tuned = weights(base)
    with pytest.raises(DeltaError, match=match):
        model.load_adapter(folder, "theirs")
    assert_same(weights(base), tuned)
    with model.disable_adapter():
        assert_same(weights(base), seed)
        assert torch.equal(logits(base, "bert"), output)


def test_another_base_is_refused(saved):
    folder, _, _ = saved()
    torch.manual_seed(99)
    assert_refused(
        bert(), folder, "'bert.embeddings.word_embeddings.weight': the base model's values differ.*Load it onto"
    )


def test_a_base_that_was_tuned_or_merged_is_refused(build, saved):
    folder, _, _ = saved()
    base = build("bert")
    with torch.no_grad():
        base.bert.pooler.dense.weight.add_(1e-6)
    assert_refused(base, folder, "'bert.pooler.dense.weight': the base model's values differ")


def test_another_shape_is_refused(build, saved):
    folder, _, _ = saved()
    narrow, state = bert(intermediate_size=2), build("bert").state_dict()
    narrow.load_state_dict(
        {n: state[n] for n, t in narrow.state_dict().items() if t.shape == state[n].shape}, strict=False
    )
    assert_refused(narrow, folder, r"intermediate.dense.weight'.*a tensor of 32 components")


def test_an_architecture_without_the_tensor_is_refused(build, saved):
    folder, _, _ = saved()
    with pytest.raises(DeltaError, match=r"'bert.embeddings.LayerNorm.weight', which the model does not have"):
        PeftModel.from_pretrained(build("llama"), folder)


def edit(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("query.dst_indices.weight") or "query._sparse.dst_indices.weight" in k)
    change(tensors, key, key.replace("indices", "values"))
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, i, v: t[i].__setitem__(-1, 10**6), "position 1000000, outside a tensor of 256 components"),
        (lambda t, i, v: t[i].__setitem__(0, -5), "entry 0 has position -5"),
        (lambda t, i, v: t[i].__setitem__(1, int(t[i][0])), "not strictly ascending at entry 1"),
        (lambda t, i, v: t.__setitem__(i, t[i].flip(0).contiguous()), "not strictly ascending"),
        (lambda t, i, v: t.__setitem__(v, t[v][:-1].clone()), "expected two vectors of one length"),
        (lambda t, i, v: t.__setitem__(i, t[i].float()), "indices are torch.float32"),
        (lambda t, i, v: t[v].__setitem__(2, float("nan")), "entry 2 has the value nan"),
        (lambda t, i, v: t[v].__setitem__(2, float("inf")), "entry 2 has the value inf"),
        (lambda t, i, v: t.pop(v), "has no dst_values"),
        (lambda t, i, v: t[i].add_(1), "not those that adapter_config.json describes|outside a tensor"),
        (lambda t, i, v: t.__setitem__(i.replace("query", "quarry"), t[i].clone()), "quarry"),
    ],
)
def test_damaged_files_are_refused(change, match, build, saved):
    folder, _, _ = saved(epsilon=0.05)
    edit(folder, change)
    assert_refused(build("bert"), folder, match)


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ({"bert.pooler.dense.weight": [10**12, "0", {"float32": "0"}]}, "1,000,000,000,000 entries"),
        ({"bert.pooler.dense.weight": "many"}, "malformed entry for 'bert.pooler.dense.weight'"),
        ({"bert.pooler.dense.weight": [-1, "0", {}]}, "malformed entry"),
        ({"no.such.weight": [1, "0", {"float32": "0"}]}, "'no.such.weight', which the model does not have"),
    ],
)
def test_damaged_configs_are_refused_before_memory_is_taken(records, match, build, saved):
    folder, _, _ = saved()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "records": records}))
    assert_refused(build("bert"), folder, match)


def test_files_of_two_saves_are_refused(build, saved, tmp_path):
    folder, _, model = saved()
    train(model, "bert", first=60)
    model.save_pretrained(tmp_path / "later")
    shutil.copy(tmp_path / "later" / "adapter_model.safetensors", folder)
    assert_refused(build("bert"), folder, "different saves")


def test_a_file_may_not_overwrite_the_base(build, saved):
    folder, _, _ = saved(epsilon=0.05)
    edit(folder, lambda t, i, v: t.__setitem__("base_model.model.bert.pooler.dense.weight", torch.zeros(16, 16)))
    assert_refused(build("bert"), folder, r"dense tensor '.*pooler.dense.weight', which would overwrite the base")


def test_more_entries_than_the_config_allows_are_refused(build, saved):
    folder, _, _ = saved(epsilon=0.5)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "epsilon": 0.001}))
    assert_refused(build("bert"), folder, r"entries, but the config of 'theirs' allows 6 free parameters")


def test_values_that_overflow_in_the_base_s_dtype_are_refused(build, saved):
    folder, _, _ = saved(epsilon=0.05)
    edit(folder, lambda t, i, v: t.__setitem__(v, t[v].double().fill_(1e300)))
    assert_refused(build("bert"), folder, r"value 1e\+300, which is not finite in torch.float32")


def test_saving_the_config_again_keeps_what_it_says_of_the_tensors(build, saved):
    folder, output, model = saved()
    before = json.loads((folder / "adapter_config.json").read_text())["records"]
    model.peft_config["default"].save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["records"] == before
    assert read_metadata(folder / "adapter_model.safetensors")["records"] == before
    assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), folder), "bert"), output)


def test_a_refused_adapter_leaves_the_base_as_it_was(build, saved):
    folder, _, _ = saved(epsilon=0.05)
    edit(folder, lambda t, i, v: t[i].__setitem__(0, -5))
    base = build("bert")
    with pytest.raises(DeltaError):
        PeftModel.from_pretrained(base, folder)
    assert all(p.requires_grad for p in base.parameters())
    assert [n for n, _ in base.named_modules()] == [n for n, _ in build("bert").named_modules()]


def test_a_newer_format_is_refused(build, saved):
    folder, _, _ = saved()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(ValueError, match=r"format version 2; this peft_dst reads version 1"):
        PeftModel.from_pretrained(build("bert"), folder)


def test_a_failed_stamp_leaves_the_file(saved, monkeypatch):
    from peft_dst.delta import files

    folder, _, model = saved()
    before = (folder / "adapter_model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.peft_config["default"].save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert {f.name for f in folder.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
