"""Bases that are offloaded, which is refused, or divided over several devices."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import (
    PeftModel,
    get_peft_model,
)
from torch import nn

from peft_dst import DSTConfig, DSTOptimizer
from peft_dst.core import SparseWeight
from peft_dst.training.silo_by_silo import SiloBySilo
from tests.models import assert_same, logits, loss, native, train, weights


DEVICE_MAP = {
    **dict.fromkeys(("bert.embeddings", "bert.encoder.layer.0", "dropout", "classifier"), "cpu"),
    **dict.fromkeys(("bert.encoder.layer.1", "bert.pooler"), "disk"),
}


def offloaded(base: nn.Module, how: str, folder) -> nn.Module:
    if how == "cpu":
        cpu_offload(base, execution_device=torch.device("cpu"))
    elif how == "disk":
        disk_offload(base, folder, execution_device=torch.device("cpu"))
    else:
        prefix = "base_model.model." if isinstance(base, PeftModel) else ""
        device_map = {prefix + name: device for name, device in DEVICE_MAP.items()}
        dispatch_model(base, device_map, main_device="cpu", offload_dir=folder)
    assert any(p.is_meta for p in base.parameters())
    return base


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
@pytest.mark.parametrize("add", ["get_peft_model", "add_adapter", "load_adapter", "from_pretrained"])
def test_offloaded_weights_are_refused(add, how, build, served, tmp_path):
    folder, _, _ = served
    base = offloaded(build("bert"), how, tmp_path / "offloaded")
    modules = [name for name, _ in base.named_modules()]
    calls = {
        "get_peft_model": lambda: get_peft_model(base, DSTConfig(epsilon=0.05)),
        "add_adapter": lambda: base.add_adapter(DSTConfig(epsilon=0.05)),
        "load_adapter": lambda: base.load_adapter(folder),
        "from_pretrained": lambda: PeftModel.from_pretrained(base, folder, offload_dir=tmp_path / "again"),
    }
    if (add, how) == ("from_pretrained", "dispatch"):
        # PEFT brings such a base back, and dispatches it anew with the adapter in its weights.
        assert torch.equal(logits(calls[add](), "bert"), served[1])
        return
    with pytest.raises(ValueError, match=r"'bert\..*' is offloaded: .* merge it where the base fits"):
        calls[add]()
    assert [name for name, _ in base.named_modules()] == modules
    assert torch.equal(logits(base, "bert"), logits(build("bert"), "bert"))


def test_what_is_not_offloaded_is_tuned_and_served(tmp_path):
    load = native(tmp_path)

    def partly_on_disk() -> nn.Module:
        return type(load()).from_pretrained(tmp_path / "base", device_map=DEVICE_MAP, offload_folder=tmp_path / "off")

    model = get_peft_model(load(), DSTConfig(epsilon=0.05, target_modules=["layer.0"]))
    train(model, "bert")
    model.save_pretrained(tmp_path / "adapter")
    base = partly_on_disk()
    with pytest.raises(ValueError, match=r"'bert.encoder.layer.1.*' is offloaded"):
        get_peft_model(base, DSTConfig(epsilon=0.05))
    base.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(base, "bert"), logits(model, "bert"))
    base.disable_adapters()
    assert torch.equal(logits(base, "bert"), logits(load(), "bert"))


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
def test_offloading_a_tuned_model(how, build, served, tmp_path):
    """It serves the adapter that is active; whatever would change weights is refused until they are back."""
    folder, _, _ = served
    model = PeftModel.from_pretrained(build("bert"), folder, is_trainable=True)
    train(model, "bert", first=20)
    output = logits(model, "bert")
    offloaded(model, how, tmp_path / "offloaded")
    assert torch.equal(logits(model, "bert"), output)
    for change in (
        lambda: model.disable_adapter().__enter__(),
        lambda: model.load_adapter(folder, "second"),
        lambda: model.set_adapter("default"),
        lambda: model.merge_adapter(),
        lambda: model.unload(),
        lambda: model.merge_and_unload(),
        lambda: model.save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"has no memory now|is offloaded"):
            change()
    assert torch.equal(logits(model, "bert"), output)
    remove_hook_from_submodules(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), tmp_path / "saved"), "bert"), output)
    with model.disable_adapter():
        assert_same(weights(model.get_base_model()), weights(build("bert")))


def test_a_silo_on_several_devices_is_refused_before_a_step(build, monkeypatch):
    """The device "meta" stands for another one, whose weights the step is not to touch."""
    monkeypatch.setattr(SparseWeight, "check_memory", lambda self: None)
    base = build("bert")
    model = get_peft_model(base, DSTConfig(epsilon=0.05, siloing="none"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss(model, "bert").backward()
    before, pooler = weights(base), base.bert.pooler.dense
    kept, pooler.weight = pooler.weight, nn.Parameter(pooler.weight.to("meta"))
    with pytest.raises(NotImplementedError, match=r"the silo 'model' spans the devices cpu, meta.*'module_and_layer'"):
        optimizer.step()
    pooler.weight = kept
    assert_same(weights(base), before)
    optimizer.step()


def test_kernels_run_device_by_device(build, monkeypatch):
    """Silos of one device are stepped together, and only these."""
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.05))
    step = SiloBySilo(DSTOptimizer([p for p in model.parameters() if p.requires_grad], torch.optim.AdamW, lr=0.1))
    ((constraint, silos),) = step.concerned
    for weight in silos[1].weights:
        setattr(weight.module, weight.attribute, nn.Parameter(weight.data.to("meta")))
    calls = []
    monkeypatch.setattr(step, "_gradient", lambda weight: weight.data)
    monkeypatch.setattr(step, "_suits_kernels", lambda constraint, silo: True)
    monkeypatch.setattr(step, "_by_kernels", lambda constraint, silos: calls.append(silos))
    step.silos(constraint, silos)
    assert calls == [[silo for silo in silos if silo is not silos[1]], [silos[1]]]


@pytest.mark.gpu
@pytest.mark.parametrize("selection", ["dynamic", "random"])
def test_a_model_on_two_devices_trains(selection, tmp_path):
    """Layers on the CPU and on the GPU, as device_map="auto" spreads them over GPUs."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    load = native(tmp_path, "llama")
    base = load()
    seed = weights(base)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places["model.layers.1"] = 0
    # Of a main device that is a GPU, what is on the CPU would count as offloaded.
    dispatch_model(base, places, main_device="cpu", force_hooks=True)
    model = get_peft_model(base, DSTConfig(epsilon=0.05, selection=selection))
    for make in (torch.optim.AdamW, lambda p, lr: DSTOptimizer(p, torch.optim.AdamW, lr=lr)):
        optimizer = make([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loss(model, "llama").backward()
        optimizer.step()
        model.zero_grad()
    changed = {n: int((p.cpu() != seed[n]).sum()) for n, p in weights(base).items()}
    assert 0 < sum(changed.values()) <= model.constraint().budget
    assert any(count for name, count in changed.items() if name.startswith("model.layers.1"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert_same(weights(loaded.get_base_model()), {n: p.cpu() for n, p in weights(base).items()})
    with model.disable_adapter():
        assert_same({n: p.cpu() for n, p in weights(base).items()}, seed)
