"""What quantised layers compute with adapters that were trained on float32 weights."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.nn import functional

from peft_dst import DSTConfig
from peft_dst.delta import SparseDelta
from tests.models import batch, logits
from tests.quantised.bases import KINDS, add, quantised_layers, serve, stand_in


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
    torch.testing.assert_close(layer(x[None].expand(2, -1, -1))[0], layer(x))


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
