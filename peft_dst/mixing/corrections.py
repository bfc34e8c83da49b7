"""Corrections of outputs: what a subset's entries change in what a module returns that has run with the seed.

A kind of correction is made of one subset's entries, arranged for some subsets of one module, and then stacked for the
groups of a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.correction import (
    EmbeddingEntries,
    LinearDifference,
    correct_embedding,
    embedding_entries,
    linear_difference,
)
from ..core.distances import wide_dtype
from ..core.stacking import DifferenceTable, StackedDifference, correct_stacked, stack_entries


class Entries(NamedTuple):
    """What a subset has for one parameter.

    Attributes:
        parameter: the parameter.
        data: its live weight; of a quantised one something of its original shape, dtype and device.
        indices: sorted flat positions, int64 (k,).
        values: new values, (k,).
        seeds: the seed's, (k,).
        inputs_first: of a quantised linear layer, whether its matrix was stored as (inputs, outputs); else None.
    """

    parameter: nn.Parameter
    data: Tensor
    indices: Tensor
    values: Tensor
    seeds: Tensor
    inputs_first: bool | None = None


class Stacked(Protocol):
    """Corrections of several groups of samples."""

    def correct(self, output: Tensor, input: Tensor, *more: Tensor) -> None:
        """Correct a module's output in place. The groups have as many rows each, one after the other.

        Args:
            output: what it has returned with the seed, floating (rows, …, outputs), contiguous.
            input: what it was given, (rows, …).
            more: what else `Correction.call` has returned.
        """


# From the subset of each group to what corrects them; None if nothing is to be corrected.
Arrangement = Callable[[Sequence[str]], Stacked | None]


class Correction:
    """Of what a module returns, for one subset."""

    @property
    def nbytes(self) -> int:
        """Bytes of what was made for it."""
        return 0

    @staticmethod
    def call(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Call a module's forward: its output, and whatever is of use to `Stacked.correct`."""
        return (forward(*args, **kwargs),)

    @staticmethod
    def arrange(corrections: Mapping[str, Any], module: Any) -> Arrangement:
        """Prepare the corrections of some subsets, by their names, for any batch. The live weights must be the seed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Correction):
    """Of a linear layer: its weight's difference, and positions and differences of its bias."""

    weight: LinearDifference | None
    bias: tuple[Tensor, Tensor] | None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*(self.weight or ()), *(self.bias or ())))

    @staticmethod
    def arrange(corrections: Mapping[str, Linear], module: Any) -> Arrangement:
        # transformers' Conv1D calls them nf.
        width = int(module.out_features if hasattr(module, "out_features") else module.nf)
        weights: dict[Any, LinearDifference] = {name: one.weight for name, one in corrections.items() if one.weight}
        table = DifferenceTable(weights, width) if weights else None
        biases = {name: one.bias for name, one in corrections.items() if one.bias}

        def stack(groups: Sequence[str]) -> StackedLinear:
            found = [(group, *biases[name]) for group, name in enumerate(groups) if name in biases]
            places = [torch.stack([torch.full_like(indices, group), indices]) for group, indices, _ in found]
            bias = (torch.cat(places, 1), torch.cat([differences for *_, differences in found])) if found else None
            return StackedLinear(len(groups), table.of(groups) if table else None, bias)

        return stack


class StackedLinear(NamedTuple):
    """Of several groups of samples: see `StackedDifference`; of biases group and output, int64 (2, m), and differences."""

    groups: int
    weights: StackedDifference | None
    biases: tuple[Tensor, Tensor] | None

    def correct(self, output: Tensor, input: Tensor, *_: Tensor) -> None:
        if self.weights is not None:
            correct_stacked(output, input, self.weights)
        if self.biases is not None and output.numel():
            (groups, outputs), differences = self.biases
            by_group = output.view(self.groups, -1, output.shape[-1]).transpose(1, 2)
            added = differences.to(output.dtype)[:, None].expand(-1, by_group.shape[2])
            by_group.index_put_((groups, outputs), added, accumulate=True)


@dataclass(frozen=True)
class Embedding(Correction):
    """Of an embedding: its new values."""

    entries: EmbeddingEntries

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.entries)

    @staticmethod
    def arrange(corrections: Mapping[str, Embedding], module: Any) -> Arrangement:
        rows = module.weight.shape[0]

        def stack(groups: Sequence[str]) -> StackedEmbedding:
            found = [corrections.get(name) for name in groups]
            return StackedEmbedding(
                len(groups), rows, stack_entries([one.entries if one else None for one in found], rows)
            )

        return stack


class StackedEmbedding(NamedTuple):
    """Of several groups of samples, each with a table of so many rows."""

    groups: int
    rows: int
    entries: EmbeddingEntries | None

    def correct(self, output: Tensor, input: Tensor, *_: Tensor) -> None:
        """The input are tokens, integers (rows, …)."""
        if self.entries is not None:
            tokens = input.reshape(self.groups, -1)
            first = self.rows * torch.arange(self.groups, device=tokens.device)[:, None]
            correct_embedding(output, tokens + first, self.entries)


@dataclass(frozen=True)
class Norm(Correction):
    """Of one of torch's own norms over a vector: its entries, by parameter."""

    entries: Mapping[str, Entries]

    @staticmethod
    def call(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """With mean and reciprocal standard deviation (rows, …, 1) of a LayerNorm's input, as its kernel has them."""
        if getattr(forward, "__func__", None) is not nn.LayerNorm.forward:
            return (forward(*args, **kwargs),)
        return _layer_norm_with_moments(cast(Any, forward).__self__, *args, **kwargs)

    @staticmethod
    def arrange(corrections: Mapping[str, Norm], module: Any) -> Arrangement:
        tuned = {name: _tuned(module, one.entries) for name, one in corrections.items()}

        def stack(groups: Sequence[str]) -> StackedNorm | None:
            found = [(group, *tuned[name]) for group, name in enumerate(groups) if name in tuned]
            if not found:
                return None
            places = torch.cat([torch.stack([torch.full_like(at, group), at]) for group, at, *_ in found], 1)
            biases = [bias for *_, bias in found if bias is not None]
            weight = torch.cat([weight for *_, weight, _ in found])
            return StackedNorm(len(groups), module, places, weight, torch.cat(biases) if biases else None)

        return stack


def _layer_norm_with_moments(module: nn.LayerNorm, input: Tensor) -> tuple[Tensor, ...]:
    """What the module's own forward computes; with the moments, if they are not rounded to few bits."""
    weight = module.weight
    # The guard need not see what is looked at.
    with torch._C.DisableTorchFunction():
        wide = weight.dtype in (torch.float32, torch.float64) and input.dtype == weight.dtype
        wide = wide and not torch.is_autocast_enabled(input.device.type)
    if not wide:
        return (functional.layer_norm(input, module.normalized_shape, weight, module.bias, module.eps),)
    return torch.native_layer_norm(input, module.normalized_shape, weight, module.bias, module.eps)


def _tuned(module: nn.Module, entries: Mapping[str, Entries]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where a norm is changed, int64 (m,), and its weight and bias there, in float32 or float64."""
    positions = torch.cat([of_one.indices for of_one in entries.values()]).unique()
    found: dict[str, Tensor] = {}
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            values = parameter.detach()[positions]
            if attribute in entries:
                values[torch.searchsorted(positions, entries[attribute].indices)] = entries[attribute].values
            found[attribute] = values.to(wide_dtype(values))
    return positions, found["weight"], found.get("bias")


class StackedNorm(NamedTuple):
    """Of several groups of samples: groups and positions, int64 (2, m), and the weight and bias there, (m,)."""

    groups: int
    module: Any
    places: Tensor
    weight: Tensor
    bias: Tensor | None

    def correct(self, output: Tensor, input: Tensor, *moments: Tensor) -> None:
        """The input is (rows, …, size); its moments are those of `Norm.call`, if they are known."""
        if not output.numel():
            return
        group, position = self.places
        if moments:
            # One row for all samples has one of each, too.
            mean, scale = (self._by_group(moment.expand(*input.shape[:-1], 1))[group, 0] for moment in moments)
            values = (self._by_group(input)[group, position] - mean) * scale
        else:
            values = self._by_group(self._plain(input))[group, position]
        values *= self.weight[:, None]
        if self.bias is not None:
            values += self.bias[:, None]
        self._by_group(output)[group, position] = values.to(output.dtype)

    def _by_group(self, tensor: Tensor) -> Tensor:
        """A tensor (rows, …, size) as (groups, size, rows of a group)."""
        return tensor.reshape(self.groups, -1, tensor.shape[-1]).transpose(1, 2)

    def _plain(self, input: Tensor) -> Tensor:
        """The norm without weight and bias. As the kernels do: in float32 at least, and rounded once."""
        module, plain = self.module, input.to(self.weight.dtype)
        if isinstance(module, nn.LayerNorm):
            return functional.layer_norm(plain, module.normalized_shape, eps=module.eps)
        eps = torch.finfo(input.dtype).eps if module.eps is None else module.eps
        return functional.rms_norm(plain, module.normalized_shape, eps=eps)


def correction_of(module: Any, entries: Mapping[str, Entries]) -> Correction | None:
    """How the output of a module is corrected; None if it must run with the values written in.

    Args:
        module: which reads its own parameters alone.
        entries: of one subset, by the names of those parameters; one at least.
    """
    forward = type(module).forward
    # Where transformers is not imported, no module is a Conv1D of its.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    quantised = [of_one.inputs_first for of_one in entries.values() if of_one.inputs_first is not None]
    if quantised:
        return _linear(entries, quantised[0])
    if forward is nn.Linear.forward:
        return _linear(entries, False)
    if conv1d is not None and forward is conv1d.forward:
        return _linear(entries, True)
    if forward is nn.Embedding.forward and module.max_norm is None:
        weight = entries["weight"]
        return Embedding(embedding_entries(weight.indices, weight.values, _matrix(weight)))
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) and len(module.normalized_shape) == 1:
        return Norm(entries)
    return None


def _linear(entries: Mapping[str, Entries], inputs_first: bool) -> Linear:
    weight = bias = None
    if (of_weight := entries.get("weight")) is not None:
        weight = linear_difference(
            of_weight.indices, of_weight.values, of_weight.seeds, _matrix(of_weight), inputs_first
        )
    if (of_bias := entries.get("bias")) is not None:
        wide = wide_dtype(of_bias.values)
        bias = of_bias.indices, of_bias.values.to(wide) - of_bias.seeds.to(wide)
    return Linear(weight, bias)


def _matrix(entries: Entries) -> tuple[int, int]:
    """The shape of a parameter of two dimensions."""
    rows, columns = entries.data.shape
    return rows, columns
