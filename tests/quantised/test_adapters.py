"""Adapters over quantised bases: switched, saved, replaced, and what can be trained beside them."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_dst import DSTConfig, hotswap_adapter
from peft_dst.analysis import overlap
from peft_dst.delta import DeltaError
from peft_dst.tuner import hotswap, overlay
from tests.models import assert_same, logits, train
from tests.quantised.bases import HEAD, add, serve, with_stand_ins


def test_switch_disable_add_up_delete_unload(kind, base, adapter):
    folders = {label: adapter(label=label, first=10 * i)[0] for i, label in enumerate("ab")}
    bare = base(kind)
    plain = logits(bare, "bert")
    alone = {}
    for label, folder in folders.items():
        alone[label] = logits(serve(base(kind), folder), "bert")
    names = [n for n, _ in bare.named_modules()]
    with pytest.warns(UserWarning, match="quantised here"):
        model = PeftModel.from_pretrained(bare, folders["a"], "a").eval()
    add(model, folders["b"], "b")
    for label in ("b", "a", "b"):
        model.set_adapter(label)
        torch.testing.assert_close(logits(model, "bert"), alone[label], rtol=0, atol=2e-2 if kind == "4-bit" else 0)
        assert not any(p.requires_grad for p in model.parameters())
        with model.disable_adapter():
            assert torch.equal(logits(model, "bert"), plain)
    b = logits(model, "bert")
    model.base_model.set_adapter(["a", "b"])
    both = logits(model, "bert")
    assert all((both - other).abs().max() > 1e-3 for other in (plain, b, alone["a"]))
    model.set_adapter("b")
    assert torch.equal(logits(model, "bert"), b)
    model.delete_adapter("a")
    assert torch.equal(logits(model, "bert"), b)
    left = model.unload()
    assert [n for n, _ in left.named_modules()] == names
    assert torch.equal(logits(left, "bert"), plain)
    assert not any(m._forward_hooks for m in left.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_it_again_writes_the_same(dtype, base, adapter, tmp_path):
    folder, _ = adapter(dtype=dtype, modules_to_save=HEAD)
    model = serve(with_stand_ins(base().to(dtype)), folder)
    model.save_pretrained(tmp_path / "again")
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    for again in (tmp_path / "again", tmp_path / "disabled"):
        assert_same(*(load_file(f / "adapter_model.safetensors") for f in (folder, again)))
        assert len({(f / "adapter_config.json").read_text() for f in (folder, again)}) == 1
    # It still knows its base.
    assert torch.equal(
        logits(PeftModel.from_pretrained(base(), folder), "bert"),
        logits(PeftModel.from_pretrained(base(), again), "bert"),
    )


def test_what_is_not_quantised_can_be_trained(kind, base):
    model = get_peft_model(base(kind), DSTConfig(epsilon=0.1, target_modules=["LayerNorm", "word_embeddings"]))
    before = {w.name: w.data.clone() for silo in model.constraint().silos for w in silo.weights}
    train(model, "bert")
    after = {w.name: w.data for silo in model.constraint().silos for w in silo.weights}
    assert sum(int((after[name] != before[name]).sum()) for name in before) == model.constraint().budget


def test_a_head_can_be_trained_beside_it(base, adapter):
    folder, _ = adapter(modules_to_save=HEAD)
    model = serve(base("stand-in"), folder)
    model.set_adapter("default")
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable == [f"base_model.model.classifier.modules_to_save.default.{n}" for n in ("weight", "bias")]
    before = logits(model, "bert")
    train(model, "bert")
    assert not torch.equal(logits(model, "bert"), before)


def test_through_transformers_own_loader(kind, base, adapter):
    folder, _ = adapter()
    expected = logits(serve(base(kind), folder), "bert")
    model = base(kind)
    with pytest.warns(UserWarning, match="quantised here"):
        model.load_adapter(folder)
    torch.testing.assert_close(logits(model, "bert"), expected, rtol=0, atol=2e-2 if kind == "4-bit" else 0)
    model.disable_adapters()
    assert torch.equal(logits(model, "bert"), logits(base(kind), "bert"))


def test_copies_are_independent(kind, base, adapter):
    folder, _ = adapter()
    model = serve(base(kind), folder)
    served = logits(model, "bert")
    with model.disable_adapter():
        plain = logits(model, "bert")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, "bert"), served)
    twin.unload()
    assert torch.equal(logits(twin.get_base_model(), "bert"), plain)
    assert torch.equal(logits(model, "bert"), served)
    del twin
    gc.collect()
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model, "bert"), plain)


def test_counts_are_those_of_the_seed(kind, base, adapter):
    folder, _ = adapter()
    model = serve(base(kind), folder)
    size = sum(p.numel() for p in base().parameters())
    assert model.constraint().budget == round(0.05 * size)
    assert model.get_nb_trainable_parameters() == (0, size)


def test_overlap_with_what_was_trained(kind, base, adapter):
    """The sizes of quantised weights are those that they had before."""
    folders = [adapter(label=label, first=10 * i)[0] for i, label in enumerate("ab")]
    found = overlap(folders[0], (serve(base(kind), folders[1]), "default"), sizes=base(kind))
    assert found == overlap(*folders)


def test_what_is_remembered_of_the_matrix_does_not_grow(base, adapter, monkeypatch):
    """However many adapters come and go, and each computes as it did."""
    folders = [adapter(label=f"{i}", first=10 * i)[0] for i in range(4)]
    expected = [logits(serve(base("stand-in"), folder), "bert") for folder in folders]
    monkeypatch.setattr(overlay, "_KNOWN", 30)
    model = serve(base("stand-in"), folders[0])
    read = [weight for weight in model.constraint().weights if isinstance(weight, overlay.OverlayWeight)]
    for _ in range(2):
        for folder, answer in zip(folders, expected, strict=True):
            hotswap_adapter(model, folder, "default")
            assert torch.equal(logits(model, "bert"), answer)
            assert all(
                len(weight._known) <= max(weight.shape.numel() // 30, weight.summaries["default"].entries)
                for weight in read
                if weight.summaries
            )


def test_hot_swapping(base, adapter, tmp_path):
    folders = {label: adapter(label=label, first=10 * i)[0] for i, label in enumerate("ab")}
    model = serve(base("stand-in"), folders["a"])
    hotswap_adapter(model, folders["b"], "default")
    assert torch.equal(logits(model, "bert"), logits(serve(base("stand-in"), folders["b"]), "bert"))
    model.save_pretrained(tmp_path / "again")
    assert_same(*(load_file(f / "adapter_model.safetensors") for f in (folders["b"], tmp_path / "again")))
    assert len({(f / "adapter_config.json").read_text() for f in (folders["b"], tmp_path / "again")}) == 1


def summaries(model):
    """What is known of each quantised weight's seed, by its name."""
    return {w.name: dict(w.summaries) for w in model.constraint().weights if isinstance(w, overlay.OverlayWeight)}


def test_entries_of_a_seed_that_nobody_named_are_served_but_not_saved(base, adapter, tmp_path):
    """State dicts hold entries, and not what the config says of them."""
    folders = {label: adapter(label=label, first=10 * i)[0] for i, label in enumerate("ab")}
    model = serve(base("stand-in"), folders["a"])
    own = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, load_file(folders["b"] / "adapter_model.safetensors"))
    assert torch.equal(logits(model, "bert"), logits(serve(base("stand-in"), folders["b"]), "bert"))
    with pytest.raises(ValueError, match=r"'bert.*weight' is quantised.* other entries .* PeftModel.from_pretrained"):
        model.save_pretrained(tmp_path / "again")
    assert not any((tmp_path / "again").iterdir())
    # Its own entries again, and others that are loaded with their config.
    set_peft_model_state_dict(model, own)
    model.save_pretrained(tmp_path / "again")
    model.load_adapter(folders["b"], "default")
    model.save_pretrained(tmp_path / "other")
    for label, again in (("a", "again"), ("b", "other")):
        assert_same(*(load_file(f / "adapter_model.safetensors") for f in (folders[label], tmp_path / again)))
        serve(base("stand-in"), tmp_path / again)


def test_a_failed_load_leaves_what_is_known_of_the_seed(base, adapter, tmp_path):
    folders = {label: adapter(label=label, first=10 * i)[0] for i, label in enumerate("ab")}
    path = folders["b"] / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in reversed(tensors) if "classifier" in k and "dst_values" in k and tensors[k].numel())
    tensors[key] += 1
    save_file(tensors, path, {"format": "pt"})
    model = serve(base("stand-in"), folders["a"])
    known = summaries(model)
    assert any(known.values())
    for load in (lambda: hotswap_adapter(model, folders["b"]), lambda: model.load_adapter(folders["b"], "default")):
        with pytest.raises(DeltaError, match="are not those that"):
            load()
        assert summaries(model) == known
    model.save_pretrained(tmp_path / "again")
    assert_same(*(load_file(f / "adapter_model.safetensors") for f in (folders["a"], tmp_path / "again")))


def test_the_default_device_is_of_no_concern(base, adapter):
    """As after torch.set_default_device("cuda"); here it is one on which nothing can be calculated."""
    folder, _ = adapter()
    model = base("stand-in")
    with torch.device("meta"), pytest.warns(UserWarning, match="quantised here"):
        model = get_peft_model(model, DSTConfig.from_pretrained(folder))
    model.load_adapter(folder, "default")
    assert torch.equal(logits(model, "bert"), logits(serve(base("stand-in"), folder), "bert"))


def test_a_swap_that_is_interrupted_forgets_nothing_of_the_seed(base, adapter, monkeypatch, tmp_path):
    folders = {label: adapter(label=label, first=10 * i)[0] for i, label in enumerate("ab")}
    model = serve(base("stand-in"), folders["a"])
    known = summaries(model)

    def loaded(*args, **kwargs):
        set_peft_model_state_dict(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(hotswap, "set_peft_model_state_dict", loaded)
    with pytest.raises(KeyboardInterrupt):
        hotswap_adapter(model, folders["b"])
    assert summaries(model) == known
    model.save_pretrained(tmp_path / "again")
    assert_same(*(load_file(f / "adapter_model.safetensors") for f in (folders["a"], tmp_path / "again")))


def test_what_is_known_of_a_deleted_adapter_s_seed_is_forgotten(base, adapter):
    folders = {label: adapter(label=label, first=10 * i)[0] for i, label in enumerate("ab")}
    model = serve(base("stand-in"), folders["a"])
    add(model, folders["b"], "b")
    known = summaries(model)
    model.delete_adapter("b")
    assert summaries(model) == {name: {k: v for k, v in own.items() if k != "b"} for name, own in known.items()}
    assert any("b" in own for own in known.values())
