"""What a process holds of a weight that several hold together (DTensor: FSDP2, tensor parallelism), and where that lies.

A process holds a box of the whole tensor. Positions in it are flat positions in the box; positions that leave the process
(records, files) are flat positions in the whole tensor. Both run through the box in the same order, so what is sorted stays
sorted.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


@dataclass(frozen=True)
class Box:
    """A box of a tensor.

    Attributes:
        whole: shape of the tensor.
        start: where the box begins, in each of its dimensions.
        shape: of the box.
        stripes: in each dimension the number of equal parts that the tensor has there, of each of which the box has the
            same part: 1, or more where matrices were joined before they were divided.
        mesh: the processes that hold the tensor together; None if this one holds it alone.
        divided: along which dimensions of the mesh it is divided; along the others it is repeated.
    """

    whole: torch.Size
    start: tuple[int, ...]
    shape: torch.Size
    stripes: tuple[int, ...]
    mesh: DeviceMesh | None = None
    divided: tuple[int, ...] = ()

    def outwards(self, positions: Tensor) -> Tensor:
        """Flat positions in the whole tensor of flat positions in the box, both int64 (k,)."""
        if self.mesh is None:
            return positions
        if self._is_one_stretch:
            return positions + (self.start[0] * math.prod(self.whole[1:]) if self.start else 0)
        at = torch.unravel_index(positions, self.shape)
        own, period = self._of_a_stripe(self.shape), self._of_a_stripe(self.whole)
        return _ravel(
            [p // o * d + p % o + first for p, o, d, first in zip(at, own, period, self.start, strict=True)], self.whole
        )

    @property
    def _is_one_stretch(self) -> bool:
        return self.shape[1:] == self.whole[1:] and set(self.stripes) <= {1}

    def _of_a_stripe(self, shape: torch.Size) -> list[int]:
        # No position is asked for in an empty box, but there is no dividing by its length.
        return [max(length // count, 1) for length, count in zip(shape, self.stripes, strict=True)]

    def inwards(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some flat positions in the whole tensor, int64 (k,), lie in the box, and where there.

        Returns:
            A mask (k,), and flat positions in the box, int64 (m,).
        """
        if self._is_one_stretch:
            own = positions - (self.start[0] * math.prod(self.whole[1:]) if self.start else 0)
            inside = (own >= 0) & (own < self.shape.numel())
            return inside, own[inside]
        inside = torch.ones_like(positions, dtype=torch.bool)
        if not self.shape.numel():
            return ~inside, positions[~inside]
        length, period = self._of_a_stripe(self.shape), self._of_a_stripe(self.whole)
        at = []
        for i, place in enumerate(torch.unravel_index(positions, self.whole)):
            part = place % period[i] - self.start[i]
            inside &= (part >= 0) & (part < length[i])
            at.append(place // period[i] * length[i] + part)
        return inside, _ravel([part[inside] for part in at], self.shape)


def _ravel(at: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    flat = torch.zeros_like(at[0])
    for part, length in zip(at, shape, strict=True):
        flat = flat * length + part
    return flat


def box_of(parameter: Tensor) -> Box:
    """What this process holds of a parameter.

    Raises:
        NotImplementedError: if that is no box: a sum that is still to be made, or a division that torch does not document.
    """
    if not isinstance(parameter, DTensor):
        return Box(parameter.shape, (0,) * parameter.ndim, parameter.shape, (1,) * parameter.ndim)
    mesh, placements = parameter.device_mesh, parameter.placements
    coordinate = mesh.get_coordinate()
    start, shape = [0] * parameter.ndim, list(parameter.shape)
    # A strided shard is one of what the others leave: FSDP2 divides what tensor parallelism has divided before.
    order = sorted(range(mesh.ndim), key=lambda dimension: isinstance(placements[dimension], _StridedShard))
    divided: list[int] = []
    stripes = [1] * parameter.ndim
    for dimension in order:
        placement = placements[dimension]
        if isinstance(placement, Replicate):
            continue
        if type(placement) not in (Shard, _StridedShard) or coordinate is None:
            raise _unknown(placement, mesh)
        at = placement.dim % parameter.ndim
        count = mesh.size(dimension)
        before = math.prod(mesh.size(d) for d in divided if placements[d].dim % parameter.ndim == at)
        if isinstance(placement, _StridedShard) and placement.split_factor != before:
            # Matrices that were joined (gate and up of experts), each divided by itself.
            stripes[at] = placement.split_factor
            if before > 1 or shape[at] % (stripes[at] * count):
                raise _unknown(placement, mesh)
        elif stripes[at] > 1:
            raise _unknown(placement, mesh)
        length = -(-shape[at] // (stripes[at] * count))
        first = min(coordinate[dimension] * length, shape[at])
        start[at], shape[at] = start[at] + first, min(stripes[at] * length, shape[at] - first)
        divided.append(dimension)
    return Box(parameter.shape, tuple(start), torch.Size(shape), tuple(stripes), mesh, tuple(sorted(divided)))


def _unknown(placement: Placement, mesh: DeviceMesh) -> NotImplementedError:
    return NotImplementedError(
        f"a weight is placed as {placement} over {mesh}: only shards and replicas are supported. Divide the model "
        "with fully_shard (FSDP2) or transformers' tp_plan."
    )


def check_held_alone(parameters: Iterable[Tensor], what: str, remedy: str) -> None:
    """Check that this process holds all of some parameters.

    Args:
        parameters: the parameters.
        what: what needs that, for the message.
        remedy: what to do instead, a sentence.

    Raises:
        NotImplementedError: if several processes hold one together.
    """
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise NotImplementedError(
            f"{what} does not work on weights that are divided over processes (FSDP2, tensor parallelism). {remedy}"
        )


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; the tensor itself if that is all of it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def put_local(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Let a tensor of the same shape be what this process holds of a parameter."""
    if isinstance(parameter, DTensor):
        parameter._local_tensor = tensor
    else:
        parameter.data = tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of the shape of what this process holds of a parameter, divided as that is."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(
        tensor,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def divide_again(hosts: Collection[nn.Module]) -> None:
    """Have FSDP2 divide the weights of some modules again, which it may have left gathered after a forward pass."""
    from torch.distributed import _composable_state
    from torch.distributed.fsdp import FSDPModule

    # All modules that it was applied to: those that hold the hosts need not be in the model that we were given.
    for module in list(getattr(_composable_state, "_module_state_mapping", ())) if hosts else ():
        if isinstance(module, FSDPModule) and any(part in hosts for part in module.modules()):
            module.reshard()


@dataclass(frozen=True)
class Together:
    """The processes over which something is divided: those along some dimensions of a mesh.

    What is asked of them all has to be asked by each at the same moment.
    """

    mesh: DeviceMesh
    dimensions: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of processes."""
        return math.prod(self.mesh.size(dimension) for dimension in self.dimensions)

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of them, and of all others that hold the same."""
        coordinate = self.mesh.get_coordinate()
        return coordinate is not None and not any(coordinate)

    def counts(self, box: Box) -> bool:
        """Whether this process is the first of those that hold a box: what is summed over all has to be counted once."""
        coordinate = self.mesh.get_coordinate()
        assert coordinate is not None
        divided = _dimensions(box, self.mesh)
        return all(coordinate[dimension] == 0 for dimension in self.dimensions if dimension not in divided)

    @contextmanager
    def all_or_none(self, what: str) -> Iterator[None]:
        """Do something in all processes, and go on when it is done in all.

        Raises:
            RuntimeError: if it raised in another one.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            failed = self.any(failed)
        if failed:
            raise RuntimeError(f"{what} failed in another process, which says why.")

    def any(self, flag: bool) -> bool:
        """Whether something is so in any of them."""
        answer = self.reduce(torch.tensor(flag, dtype=torch.int32, device=self.mesh.device_type), dist.ReduceOp.MAX)
        return bool(answer)

    def reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """A tensor reduced over the processes. It may be done in place, so the argument is used up."""
        # Weights that are offloaded to the host are not.
        message = tensor.to(self.mesh.device_type)
        for dimension in self.dimensions:
            dist.all_reduce(message, operation, group=self.mesh.get_group(dimension))
        return message.to(tensor.device)

    def join(self, tensor: Tensor) -> Tensor:
        """The first dimensions of all processes' tensors, one behind the other; they may differ in length."""
        device, tensor = tensor.device, tensor.to(self.mesh.device_type)
        for dimension in self.dimensions:
            group, size = self.mesh.get_group(dimension), self.mesh.size(dimension)
            lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(size)]
            dist.all_gather(lengths, torch.tensor([tensor.shape[0]], device=tensor.device), group=group)
            longest = max(int(length) for length in lengths)
            padded = tensor.new_zeros((longest, *tensor.shape[1:]))
            padded[: tensor.shape[0]] = tensor
            parts = [torch.empty_like(padded) for _ in range(size)]
            dist.all_gather(parts, padded, group=group)
            tensor = torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])
        return tensor.to(device)


def together(boxes: Iterable[Box]) -> Together | None:
    """The processes that hold some boxes together; None if each of them is all of its tensor.

    Raises:
        NotImplementedError: if they are divided over several meshes that are no parts of one.
    """
    found = [box for box in boxes if box.divided]
    meshes = [mesh for mesh in dict.fromkeys(box.mesh for box in found) if mesh is not None]
    if not meshes:
        return None
    mesh = meshes[0]
    if len(meshes) > 1:
        # Where tensor parallelism divides some weights and FSDP all, each lies along its own dimensions of one mesh.
        mesh = _root(mesh)
        for other in meshes:
            if _root(other) != mesh or not set(other.mesh_dim_names or ("",)) <= set(mesh.mesh_dim_names or ()):
                raise NotImplementedError(
                    f"weights that compete with one another are divided over different meshes ({meshes[0]} and "
                    f"{meshes[1]}). Divide the model over one, or leave one side's modules out (exclude_modules)."
                )
    return Together(mesh, tuple(sorted({dimension for box in found for dimension in _dimensions(box, mesh)})))


def _root(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that a mesh is a part of."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    return importlib.import_module("torch.distributed.device_mesh")._mesh_resources.get_root_mesh(mesh)


def _dimensions(box: Box, mesh: DeviceMesh) -> list[int]:
    """Along which dimensions of a mesh a box is divided, of which its own mesh is a part."""
    if box.mesh is None or box.mesh == mesh:
        return list(box.divided)
    names, own = mesh.mesh_dim_names or (), box.mesh.mesh_dim_names or ()
    return [names.index(own[dimension]) for dimension in box.divided]
