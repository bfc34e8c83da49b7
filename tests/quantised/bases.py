"""Bases with quantised weights, and adapters on them."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


HEAD = ["classifier"]
UNQUANTISED = [*HEAD, "lm_head"]
KINDS = ("stand-in", "torchao", "8-bit", "4-bit")


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
