"""Saved adapters over quantised weights, which cannot be edited: what the values change is added to the layer's output.

The layer computes with its quantised weight as before; a forward hook adds the input's product with the sparse difference
between the adapter's values and what the quantised weight stands for at their positions. So those entries are the tuned
values themselves, not rounded to the quantised grid, and all others are the quantised seed's. For inference only: to train
is to edit weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..core import SparseWeight, gather
from ..core.correction import LinearDifference, correct_linear, linear_difference
from ..delta import DTYPES, Record, Summary, digest


_EDITABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Of a matrix's components one in so many is remembered as it was read, 12 bytes each.
_KNOWN = 16


def can_edit(parameter: nn.Parameter) -> bool:
    """Whether a parameter's values can be edited in place: they are floating numbers, and not packed or scaled."""
    data = parameter.data
    return data.dtype in _EDITABLE and type(data) in (Tensor, DTensor)


def can_overlay(host: nn.Module, parameter: str) -> bool:
    """Whether a quantised parameter is a linear layer's matrix in a form that can be read, bitsandbytes' or torchao's."""
    weight = getattr(host, parameter, None)
    known = get_bnb_param_type(weight) or type(weight).__module__.startswith("torchao.")
    return parameter == "weight" and isinstance(host, nn.Linear) and bool(known)


def stored_inputs_first(host: nn.Module) -> bool:
    """Whether the seed's matrix was stored as (inputs, outputs): transformers puts quantised linear layers in the place of
    its Conv1D too, and transposes its weight.
    """
    return issubclass(getattr(host, "source_cls", nn.Linear), Conv1D)


def original_shape(host: nn.Linear) -> tuple[int, int]:
    """The shape that a layer's weight had before it was quantised."""
    shape = (host.out_features, host.in_features)
    return shape[::-1] if stored_inputs_first(host) else shape


def sparse_weight(host: nn.Module, parameter: str, name: str) -> SparseWeight:
    """What stands for a parameter in the marker of its host."""
    return (SparseWeight if can_edit(getattr(host, parameter)) else OverlayWeight)(host, parameter, name)


class OverlayWeight(SparseWeight):
    """A quantised weight of a linear layer and the values that an adapter has for some of its entries.

    Applying values edits nothing, so no entry ever differs from the seed, which is the quantised weight.

    Attributes:
        inputs_first: whether the seed's matrix was stored as (inputs, outputs).
        summaries: of each adapter's record as it was loaded, adapter → Summary. It names the seed that the adapter was
            trained from, which is not to be had here, and is written again when the adapter is saved.
    """

    def __init__(self, module: nn.Module, attribute: str, name: str):
        self.inputs_first = stored_inputs_first(module)
        self._difference: LinearDifference | None = None
        self._hook: Any = None
        self.summaries: dict[str, Summary] = {}
        # What was read of the matrix so far: sorted flat positions, and what stood there.
        self._known = torch.empty(0, dtype=torch.int64, device="cpu")
        self._read = torch.empty(0, device="cpu")
        super().__init__(module, attribute, name)

    @property
    def data(self) -> Tensor:
        """A stand-in with the shape that the seed had before it was quantised, in float32, on its device; no values."""
        return torch.empty((), device=self.parameter.device).expand(original_shape(cast(nn.Linear, self.module)))

    @property
    def shape(self) -> torch.Size:
        """Of the seed before it was quantised."""
        return self.data.shape

    def seeds_at(self, indices: Tensor) -> Tensor:
        """What the quantised weight stands for at any flat positions (k,) int64, float32 (k,).

        Where that was not read before the matrix is dequantised, and let go of.
        """
        self._known, self._read = self._known.to(indices.device), self._read.to(indices.device)
        if not torch.isin(indices, self._known).all():
            matrix = _dequantised(cast(nn.Linear, self.module))
            known = torch.cat([self._known, indices]).unique()
            # Adapters come and go, and what was read for them would stay.
            self._known = known if len(known) <= self.shape.numel() // _KNOWN else indices.unique()
            self._read = gather(matrix.t() if self.inputs_first else matrix, self._known).float()
        return self._read[torch.searchsorted(self._known, indices)]

    def forget(self) -> None:
        """Take the quantised weight, which was replaced, as the seed."""
        super().forget()
        self._known, self._read = self._known.new_empty(0), self._read.new_empty(0)

    def apply(self, indices: Tensor, values: Tensor) -> None:
        """Have the layer compute as if `values` (k,) stood at `indices` (k,) int64, sorted."""
        self.revert()
        shape = cast(tuple[int, int], tuple(self.data.shape))
        indices, values = indices.to(self.data.device), values.to(self.data)
        self._difference = linear_difference(indices, values, self.seeds_at(indices), shape, self.inputs_first)
        self._hook = self.module.register_forward_hook(self._correct, with_kwargs=True)

    def revert(self) -> None:
        """Have the layer compute with the seed again."""
        if self._hook is not None:
            self._hook.remove()
        self._difference = self._hook = None

    def _correct(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], output: Tensor
    ) -> Tensor:
        input = args[0] if args else next(iter(kwargs.values()))
        assert self._difference is not None
        if self._difference.inputs.device != input.device:
            self._difference = LinearDifference(*(part.to(input.device) for part in self._difference))
        output = output.contiguous()
        correct_linear(output, input, self._difference)
        return output

    def original(self, adapter: str, record: Record) -> tuple[Record, Summary]:
        """A record as it was loaded, in the dtype it was saved in, and its summary.

        Raises:
            ValueError: if it is another one by now, which nobody has summarised.
        """
        summary = self.summaries.get(adapter)
        if summary is not None:
            record = Record(record.indices, record.values.to(DTYPES[summary.dtype]))
        if summary is None or digest(record) != summary.digest:
            raise ValueError(
                f"{self.name!r} is quantised, and the adapter {adapter!r} has other entries for it than its config "
                "described when it was loaded, if it did. Of which seed they are nobody has said, so they cannot be saved. "
                "Load the adapter from its folder, with PeftModel.from_pretrained or load_adapter."
            )
        return record, summary


def _dequantised(host: nn.Linear) -> Tensor:
    """What a quantised weight stands for, floating (outputs, inputs)."""
    weight: Any = host.weight
    kind = get_bnb_param_type(weight)
    if not kind:
        return weight.dequantize()
    if kind == "4bit" and getattr(weight.quant_state, "packing_format_for_cpu", False):
        # bitsandbytes has laid the matrix out for its CPU kernel, which alone can read it now: as its product with one.
        one = torch.eye(host.in_features, device=weight.device)
        return importlib.import_module("bitsandbytes").matmul_4bit(one, weight.data, weight.quant_state).t()
    return dequantize_bnb_weight(weight, getattr(host, "state", None))
