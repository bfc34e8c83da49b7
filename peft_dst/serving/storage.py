"""A model's parameters as views of one buffer for each dtype and device.

A delta has entries in a hundred tensors; writing them tensor by tensor costs a hundred calls, whatever the number of
entries. In one buffer it is a single one.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


# Parameters start at multiples of so many bytes, as torch's allocators have them.
ALIGNMENT = 64
# Bytes of a huge page.
HUGE = 2**21


@dataclass(frozen=True)
class Place:
    """Where a parameter is: number of its buffer, first position in it, and its shape."""

    buffer: int
    start: int
    shape: torch.Size


class FlatStorage:
    """The floating parameters of a model, moved into buffers.

    Values, shapes, names and ties stay as they are. Memory: while a buffer is filled, a copy of the parameters that go
    into it. A parameter that is not contiguous (channels_last) becomes so. Moving or casting the model afterwards
    (`model.to`) takes its parameters out of the buffers again, which `check` finds.

    Parameters of subclasses of `nn.Parameter` (quantised, sharded) and those without memory stay where they are.

    Args:
        model: any module; changed in place.

    Raises:
        ValueError: for a model that was made under torch.inference_mode, whose parameters cannot be written elsewhere; for
            one of which two parameters share memory. Nothing has been changed by then.

    Attributes:
        parameters: all of the model's, by each of their names; also those that stay where they are.
        owners: by each of these names the module that has the parameter, and what it is called there.
        buffers: one for each dtype and device, (n,).
        arrays: for each of them its bits over the same memory, as integers, if it is on the CPU. They keep that memory,
            whatever becomes of the tensors.
        places: where parameters are in them, by each of their names.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        if made := next((name for name, parameter in self.parameters.items() if parameter.is_inference()), None):
            raise ValueError(
                f"{made} was made under torch.inference_mode, and can only be written there. Make the model outside."
            )
        paths = ((name, *name.rpartition(".")[::2]) for name in self.parameters)
        self.owners = {name: (model.get_submodule(path), attribute) for name, path, attribute in paths}
        self.buffers: list[Tensor] = []
        self.arrays: list[np.ndarray | None] = []
        self.places: dict[str, Place] = {}
        names: dict[int, list[str]] = {}
        owners: dict[int, nn.Parameter] = {}
        for name, parameter in self.parameters.items():
            if type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta:
                names.setdefault(id(parameter), []).append(name)
                owners[id(parameter)] = parameter
        _check_apart({names[key][0]: parameter for key, parameter in owners.items()})
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for key, parameter in owners.items():
            kinds.setdefault((parameter.dtype, parameter.device), []).append(key)
        for (dtype, device), members in kinds.items():
            step = max(1, ALIGNMENT // dtype.itemsize)
            starts, end = [], 0
            for key in members:
                starts.append(end)
                end += -(-owners[key].numel() // step) * step
            with torch.inference_mode(False):
                if device.type == "cpu":
                    memory = _memory(end * dtype.itemsize)
                    buffer, array = torch.from_numpy(memory).view(dtype), memory.view(f"i{dtype.itemsize}")
                else:
                    buffer, array = torch.zeros(end, dtype=dtype, device=device), None
            for key, start in zip(members, starts, strict=True):
                parameter = owners[key]
                view = buffer[start : start + parameter.numel()].view(parameter.shape)
                view.copy_(parameter)
                parameter.data = view
                for name in names[key]:
                    self.places[name] = Place(len(self.buffers), start, parameter.shape)
            self.buffers.append(buffer)
            self.arrays.append(array)
        self._watched = [(name, *self.owners[name], self._pointer(place)) for name, place in self.places.items()]
        self._looked = 0

    def _pointer(self, place: Place) -> int:
        buffer = self.buffers[place.buffer]
        return buffer.data_ptr() + place.start * buffer.element_size()

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def split(self, buffer: int, positions: Tensor) -> Iterator[tuple[nn.Parameter, Tensor, slice, int]]:
        """Part positions in a buffer by parameters.

        Args:
            buffer: its number.
            positions: ascending, int64 (k,).

        Yields:
            A parameter that has some of them; its place in the buffer, whatever stands in for it at the moment; which of
            the positions those are; and what to subtract from them.
        """
        # Tied parameters have one place.
        found = {place.start: (name, place) for name, place in self.places.items() if place.buffer == buffer}
        starts = sorted(found)
        ends = torch.searchsorted(
            positions, torch.tensor([*starts[1:], len(self.buffers[buffer])], device=positions.device)
        )
        begin = 0
        for start, end in zip(starts, ends.tolist(), strict=True):
            if end > begin:
                name, place = found[start]
                yield self.parameters[name], self._view(place), slice(begin, end), start
            begin = end

    def weights(self) -> dict[str, Tensor]:
        """Every parameter's place in the buffers, by each of its names, whatever stands in for it at the moment."""
        return {name: self._view(place) for name, place in self.places.items()}

    def _view(self, place: Place) -> Tensor:
        return self.buffers[place.buffer][place.start : place.start + place.shape.numel()].view(place.shape)

    def replace(self, name: str, parameter: nn.Parameter) -> None:
        """Put a parameter in the place of one of the model's, under this name only: what it is tied to stays."""
        module, attribute = self.owners[name]
        module._parameters[attribute] = parameter

    def check(self, replaced: Collection[str] = ()) -> None:
        """Check that the model still computes with these buffers.

        One parameter is looked at in each call, the next one in the next: a model is moved or cast as a whole, and to look
        at all of them would take longer than a switch.

        Args:
            replaced: names of parameters that a delta's whole tensors stand in for at the moment.

        Raises:
            RuntimeError: if another parameter was moved, cast or replaced.
        """
        if not self._watched:
            return
        name, module, attribute, pointer = self._watched[self._looked]
        self._looked = (self._looked + 1) % len(self._watched)
        parameter = module._parameters.get(attribute)
        # What was pruned or parametrised is no parameter any more.
        there = parameter is not None and (parameter.data_ptr() == pointer or not parameter.numel())
        if not there and name not in replaced:
            raise RuntimeError(
                f"{name} was moved, cast or replaced since the pool was made, so that deltas would be written into "
                "weights nobody uses. Move and cast the model first, then make the pool."
            )


def _memory(nbytes: int) -> np.ndarray:
    """Zeros, uint8 (nbytes,), in huge pages where the system has them.

    What is written in a switch is spread over all of the memory: in pages of 4 KiB, nearly each entry is in one of its own,
    whose address has to be looked up.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or nbytes < HUGE:
        return np.zeros(nbytes, dtype=np.uint8)
    # Zeros, as the system gives them; before the first of them is touched.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def _check_apart(parameters: Mapping[str, nn.Parameter]) -> None:
    """Check that no two parameters share memory: in the buffers they would be two, and what is written into one would not
    reach the other.

    Raises:
        ValueError: if two do.
    """
    spans = []
    for name, parameter in parameters.items():
        last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
        begin = parameter.data_ptr()
        if parameter.numel():
            spans.append((str(parameter.device), begin, begin + (last + 1) * parameter.element_size(), name))
    spans.sort(key=operator.itemgetter(0, 1))
    for (device, _, end, one), (there, begin, _, other) in itertools.pairwise(spans):
        if device == there and begin < end:
            raise ValueError(
                f"{one!r} and {other!r} share memory without being one parameter, so a delta on one would not reach the "
                "other. Tie them by giving both modules one parameter (transformers' models: model.tie_weights()), or part "
                "them: parameter.data = parameter.data.clone()."
            )
