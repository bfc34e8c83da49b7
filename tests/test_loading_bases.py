"""Ways to load a base: without memory at first, from sharded files, in mixed dtypes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

from peft_dst import DSTConfig, DSTOptimizer
from peft_dst.delta import DeltaError
from tests.models import assert_same, bert, llama, logits, native, train, weights


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
def test_a_static_subset_needs_the_seed(selection):
    base = on_meta()
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(
        ValueError, match=r"takes the values of the base model, which has none yet.*Load the base model"
    ):
        get_peft_model(base, DSTConfig(selection=selection))
    assert [name for name, _ in base.named_modules()] == modules


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
