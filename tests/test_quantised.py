"""Adapters that were trained on float32 weights, served over quantised ones."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from peft_dst import DSTConfig, hotswap_adapter
from peft_dst.delta import DeltaError, SparseDelta
from tests.models import BUILDERS, assert_same, batch, logits, train


# bitsandbytes' 4-bit kernel wants outputs by 32 and inputs by 64.
WIDE = {"bert": {"hidden_size": 64, "intermediate_size": 128}, "gpt2": {"n_embd": 64}}
HEAD = ["classifier"]
UNQUANTISED = [*HEAD, "lm_head"]


class StandIn(torch.Tensor):
    """Stands for torchao's tensors, where torchao is not installed: a subclass of its own, on an 8-bit grid."""

    __module__ = "torchao.stand_in"

    def __deepcopy__(self, memo):
        return nn.Parameter(self.dequantize().as_subclass(type(self)), requires_grad=False)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor) if func is functional.linear else result

    def dequantize(self):
        return self.as_subclass(torch.Tensor).clone()


def stand_in(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return nn.Parameter(((weight / scale).round() * scale).detach().as_subclass(StandIn), requires_grad=False)


def with_stand_ins(model):
    for name, module in list(model.named_modules()):
        if name in UNQUANTISED:
            continue
        if isinstance(module, nn.Linear):
            module.weight = stand_in(module.weight)
        elif isinstance(module, Conv1D):
            # As transformers does it for bitsandbytes.
            linear = nn.Linear(module.nx, module.nf)
            linear.weight, linear.bias, linear.source_cls = stand_in(module.weight.t()), module.bias, Conv1D
            model.set_submodule(name, linear)
    return model


def quantization_config(kind):
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        return hf.TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=UNQUANTISED)
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if kind == "8-bit":
        return hf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=UNQUANTISED)
    return hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=UNQUANTISED)


KINDS = ("stand-in", "torchao", "8-bit", "4-bit")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def base(tmp_path):
    """Load a tiny base, always the same: in float32, or quantised."""

    def make(kind=None, name="bert"):
        folder = tmp_path / f"base_{name}"
        if not folder.is_dir():
            torch.manual_seed(0)
            model = BUILDERS[name]()
            config = type(model.config)(**{**model.config.to_dict(), **WIDE[name]})
            type(model)(config).save_pretrained(folder)
        # Saved configs name their architecture.
        architecture = getattr(hf, hf.AutoConfig.from_pretrained(folder).architectures[0])
        if kind in (None, "stand-in"):
            model = architecture.from_pretrained(folder)
            return with_stand_ins(model).eval() if kind else model
        return architecture.from_pretrained(folder, quantization_config=quantization_config(kind)).eval()

    return make


@pytest.fixture
def adapter(base, tmp_path):
    """Train an adapter on the float32 base and save it; its folder and its logits."""

    def make(name="bert", label="a", dtype=torch.float32, first=0, **options):
        folder = tmp_path / label
        model = get_peft_model(base(None, name).to(dtype), DSTConfig(**{"epsilon": 0.05, **options}))
        train(model, name, steps=4, lr=0.03, first=first)
        model.save_pretrained(folder)
        return folder, logits(model, name)

    return make


def serve(model, folder, **options):
    with pytest.warns(UserWarning, match=r"tensors that adapter 'default' changes are quantised here"):
        return PeftModel.from_pretrained(model, folder, **options).eval()


def add(model, folder, label):
    with pytest.warns(UserWarning, match=rf"adapter '{label}' changes are quantised here"):
        model.load_adapter(folder, label)


def quantised_layers(model):
    return {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and (not m.weight.is_floating_point() or type(m.weight.data) is not torch.Tensor)
    }


# torchao leaves GPT-2's Conv1D as they are; transformers puts bitsandbytes' layers in their place.
layers_of_both = pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "bert") for kind in KINDS), *((kind, "gpt2") for kind in KINDS if kind != "torchao")],
)


@layers_of_both
def test_each_layer_computes_with_the_tuned_values(kind, name, base, adapter):
    folder, _ = adapter(name)
    records = SparseDelta.load(folder)
    # What the weights stand for, read before any forward pass.
    seeds = {n: dequantize_module_weight(m).float().clone() for n, m in quantised_layers(base(kind, name)).items()}
    model = serve(base(kind, name), folder)
    inner = model.get_base_model()
    layers = quantised_layers(inner)
    assert len(layers) == {"bert": 13, "gpt2": 8}[name]
    for layer_name, layer in layers.items():
        record = records[f"{layer_name}.weight"]
        tuned = seeds[layer_name].clone()
        transposed = tuned.t() if name == "gpt2" else tuned
        transposed[torch.unravel_index(record.indices.long(), transposed.shape)] = record.values
        x = torch.randn(5, 3, layer.in_features)
        with torch.no_grad():
            output = layer(x)
            with model.disable_adapter():
                plain = layer(x)
        # The bias is tuned too, in place.
        bias = layer.bias - _seed_of(model, layer)
        expected = functional.linear(x, tuned - seeds[layer_name], bias)
        assert expected.abs().max() > 0.1
        # bitsandbytes computes in float16, its 4-bit kernel in bfloat16.
        torch.testing.assert_close(output - plain, expected, rtol=0, atol=1e-5 if "bit" not in kind else 1e-2)


def _seed_of(model, layer):
    with model.disable_adapter():
        return layer.bias.detach().clone()


def test_served_is_near_what_was_trained(kind, base, adapter):
    folder, tuned = adapter()
    model = serve(base(kind), folder)
    served = logits(model, "bert")
    with model.disable_adapter():
        plain = logits(model, "bert")
    assert torch.equal(plain, logits(base(kind), "bert"))
    assert (served - tuned).abs().mean() < 0.2 * (plain - tuned).abs().mean()
    # Without the corrections it is further away.
    for layer in quantised_layers(model).values():
        layer._forward_hooks.clear()
    assert (served - tuned).abs().mean() < 0.5 * (logits(model, "bert") - tuned).abs().mean()


def test_a_pass_before_the_adapter_is_loaded_changes_nothing(kind, base, adapter):
    """Bitsandbytes lays 4-bit matrices out anew, on some CPUs, and moves the scales of 8-bit ones."""
    folder, _ = adapter()
    used = base(kind)
    logits(used, "bert")
    served, expected = logits(serve(used, folder), "bert"), logits(serve(base(kind), folder), "bert")
    torch.testing.assert_close(served, expected, rtol=0, atol=2e-2 if kind == "4-bit" else 0)


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


def test_several_active_adapters_add_up_where_they_overlap(base, adapter):
    folders = {label: adapter(label=label, first=10 * i, epsilon=0.5)[0] for i, label in enumerate("ab")}
    with pytest.warns(UserWarning, match="quantised here"):
        model = PeftModel.from_pretrained(base("stand-in"), folders["a"], "a").eval()
    add(model, folders["b"], "b")
    model.base_model.set_adapter(["a", "b"])
    name, layer = next(iter(quantised_layers(model.get_base_model()).items()))
    seed = layer.weight.dequantize()
    total, count = seed.clone(), torch.zeros_like(seed)
    for folder in folders.values():
        indices, values = SparseDelta.load(folder)[f"{name}.weight"].record()
        at = indices.long()
        total.view(-1)[at] += values - seed.view(-1)[at]
        count.view(-1)[at] += 1
    assert (count == 2).sum() > 100
    x = torch.randn(7, layer.in_features)
    torch.testing.assert_close(layer(x), functional.linear(x, total, layer.bias))


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


def test_the_unquantised_rest_still_knows_its_base(kind, base, adapter):
    folder, _ = adapter()
    other = base(kind)
    with torch.no_grad():
        other.bert.embeddings.LayerNorm.weight.add_(1e-3)
    before = logits(other, "bert")
    with (
        pytest.warns(UserWarning, match="quantised here"),
        pytest.raises(DeltaError, match=r"'bert.embeddings.LayerNorm.weight': the base model's values differ"),
    ):
        PeftModel.from_pretrained(other, folder)
    assert torch.equal(logits(other, "bert"), before)
    assert not any(m._forward_hooks for m in other.modules())


def test_damaged_entries_of_a_quantised_weight_are_refused(base, adapter):
    folder, _ = adapter()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("query._sparse.dst_indices.weight"))
    tensors[key][-1] += 1
    save_file(tensors, path, {"format": "pt"})
    with (
        pytest.warns(UserWarning, match="quantised here"),
        pytest.raises(DeltaError, match=r"query.weight': the entries .* are not those"),
    ):
        PeftModel.from_pretrained(base("stand-in"), folder)


REFUSED = r"'bert.*weight' is .*Train the adapter on the base model in float32.*for inference"


def test_training_is_refused(kind, base, adapter):
    folder, _ = adapter()
    model = base(kind)
    names, seed = [n for n, _ in model.named_modules()], logits(model, "bert")
    with pytest.raises(ValueError, match=REFUSED):
        get_peft_model(model, DSTConfig(epsilon=0.1))
    with pytest.raises(ValueError, match=REFUSED):
        get_peft_model(model, DSTConfig(epsilon=0.1, inference_mode=True))
    with pytest.raises(ValueError, match=REFUSED):
        PeftModel.from_pretrained(model, folder, is_trainable=True)
    assert [n for n, _ in model.named_modules()] == names
    assert torch.equal(logits(model, "bert"), seed)
    served = serve(model, folder)
    with pytest.raises(ValueError, match="adapter 'default' has values for quantised weights, which cannot be trained"):
        served.set_requires_grad("default")
    with pytest.raises(ValueError, match=REFUSED):
        served.load_adapter(folder, "other", is_trainable=True)
    with pytest.raises(ValueError, match=REFUSED):
        served.add_adapter("other", DSTConfig(epsilon=0.1))


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


def test_merging_is_refused(base, adapter):
    folder, _ = adapter()
    model = serve(base("stand-in"), folder)
    before = logits(model, "bert")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"weight' is quantised.*Merge into the base model in float32"):
            merge()
    assert torch.equal(logits(model, "bert"), before)


class Unknown(StandIn):
    __module__ = "elsewhere"


def test_other_quantised_parameters_are_refused(base, adapter):
    folder, _ = adapter()
    model = base()
    embedding = model.bert.embeddings.word_embeddings
    embedding.weight = nn.Parameter(embedding.weight.detach().as_subclass(StandIn), requires_grad=False)
    with pytest.raises(ValueError, match=r"word_embeddings.weight' is .*Nor is it the weight of a linear layer"):
        PeftModel.from_pretrained(model, folder)
    model = base()
    dense = model.bert.pooler.dense
    dense.weight = nn.Parameter(dense.weight.detach().as_subclass(Unknown), requires_grad=False)
    with pytest.raises(ValueError, match=r"pooler.dense.weight' is .*Nor is it the weight"):
        PeftModel.from_pretrained(model, folder)


def test_a_quantised_head_that_was_tied_is_refused(base, adapter):
    folder, _ = adapter("gpt2")
    model = base("stand-in", "gpt2")
    model.lm_head.weight = stand_in(model.lm_head.weight)
    with pytest.raises(ValueError, match=r"'lm_head.weight' is .* one parameter with another module's"):
        PeftModel.from_pretrained(model, folder)


def test_a_quantised_dense_copy_is_refused(base, adapter):
    folder, _ = adapter(modules_to_save=HEAD)
    model = base("stand-in")
    model.classifier.weight = stand_in(model.classifier.weight)
    with pytest.raises(
        ValueError, match=r"'classifier' is quantised, but the adapter keeps a dense copy.*skip_modules"
    ):
        PeftModel.from_pretrained(model, folder)


def test_through_transformers_own_loader(kind, base, adapter):
    folder, _ = adapter()
    expected = logits(serve(base(kind), folder), "bert")
    model = base(kind)
    with pytest.warns(UserWarning, match="quantised here"):
        model.load_adapter(folder)
    torch.testing.assert_close(logits(model, "bert"), expected, rtol=0, atol=2e-2 if kind == "4-bit" else 0)
    model.disable_adapters()
    assert torch.equal(logits(model, "bert"), logits(base(kind), "bert"))


def first_layer(model, folder):
    """The first quantised layer, and its matrix with the tuned values."""
    name, layer = next(iter(quantised_layers(model.get_base_model()).items()))
    tuned = dequantize_module_weight(layer).float().clone()
    indices, values = SparseDelta.load(folder)[f"{name}.weight"].record()
    tuned.view(-1)[indices.long()] = values
    return layer, tuned


def test_gradients_pass_through(kind, base, adapter):
    folder, _ = adapter()
    model = serve(base(kind), folder)
    layer, tuned = first_layer(model, folder)
    x = torch.randn(6, layer.in_features, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad(functional.linear(x, tuned, layer.bias).square().sum(), x)
    assert expected.abs().mean() > 0.05
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-2 if kind == "8-bit" else 1e-4)


def test_other_dtypes_and_ways_to_call(base, adapter):
    folder, _ = adapter()
    layer, tuned = first_layer(serve(base("stand-in"), folder), folder)
    x = torch.randn(6, layer.in_features)
    torch.testing.assert_close(layer(input=x), functional.linear(x, tuned, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), functional.linear(x, tuned, layer.bias), rtol=0.02, atol=0.02)
    # A layer's output need not be contiguous.
    assert torch.equal(layer(x[None].expand(2, -1, -1))[0], layer(x))


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


def test_other_quantised_weights_under_the_adapter(base, adapter):
    """New weights are loaded over the base's: the values stand over those."""
    folder, _ = adapter()
    model = serve(base("stand-in"), folder)
    name, layer = next(iter(quantised_layers(model.get_base_model()).items()))
    new = stand_in(torch.randn(layer.weight.shape))
    state = {"weight": new.data}
    layer.load_state_dict(state, strict=False, assign=True)
    layer.weight.requires_grad_(False)
    tuned = new.dequantize()
    indices, values = SparseDelta.load(folder)[f"{name}.weight"].record()
    tuned.view(-1)[indices.long()] = values
    x = torch.randn(6, layer.in_features)
    torch.testing.assert_close(layer(x), functional.linear(x, tuned, layer.bias))


def test_counts_are_those_of_the_seed(kind, base, adapter):
    folder, _ = adapter()
    model = serve(base(kind), folder)
    size = sum(p.numel() for p in base().parameters())
    assert model.constraint().budget == round(0.05 * size)
    assert model.get_nb_trainable_parameters() == (0, size)


@layers_of_both
def test_several_adapters_in_one_batch(kind, name, base, adapter):
    folders = {label: adapter(name, label=label, first=10 * i)[0] for i, label in enumerate("ab")}
    with pytest.warns(UserWarning, match="are quantised here"):
        model = PeftModel.from_pretrained(base(kind, name), folders["a"], "a").eval()
    with pytest.warns(UserWarning, match="are quantised here"):
        model.load_adapter(folders["b"], "b")
    inputs = batch(name)
    inputs.pop("labels", None)
    names = ["a", "__base__", "b", "a"]
    inputs = {key: tensor[:1].expand(4, *tensor.shape[1:]).contiguous() for key, tensor in inputs.items()}
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
        for label in "ab":
            model.set_adapter(label)
            rows = [row for row, own in enumerate(names) if own == label]
            torch.testing.assert_close(mixed[rows], model(**inputs).logits[rows], rtol=1e-3, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(mixed[1], model(**inputs).logits[1], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(mixed[0], mixed[1], rtol=1e-2)


class OwnForward(nn.Linear):
    """As the classes of bitsandbytes have it."""

    def forward(self, hidden):
        return functional.linear(hidden, self.weight, self.bias)


def test_a_mixed_batch_in_which_an_adapter_changes_but_a_bias(base, adapter, tmp_path):
    """Nothing can be written into the quantised weight for the others' sake."""
    folder, _ = adapter()
    biases = DSTConfig(target_parameters=["query.bias"], epsilon=0.5, init_weights=False)
    get_peft_model(base(), biases).save_pretrained(tmp_path / "b")
    model = base("stand-in")
    for name, module in model.named_modules():
        if name.endswith("query"):
            module.__class__ = OwnForward
    with pytest.warns(UserWarning, match="are quantised here"):
        model = PeftModel.from_pretrained(model, folder, "a").eval()
    model.load_adapter(tmp_path / "b", "b")
    inputs = {key: tensor[:2] for key, tensor in batch("bert").items() if key != "labels"}
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["a", "b"]).logits
        for row, label in enumerate("ab"):
            model.set_adapter(label, inference_mode=True)
            torch.testing.assert_close(mixed[row], model(**inputs).logits[row])
        with model.disable_adapter():
            assert not torch.allclose(mixed[1], model(**inputs).logits[1])


def test_hot_swapping(base, adapter, tmp_path):
    folders = {label: adapter(label=label, first=10 * i)[0] for i, label in enumerate("ab")}
    model = serve(base("stand-in"), folders["a"])
    hotswap_adapter(model, folders["b"], "default")
    assert torch.equal(logits(model, "bert"), logits(serve(base("stand-in"), folders["b"]), "bert"))
    model.save_pretrained(tmp_path / "again")
    assert_same(*(load_file(f / "adapter_model.safetensors") for f in (folders["b"], tmp_path / "again")))
    assert len({(f / "adapter_config.json").read_text() for f in (folders["b"], tmp_path / "again")}) == 1
