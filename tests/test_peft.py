"""DST as a PEFT method: switching, merging, saving and removing adapters in every way that PEFT has."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model

from peft_dst import DSTConfig, DSTModel
from tests.models import assert_same, batch, logits, loss, train, tuned_model, weights


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "t5", "vit"])
def test_disable_enable_switch_delete(name, build):
    seed = weights(build(name))
    plain = logits(build(name), name)
    model, outputs = tuned_model(build, name, ("a", "b"))
    assert not torch.equal(outputs["a"], outputs["b"])
    with model.disable_adapter():
        assert_same(weights(model.get_base_model()), seed)
        assert torch.equal(logits(model, name), plain)
    assert torch.equal(logits(model, name), outputs["b"])
    model.set_adapter("a")
    assert torch.equal(logits(model, name), outputs["a"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert list(model.peft_config) == ["b"]
    assert torch.equal(logits(model, name), outputs["b"])
    model.delete_adapter("b")
    assert_same(weights(model.base_model.model), seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_fifty_random_swaps_merges_and_disablings_are_bit_exact(name, dtype, build):
    names = ("a", "b", "c")
    base = build(name).to(dtype)
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.03), "a")
    tuned = {}
    for adapter in names:
        if adapter != "a":
            model.add_adapter(adapter, DSTConfig(epsilon=0.03))
            model.set_adapter(adapter)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
            optimizer.step()
        tuned[adapter] = weights(base)
        assert sum(int((tuned[adapter][k] != seed[k]).sum()) for k in seed) == model.constraint(adapter).budget
    chance = random.Random(0)
    for _ in range(50):
        adapter = chance.choice(names)
        model.set_adapter(adapter)
        assert_same(weights(base), tuned[adapter])
        action = chance.choice(("disable", "merge", "merge other", "nested", "nothing"))
        if action == "disable":
            with model.disable_adapter():
                assert_same(weights(base), seed)
        elif action == "merge":
            model.merge_adapter()
            assert_same(weights(base), tuned[adapter])
            with model.disable_adapter():
                assert_same(weights(base), seed)
            model.unmerge_adapter()
        elif action == "merge other":
            other = chance.choice(names)
            model.merge_adapter([other])
            assert_same(weights(base), tuned[other])
            model.unmerge_adapter()
        elif action == "nested":
            with model.disable_adapter(), model.disable_adapter():
                assert_same(weights(base), seed)
        assert_same(weights(base), tuned[adapter])
    assert_same(weights(model.unload()), seed)


def test_disabling_inside_a_training_step(build):
    """A reference pass between forward and backward, as DPO does, leaves gradients and step bit-identical."""
    results = []
    for reference_pass in (False, True):
        base = build("llama")
        model = get_peft_model(base, DSTConfig(epsilon=0.05))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(3):
            value = loss(model, "llama", step)
            if reference_pass:
                trainable = [p.requires_grad for p in model.parameters()]
                with model.disable_adapter():
                    loss(model, "llama", step)
                    with torch.no_grad():
                        assert torch.equal(logits(model, "llama"), logits(build("llama"), "llama"))
                assert [p.requires_grad for p in model.parameters()] == trainable
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(base))
    assert_same(*results)


def test_several_active_adapters_add_up(build):
    """The documented meaning: one adapter's entry is taken as it is, entries of several add their changes."""
    base = build("bert")
    seed = weights(base)
    model, tuned = get_peft_model(base, DSTConfig(epsilon=0.2), "a"), {}
    model.add_adapter("b", DSTConfig(epsilon=0.2))
    for i, adapter in enumerate(("a", "b")):
        model.set_adapter(adapter)
        train(model, "bert", first=5 * i)
        tuned[adapter] = weights(base)
    for order in (["a", "b"], ["b", "a"]):
        model.base_model.set_adapter(order)
        overlaps = 0
        for name, value in weights(base).items():
            a, b, zero = tuned["a"][name], tuned["b"][name], seed[name]
            both = (a != zero) & (b != zero)
            overlaps += int(both.sum())
            assert torch.equal(value[~both], torch.where(a != zero, a, b)[~both])
            total = zero.double() + (a.double() - zero.double()) + (b.double() - zero.double())
            assert torch.equal(value[both], total.float()[both])
        assert overlaps > 100
    model.set_adapter("a")
    assert_same(weights(base), tuned["a"])
    model.base_model.set_adapter(["a", "b"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss(model, "bert").backward()
    before = weights(base)
    with pytest.raises(RuntimeError, match="adapters a, b are all active"):
        optimizer.step()
    assert_same(weights(base), before)


def test_several_active_adapters_with_fixed_and_other_subsets(build):
    """A dynamic one over everything, a fixed one in the queries, all biases, and dense copies besides."""
    base = build("bert")
    model = get_peft_model(base, DSTConfig(epsilon=0.1), "dynamic")
    train(model, "bert")
    for name, options in {
        "fixed": {"selection": "random", "epsilon": 0.3, "target_modules": ["query"]},
        "biases": {"selection": "bitfit"},
    }.items():
        model.add_adapter(name, DSTConfig(**options))
        model.set_adapter(name)
        train(model, "bert", first=7)
    with model.disable_adapter():
        seed = weights(base)
    names = ["dynamic", "fixed", "biases"]
    tuned = {}
    for name in names:
        model.set_adapter(name)
        tuned[name] = weights(base)
    for order in (names, names[::-1], names[:2]):
        model.base_model.set_adapter(order)
        counts = set()
        for key, value in weights(base).items():
            total, count, only = seed[key].double(), torch.zeros_like(value), seed[key]
            for name in order:
                moved = tuned[name][key] != seed[key]
                total = total + (tuned[name][key].double() - seed[key].double())
                count, only = count + moved, torch.where(moved, tuned[name][key], only)
            counts |= set(count.unique().tolist())
            assert torch.equal(value[count < 2], only[count < 2])
            assert torch.allclose(value.double(), total, rtol=0, atol=1e-7)
        assert counts >= {0, 1, 2}
    model.set_adapter("fixed")
    assert_same(weights(base), tuned["fixed"])
    model.eval()
    tokens = batch("bert")["input_ids"]
    mixed = model(input_ids=tokens, adapter_names=["biases", "fixed", "dynamic", "__base__"]).logits
    for row, name in enumerate(["biases", "fixed", "dynamic"]):
        model.set_adapter(name)
        assert torch.allclose(model(input_ids=tokens).logits[row], mixed[row], atol=1e-6)
    assert_same(model.unload().state_dict() | {}, dict(build("bert").state_dict()))


def test_merge_and_unload(build):
    model, outputs = tuned_model(build, "bert", ("a", "b"))
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(logits(merged, "bert"), outputs["b"])
    assert not any("_sparse" in n for n in merged.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in build("bert").modules()]
    other = copy.deepcopy(model).merge_and_unload(adapter_names=["a"])
    assert torch.equal(logits(other, "bert"), outputs["a"])
    # A merged model is an ordinary one: it can be wrapped again, and then this is the seed.
    again = get_peft_model(merged, DSTConfig(epsilon=0.02))
    train(again, "bert")
    with again.disable_adapter():
        assert torch.equal(logits(again, "bert"), outputs["b"])


def test_safe_merge_refuses_non_finite_values(build):
    model, _ = tuned_model(build)
    with model.disable_adapter():
        model.get_base_model().bert.embeddings.word_embeddings._sparse.dst_values["default"].weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected.*'bert.embeddings.word_embeddings.weight'"):
        model.merge_adapter(safe_merge=True)
    assert model.get_model_status().merged_adapters == []


def test_unload_returns_the_seed(build):
    seed = weights(build("bert"))
    model, _ = tuned_model(build)
    assert_same(weights(model.unload()), seed)


def test_deep_copies_are_independent(build):
    model, _ = tuned_model(build)
    twin = copy.deepcopy(model)
    train(twin, "bert", first=20)
    train(model, "bert", first=20)
    assert_same(weights(model.get_base_model()), weights(twin.get_base_model()))
    before = weights(model.get_base_model())
    train(twin, "bert", first=40)
    assert_same(weights(model.get_base_model()), before)
    seed = weights(build("bert"))
    with twin.disable_adapter():
        assert_same(weights(twin.get_base_model()), seed)
    assert twin.constraint().steps == 9


def test_a_pickled_model_trains_on(build, tmp_path):
    model, output = tuned_model(build)
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(twin, "bert"), output["default"])
    train(twin, "bert", first=20)
    train(model, "bert", first=20)
    assert_same(weights(model.get_base_model()), weights(twin.get_base_model()))


def test_tied_weights_stay_tied(build):
    model, output = tuned_model(build, "gpt2")
    base = model.get_base_model()
    assert base.lm_head.weight is base.transformer.wte.weight
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert merged.config.tie_word_embeddings
    assert torch.equal(logits(merged, "gpt2"), output["default"])


def test_casting_the_model_keeps_swaps_exact(build):
    model, _ = tuned_model(build)
    reference = weights(build("bert").to(torch.bfloat16))
    model.to(torch.bfloat16)
    tuned = weights(model.get_base_model())
    with model.disable_adapter():
        assert_same(weights(model.get_base_model()), reference)
    assert_same(weights(model.get_base_model()), tuned)


def test_full_state_dicts_round_trip(build):
    """Accelerate's save_state keeps the whole state dict; the base must come back from it too."""
    seed = weights(build("bert"))
    model, output = tuned_model(build, epsilon=0.05)
    state = copy.deepcopy(model.state_dict())
    twin = get_peft_model(build("bert"), DSTConfig(epsilon=0.05))
    train(twin, "bert", first=50)
    twin.load_state_dict(state)
    assert torch.equal(logits(twin, "bert"), output["default"])
    with twin.disable_adapter():
        assert_same(weights(twin.get_base_model()), seed)
    train(twin, "bert", first=20)
    train(model, "bert", first=20)
    assert_same(weights(model.get_base_model()), weights(twin.get_base_model()))
    # Saved while disabled, loaded while enabled: the dense weights are the seed then.
    with model.disable_adapter():
        state = copy.deepcopy(model.state_dict())
    twin.load_state_dict(state)
    assert_same(weights(model.get_base_model()), weights(twin.get_base_model()))


def test_new_base_weights_under_an_active_adapter(build):
    model, _ = tuned_model(build)
    model.base_model.model.bert.pooler.load_state_dict(
        {n: torch.zeros_like(p) for n, p in build("bert").bert.pooler.named_parameters()}, strict=False
    )
    tuned = model.get_base_model().bert.pooler.dense.weight.detach().clone()
    marker = model.get_base_model().bert.pooler.dense._sparse
    expected = torch.zeros(256)
    record = marker.records("default")["weight"]
    expected[record.indices.long()] = record.values
    assert torch.equal(tuned.flatten(), expected)
    with model.disable_adapter():
        assert not model.get_base_model().bert.pooler.dense.weight.any()


def test_status_and_repr(build):
    model, _ = tuned_model(build, adapters=("a", "b"))
    status = model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["b"]
    assert status.available_adapters == ["a", "b"]
    assert status.merged_adapters == []
    assert status.peft_types == {"a": "DST", "b": "DST"}
    assert status.trainable_params == model.constraint("b").budget
    model.merge_adapter()
    assert model.get_layer_status()[0].merged_adapters == ["b"]
    assert "dst.SparseLayer" in repr(model)
    assert isinstance(model.base_model, DSTModel)


@pytest.mark.parametrize("loader", [PeftModel.from_pretrained, None], ids=["PeftModel", "AutoPeftModel"])
def test_loading_by_name(loader, build, tmp_path):
    build("bert").save_pretrained(tmp_path / "base")
    base = type(build("bert")).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, DSTConfig(epsilon=0.02, task_type="SEQ_CLS"))
    train(model, "bert")
    output = logits(model, "bert")
    model.save_pretrained(tmp_path / "adapter")
    if loader is None:
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    else:
        loaded = loader(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(loaded, "bert"), output)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("merge", [True, False])
def test_unloading_beside_a_dense_copy_without_a_weight_of_its_own(merge, build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.05, modules_to_save=["pooler", "classifier"]))
    train(model, "bert")
    tuned = logits(model, "bert")
    left = model.merge_and_unload() if merge else model.unload()
    assert type(left.bert.pooler) is type(build("bert").bert.pooler)
    assert torch.equal(logits(left, "bert"), tuned) is merge
