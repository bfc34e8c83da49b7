"""Every way to load a base: resized, without memory, offloaded, on several devices, sharded, in mixed dtypes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import set_module_tensor_to_device
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from peft_dst import DSTConfig, DSTOptimizer
from peft_dst.core import SparseWeight
from peft_dst.delta import DeltaError
from peft_dst.training.silo_by_silo import SiloBySilo
from tests.models import assert_same, bert, llama, logits, loss, native, train, weights


RESIZED = "'model.embed_tokens.weight' has changed its shape since the adapter was added"


@pytest.fixture
def served(build, tmp_path):
    """A saved adapter for the tiny BERT: its folder, logits, and the tuned weights."""
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.05))
    train(model, "bert")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model, "bert"), weights(model.get_base_model())


# Resized vocabularies


def resized(load):
    base = load()
    torch.manual_seed(7)
    base.resize_token_embeddings(70, mean_resizing=False)
    return base


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("save", ["auto", True])
@pytest.mark.parametrize(
    "targets", [None, ["q_proj"], ["embed_tokens", "lm_head"]], ids=["all", "others", "embeddings"]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_vocabulary_resized_before(name, targets, save, tmp_path):
    if name == "gpt2" and targets:
        targets = [{"q_proj": "c_attn", "embed_tokens": "wte"}.get(target, target) for target in targets]
    load = native(tmp_path, name)
    base = resized(load)
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.05, target_modules=targets))
    train(model, name)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=save)
    loaded = PeftModel.from_pretrained(resized(load), tmp_path / "adapter")
    assert torch.equal(logits(loaded, name), logits(model, name))
    with loaded.disable_adapter():
        assert_same(weights(loaded.get_base_model()), seed)
    assert torch.equal(logits(loaded, name), logits(model, name))


def test_a_vocabulary_resized_otherwise(tmp_path):
    """With other new rows: refused, unless PEFT saved the embeddings whole."""
    load = native(tmp_path, "llama")
    model = get_peft_model(resized(load), DSTConfig(epsilon=0.05))
    train(model, "llama")
    model.save_pretrained(tmp_path / "bare", save_embedding_layers=False)
    model.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "whole" / "adapter_model.safetensors")
    other = load()
    torch.manual_seed(8)
    other.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(DeltaError, match=r"'(lm_head|model.embed_tokens).weight': the base model's values differ"):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "bare")
    loaded = PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "whole")
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    with loaded.disable_adapter():
        assert_same(weights(loaded.get_base_model()), weights(resized(load)))
    # Not resized at all.
    with pytest.raises(DeltaError, match="outside a tensor of 976 components"):
        PeftModel.from_pretrained(load(), tmp_path / "bare")
    # transformers' own loader writes whole embeddings first, and knows nothing of their seed.
    other.load_adapter(tmp_path / "whole")
    with pytest.raises(DeltaError, match=r"has the adapter's values already.*PeftModel.from_pretrained"):
        logits(other, "llama")


def test_a_vocabulary_resized_after(build, tmp_path):
    """Refused at the next step and on saving; the other way round nothing is lost."""
    model = get_peft_model(build("llama"), DSTConfig(epsilon=0.05, target_modules=["embed_tokens"]))
    train(model, "llama")
    model.get_base_model().resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(RuntimeError, match=f"{RESIZED}.*Resize the base model .* before get_peft_model"):
        train(model, "llama", first=20)
    model.zero_grad()
    with pytest.raises(RuntimeError, match=RESIZED):
        model.save_pretrained(tmp_path)
    # An output head is replaced by a new module, and what was trained of the old one is gone.
    model = get_peft_model(build("llama"), DSTConfig(epsilon=0.05, target_modules=["lm_head", "q_proj"]))
    train(model, "llama")
    model.get_base_model().resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(RuntimeError, match=r"the module of 'lm_head.weight' was replaced since the adapter 'default'"):
        model.save_pretrained(tmp_path)


# Without memory


@pytest.mark.parametrize(
    ("how", "selection"),
    [
        (get_peft_model, "dynamic"),
        (get_peft_model, "random"),
        (lambda base, config, **low: inject_adapter_in_model(config, base, **low), "dynamic"),
    ],
)
def test_adding_with_low_cpu_mem_usage(how, selection, build):
    tuned = []
    for low_cpu_mem_usage in (False, True):
        base = build("bert")
        config = DSTConfig(epsilon=0.05, selection=selection)
        model = how(base, config, low_cpu_mem_usage=low_cpu_mem_usage)
        train(model, "bert")
        tuned.append(weights(base))
    assert_same(*tuned)


def test_subsets_injected_with_low_cpu_mem_usage_are_loaded_not_chosen(build):
    """As everything that is made with it, the subset is on no device before it is loaded."""
    base = build("bert")
    model = inject_adapter_in_model(DSTConfig(epsilon=0.05, selection="random"), base, low_cpu_mem_usage=True)
    before = weights(base)
    with pytest.raises(RuntimeError, match=r"low_cpu_mem_usage=True is for adapters that are loaded"):
        train(model, "bert")
    assert_same(weights(base), before)


def test_injected_and_loaded_with_low_cpu_mem_usage(build, served):
    folder, output, _ = served
    state = get_peft_model_state_dict(PeftModel.from_pretrained(build("bert"), folder))
    base = build("bert")
    inject_adapter_in_model(DSTConfig(epsilon=0.05), base, low_cpu_mem_usage=True)
    assert not set_peft_model_state_dict(base, state, low_cpu_mem_usage=True).unexpected_keys
    assert torch.equal(logits(base, "bert"), output)


def on_meta() -> nn.Module:
    """As models are built before their weights are there; buffers are."""
    with init_empty_weights():
        return bert()


def assign(base: nn.Module, source: nn.Module) -> None:
    base.load_state_dict(source.state_dict(), assign=True, strict=False)


def fill(base: nn.Module, source: nn.Module) -> None:
    """In place, as torch's own recipe for deferred initialisation has it."""
    base.to_empty(device="cpu")
    base.load_state_dict(source.state_dict(), strict=False)
    for name, buffer in source.named_buffers():
        base.get_buffer(name).copy_(buffer)


def set_one_by_one(base: nn.Module, source: nn.Module) -> None:
    """As accelerate's loaders do, past every hook of `load_state_dict`."""
    for name, parameter in source.named_parameters():
        set_module_tensor_to_device(base, name, "cpu", value=parameter.detach().clone())


LOADERS = [assign, fill, set_one_by_one]


@pytest.mark.parametrize("load", LOADERS)
def test_training_a_base_that_is_loaded_after_it_was_wrapped(load, build, served, tmp_path):
    _, output, tuned = served
    base = on_meta()
    model = get_peft_model(base, DSTConfig(epsilon=0.05))
    with pytest.raises(RuntimeError, match=r"has no memory now.*load it first"):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    load(base, build("bert"))
    train(model, "bert")
    assert_same(weights(base), tuned)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(build("bert"), tmp_path / "again"), "bert"), output)
    # A change that nobody announced is known also here.
    with torch.no_grad():
        base.bert.pooler.dense.weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"'bert.pooler.dense.weight' differs from the seed outside the subset"):
        model.save_pretrained(tmp_path / "edited")
    with torch.no_grad():
        base.bert.pooler.dense.weight.copy_(tuned["bert.pooler.dense.weight"])
    assert_same(weights(model.unload()), weights(build("bert")))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("load", LOADERS)
def test_serving_a_base_that_is_loaded_after_the_adapter(load, low_cpu_mem_usage, build, served):
    folder, output, _ = served
    model = PeftModel.from_pretrained(on_meta(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    with pytest.raises(RuntimeError, match=r"has no memory now.*load it first"):
        logits(model, "bert")
    load(model.get_base_model(), build("bert"))
    assert torch.equal(logits(model, "bert"), output)
    with model.disable_adapter():
        assert_same(weights(model.get_base_model()), weights(build("bert")))
    assert torch.equal(logits(model, "bert"), output)


def test_an_adapter_that_nobody_would_apply_later_is_refused(build, served):
    folder, _, _ = served
    state = get_peft_model_state_dict(PeftModel.from_pretrained(build("bert"), folder))
    base = on_meta()
    inject_adapter_in_model(DSTConfig(epsilon=0.05), base)
    with pytest.raises(RuntimeError, match=r"has no memory yet.*Load the base model before the adapter"):
        set_peft_model_state_dict(base, state)


@pytest.mark.parametrize("load", LOADERS)
def test_serving_a_bfloat16_base_that_is_loaded_after_the_float32_adapter(load, build, served):
    folder, _, tuned = served
    base = on_meta().bfloat16()
    model = PeftModel.from_pretrained(base, folder)
    load(base, build("bert").bfloat16())
    logits(model, "bert")
    assert_same(weights(base), {name: tensor.bfloat16() for name, tensor in tuned.items()})


@pytest.mark.parametrize("load", LOADERS)
def test_another_base_is_refused_also_when_it_comes_later(load, served):
    folder, _, _ = served
    model = PeftModel.from_pretrained(on_meta(), folder)
    torch.manual_seed(99)
    other = bert()
    load(model.get_base_model(), other)
    with pytest.raises(DeltaError, match="the base model's values differ"):
        logits(model, "bert")
    assert_same(weights(model.get_base_model()), weights(other))


def test_within_a_meta_device_context(build):
    with torch.device("meta"):
        base = build("bert")
        model = get_peft_model(base, DSTConfig(epsilon=0.05))
    fill(base, build("bert"))
    plain = get_peft_model(build("bert"), DSTConfig(epsilon=0.05))
    for each in (model, plain):
        train(each, "bert")
    assert_same(weights(base), weights(plain.get_base_model()))


@pytest.mark.parametrize("selection", ["random", "magnitude", "bitfit"])
def test_a_static_subset_needs_the_seed(selection, build):
    base = on_meta()
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(
        ValueError, match=r"takes the values of the base model, which has none yet.*Load the base model"
    ):
        get_peft_model(base, DSTConfig(selection=selection))
    assert [name for name, _ in base.named_modules()] == modules


# Offloaded, and on several devices

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


# Files and dtypes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["sharded", "bin"])
def test_the_form_of_the_base_s_files_does_not_matter(form, name, tmp_path):
    load = native(tmp_path, name)
    model = get_peft_model(load(), DSTConfig(epsilon=0.05))
    train(model, name)
    model.save_pretrained(tmp_path / "adapter")
    base = load()
    other = tmp_path / "other"
    if form == "sharded":
        base.save_pretrained(other, max_shard_size="5KB")
        assert len(list(other.glob("model-*.safetensors"))) > 2
    else:
        base.config.save_pretrained(other)
        torch.save(base.state_dict(), other / "pytorch_model.bin")
    loaded = PeftModel.from_pretrained(type(base).from_pretrained(other), tmp_path / "adapter")
    assert torch.equal(logits(loaded, name), logits(model, name))
    base = type(base).from_pretrained(other)
    base.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(base, name), logits(model, name))


def norms_in_float32(base: nn.Module) -> nn.Module:
    for module in base.to(torch.bfloat16).modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return base


class Mixed(nn.Module):
    """A module whose own parameters differ in dtype."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8, dtype=torch.bfloat16)
        self.inner.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return (x.bfloat16() @ self.inner.weight.t()).float() + self.inner.bias


@pytest.mark.parametrize("siloing", ["module_and_layer", "none"])
@pytest.mark.parametrize("make", [lambda: bert().to(torch.bfloat16), lambda: norms_in_float32(bert()), Mixed],
                         ids=["bfloat16", "norms in float32", "within one module"])  # fmt: skip
def test_mixed_dtypes(make, siloing, tmp_path):
    torch.manual_seed(0)
    base = make()
    fresh, seed = copy.deepcopy(base), weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.05, siloing=siloing))
    optimizer = DSTOptimizer([p for p in model.parameters() if p.requires_grad], torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    tuned = weights(base)
    assert 0 < sum(int((tuned[n] != seed[n]).sum()) for n in seed) <= model.constraint().budget
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage, autocast_adapter_dtype in itertools.product((False, True), repeat=2):
        options = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": autocast_adapter_dtype}
        loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path, **options)
        assert_same(weights(loaded.get_base_model()), tuned)
        with loaded.disable_adapter():
            assert_same(weights(loaded.get_base_model()), seed)
        assert_same(weights(loaded.get_base_model()), tuned)
    assert_same(weights(model.unload()), seed)


def test_a_base_in_the_dtype_it_was_saved_in(tmp_path):
    torch.manual_seed(0)
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")

    def load(dtype):
        return type(llama()).from_pretrained(tmp_path / "base", dtype=dtype)

    base = load("auto")
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    model = get_peft_model(base, DSTConfig(epsilon=0.05))
    train(model, "llama")
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load("auto"), tmp_path / "adapter")
    assert_same(weights(loaded.get_base_model()), weights(base))
    # The same values in float32 are the same base.
    loaded = PeftModel.from_pretrained(load(torch.float32), tmp_path / "adapter")
    assert_same(weights(loaded.get_base_model()), {n: p.float() for n, p in weights(base).items()})


def test_casting_a_tuned_model(build, served, tmp_path):
    folder, _, _ = served
    model = PeftModel.from_pretrained(build("bert"), folder, is_trainable=True).half()
    tuned, seed = weights(model.get_base_model()), weights(build("bert").half())
    with model.disable_adapter():
        assert_same(weights(model.get_base_model()), seed)
    assert_same(weights(model.get_base_model()), tuned)
    model.save_pretrained(tmp_path / "half")
    for saved in (folder, tmp_path / "half"):
        assert_same(weights(PeftModel.from_pretrained(build("bert").half(), saved).get_base_model()), tuned)
    assert_same(weights(model.unload()), seed)
