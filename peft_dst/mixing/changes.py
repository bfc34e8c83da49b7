"""What a subset changes, module by module: which modules read its parameters, and how their outputs are corrected."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

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


#: PEFT's name for samples that no subset is for.
BASE = "__base__"
# Methods that make one bias for a whole batch from a table of relative positions, which is their module's child.
_BIAS_METHODS = ("compute_bias", "compute_position_bias")


class Reader(NamedTuple):
    """A module that is called, and reads parameters: its own, or a child's."""

    name: str
    module: nn.Module
    method: str = "forward"

    def __str__(self) -> str:
        return f"{self.name!r} ({type(self.module).__name__})"


class Readers:
    """Who reads which parameter of a model.

    Args:
        model: any module; its structure must stay as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self._owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
        # By the id of a child: whom to watch in its place.
        self._callers: dict[int, Reader] = {}
        for name, module in self.modules.items():
            for attribute, tensor in module._parameters.items():
                self._owners.setdefault(id(tensor), []).append((name, module, attribute))
            self._note_callers(name, module)

    def of(self, parameter: nn.Parameter) -> list[tuple[Reader, nn.Module, str]]:
        """Its readers, each with the module that has it, and its name there."""
        return [
            (self._callers.get(id(module)) or Reader(name, module), module, attribute)
            for name, module, attribute in self._owners[id(parameter)]
        ]

    def _note_callers(self, name: str, module: nn.Module) -> None:
        """Note modules that read a child's parameters, or use it for all samples at once."""
        if isinstance(module, nn.MultiheadAttention):
            self._callers[id(module.out_proj)] = self._callers[id(module)] = Reader(name, module)
        for method in _BIAS_METHODS:
            if hasattr(module, method):
                reader = Reader(name, module, method)
                self._callers |= {id(child): reader for child in module.children() if isinstance(child, nn.Embedding)}


class Patch(NamedTuple):
    """A subset's entries in one parameter, whose live weight (`data`) is the seed."""

    module: nn.Module
    attribute: str
    data: Tensor
    indices: Tensor
    values: Tensor
    seeds: Tensor


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


class Whole(NamedTuple):
    """A tensor that takes the place of a parameter for a subset's samples."""

    parameter: nn.Parameter
    tensor: Tensor


@dataclass(eq=False)
class Changes:
    """What one subset changes of the parameters that one module reads.

    Attributes:
        patches: entries.
        wholes: whole tensors.
        correction: how the module's output with the seed is corrected; None if it runs with the values written in.
    """

    patches: list[Patch] = field(default_factory=list)
    wholes: list[Whole] = field(default_factory=list)
    correction: Correction | None = None

    def parameters(self) -> Iterator[nn.Parameter | None]:
        """The parameters that are changed."""
        yield from (patch.module._parameters[patch.attribute] for patch in self.patches)
        yield from (whole.parameter for whole in self.wholes)

    @property
    def nbytes(self) -> int:
        """Bytes of what was made for it; values, seeds and whole tensors are somebody else's."""
        return sum(patch.indices.nbytes for patch in self.patches) + (self.correction.nbytes if self.correction else 0)


def changes_of(readers: Readers, entries: Iterable[Entries], wholes: Sequence[Whole] = ()) -> dict[Reader, Changes]:
    """What a subset changes, by the modules that read it.

    Args:
        readers: of the model.
        entries: of the subset, for each parameter; none of them empty.
        wholes: whole tensors in the place of parameters.
    """
    found: dict[Reader, Changes] = {}
    quantised: dict[Reader, bool] = {}
    for of_one in entries:
        for reader, module, attribute in readers.of(of_one.parameter):
            patch = Patch(module, attribute, *of_one[1:5])
            found.setdefault(reader, Changes()).patches.append(patch)
            if of_one.inputs_first is not None:
                quantised[reader] = of_one.inputs_first
    for whole in wholes:
        for reader, _, _ in readers.of(whole.parameter):
            found.setdefault(reader, Changes()).wholes.append(whole)
    for reader, of_reader in found.items():
        if not of_reader.wholes:
            of_reader.correction = _correction(reader, of_reader.patches, quantised.get(reader))
    return found


# Corrections of outputs. Each kind is arranged for some subsets of one module, and then stacked for the groups of a batch.


@dataclass(frozen=True)
class Linear:
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

    def correct(self, output: Tensor, input: Tensor) -> None:
        """Correct an output (rows, …, outputs), contiguous, of groups of as many rows each, in place."""
        if self.weights is not None:
            correct_stacked(output, input, self.weights)
        if self.biases is not None and output.numel():
            (groups, outputs), differences = self.biases
            by_group = output.view(self.groups, -1, output.shape[-1]).transpose(1, 2)
            added = differences.to(output.dtype)[:, None].expand(-1, by_group.shape[2])
            by_group.index_put_((groups, outputs), added, accumulate=True)


@dataclass(frozen=True)
class Embedding:
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

    def correct(self, output: Tensor, input: Tensor) -> None:
        """As of `StackedLinear`; the input are tokens, integers (rows, …)."""
        if self.entries is not None:
            tokens = input.reshape(self.groups, -1)
            first = self.rows * torch.arange(self.groups, device=tokens.device)[:, None]
            correct_embedding(output, tokens + first, self.entries)


@dataclass(frozen=True)
class Norm:
    """Of one of torch's own norms over a vector: its entries."""

    patches: Sequence[Patch]
    nbytes = 0

    @staticmethod
    def arrange(corrections: Mapping[str, Norm], module: Any) -> Arrangement:
        """The live weights must be the seed."""
        tuned = {name: _tuned(module, one.patches) for name, one in corrections.items()}

        def stack(groups: Sequence[str]) -> StackedNorm | None:
            found = [(group, *tuned[name]) for group, name in enumerate(groups) if name in tuned]
            if not found:
                return None
            places = torch.cat([torch.stack([torch.full_like(at, group), at]) for group, at, *_ in found], 1)
            biases = [bias for *_, bias in found if bias is not None]
            weight = torch.cat([weight for *_, weight, _ in found])
            return StackedNorm(len(groups), module, places, weight, torch.cat(biases) if biases else None)

        return stack


def _tuned(module: nn.Module, patches: Sequence[Patch]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where a norm is changed, int64 (m,), and its weight and bias there, in float32 or float64."""
    positions = torch.cat([patch.indices for patch in patches]).unique()
    found: dict[str, Tensor] = {}
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            values = parameter.detach()[positions]
            for patch in patches:
                if patch.attribute == attribute:
                    values[torch.searchsorted(positions, patch.indices)] = patch.values
            found[attribute] = values.to(wide_dtype(values))
    return positions, found["weight"], found.get("bias")


class StackedNorm(NamedTuple):
    """Of several groups of samples: groups and positions, int64 (2, m), and the weight and bias there, (m,).

    Attributes:
        moments: of a LayerNorm's input, mean and reciprocal standard deviation (rows, …, 1), if they are known.
    """

    groups: int
    module: nn.Module
    places: Tensor
    weight: Tensor
    bias: Tensor | None
    moments: tuple[Tensor, Tensor] | None = None

    def correct(self, output: Tensor, input: Tensor) -> None:
        """As of `StackedLinear`, for a norm's input (rows, …, size)."""
        if not output.numel():
            return
        group, position = self.places
        values = self._plain(input, group, position) * self.weight[:, None]
        if self.bias is not None:
            values += self.bias[:, None]
        self._by_group(output)[group, position] = values.to(output.dtype)

    def _by_group(self, tensor: Tensor) -> Tensor:
        """A tensor (rows, …, size) as (groups, size, rows of a group)."""
        return tensor.reshape(self.groups, -1, tensor.shape[-1]).transpose(1, 2)

    def _plain(self, input: Tensor, group: Tensor, position: Tensor) -> Tensor:
        """The norm without weight and bias at some positions of groups, (m, rows of a group)."""
        module: Any = self.module
        if self.moments is not None:
            mean, scale = (self._by_group(moment)[group, 0] for moment in self.moments)
            return (self._by_group(input)[group, position] - mean) * scale
        # As the kernels do: in float32 at least, and rounded once.
        plain = input.to(self.weight.dtype)
        if isinstance(module, nn.LayerNorm):
            plain = functional.layer_norm(plain, module.normalized_shape, eps=module.eps)
        else:
            eps = torch.finfo(input.dtype).eps if module.eps is None else module.eps
            plain = functional.rms_norm(plain, module.normalized_shape, eps=eps)
        return self._by_group(plain)[group, position]


Correction = Linear | Embedding | Norm
Stacked = StackedLinear | StackedEmbedding | StackedNorm
# From the subset of each group to what corrects them; None if nothing is to be corrected.
Arrangement = Callable[[Sequence[str]], Stacked | None]


def _correction(reader: Reader, patches: Sequence[Patch], inputs_first: bool | None) -> Correction | None:
    if reader.method != "forward":
        return None
    forward = type(reader.module).forward
    if inputs_first is not None:
        return _linear(patches, inputs_first)
    # Where transformers is not imported, no module is a Conv1D of its.
    transposed = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if forward is nn.Linear.forward or (transposed and forward is transposed.forward):
        return _linear(patches, forward is not nn.Linear.forward)
    if forward is nn.Embedding.forward and reader.module.max_norm is None:
        (patch,) = patches
        shape = cast(tuple[int, int], tuple(patch.data.shape))
        return Embedding(embedding_entries(patch.indices, patch.values, shape))
    if isinstance(reader.module, nn.LayerNorm | nn.RMSNorm) and forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return Norm(patches) if len(reader.module.normalized_shape) == 1 else None
    return None


def _linear(patches: Sequence[Patch], inputs_first: bool) -> Linear:
    weight = bias = None
    for patch in patches:
        if patch.attribute == "weight":
            shape = cast(tuple[int, int], tuple(patch.data.shape))
            weight = linear_difference(patch.indices, patch.values, patch.seeds, shape, inputs_first)
        else:
            wide = wide_dtype(patch.values)
            bias = patch.indices, patch.values.to(wide) - patch.seeds.to(wide)
    return Linear(weight, bias)
