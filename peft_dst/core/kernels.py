"""The AdamW step under the constraint without a dense Θ̂: a fused path for GPUs, through Triton.

Outside the subset Θt *is* Θ0, so the live weight and a few float32 values of the subset are all that the step needs to
know, and the subset is all that it has to write. For the length of a step the weights of the current subset are marked
(NaN, all bits set) in the live weight: they do not compete as their neighbours do, for their seed and their exact value
stand elsewhere. The pass over the weights reads gradient, moments and weight, writes the moments, and keeps of Δ only
the largest of each block. As in `selection`, the budget's k-th largest of what is then known (block maxima, and the
Δ of the current subset) bounds the threshold from below, and only blocks that reach it are looked at again.

`docs/kernels.md` counts the bytes. Nothing here imports Triton before a kernel is wanted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .adamw import AdamWOptions, AdamWTensor, NonFiniteStepError, adamw_scalars
from .distances import DISTANCES
from .selection import Selection
from .tiles import bits


# Bits of infinity in float32: those of a finite distance are below.
_INFINITY = 0x7F800000
# No distance has bits as high as this.
_NOTHING = 0x7FFFFFFF
# Components a program of the first pass. It holds at least one block of the largest size.
_TILE = 2048
# Components that are looked at again at one time, so that many ties cost time and not memory.
_CHUNK = 1 << 24
# Lanes of a program of the kernels that work on single entries, and two columns of the table, as in `kernels_triton`.
_LANES = 256
_FIRST_SLOT = 5
_FIRST_COMPONENT = 7


@dataclass(frozen=True)
class SiloStep:
    """A silo after the step.

    Attributes:
        selection: the new subset, as `select` would choose it on the dense Θ̂, and its threshold.
        seeds: for each tensor its seed values at the new subset, (k_i,) in the weight's dtype.
        values: for each tensor θ̂ there, float32 (k_i,); the live weight is its rounding.
    """

    selection: Selection
    seeds: list[Tensor]
    values: list[Tensor]


@functools.cache
def _device_code() -> ModuleType | None:
    """The kernels, or None without a Triton that rounds as torch. Whether they are interpreted is decided here, once."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import kernels_triton

    return kernels_triton if kernels_triton.rounds_as_torch() else None


def _meant_for(device: torch.device) -> bool:
    """Whether there are kernels for a device, if they can be compiled."""
    code = _device_code()
    if code is None:
        return False
    # Interpreted kernels would read device addresses from the host. A mixture of both, as arises when the variable is
    # set between the import of triton and that of the kernels, runs nowhere.
    interpreted = {type(kernel).__name__ == "InterpretedFunction" for kernel in (code.adamw_maxima, code.tl.max)}
    return interpreted == {device.type == "cpu"} and device.type in ("cpu", "cuda")


@functools.cache
def failure(device: torch.device) -> Exception | None:
    """What went wrong when a kernel was tried on a device, as without a C compiler or with a driver too old for it. None if
    nothing did, or if there is no kernel for that device.

    Raises:
        RuntimeError: if the device's memory is full, or it has failed before. It is tried again next time.
    """
    if not _meant_for(device):
        return None
    one, none = torch.zeros(1, device=device), torch.empty(0, device=device)
    options = AdamWOptions(lr=0.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, step=1.0)
    tensor = AdamWTensor(one, one, one, one, options, none.long(), none, none)
    batch, first = _Batch([[tensor]], [0], "absolute"), torch.zeros(1, dtype=torch.int64, device=device)
    try:
        batch.read(first, first)
    except Exception as error:
        # Where the device's memory is full, or a kernel before has failed, that says nothing of this one.
        if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or "[CUDA]: out of memory" in str(error):
            raise
        # Whose frames hold tensors.
        return error.with_traceback(None)
    return None


def available(tensor: Tensor) -> bool:
    """Whether the kernels run where a tensor is: on CUDA with Triton, if that can compile them, or on the CPU under
    `TRITON_INTERPRET=1`.

    That variable must be set before anything imports triton.
    """
    return _meant_for(tensor.device) and failure(tensor.device) is None


def block_size(n: int, budget: int) -> int:
    """Components a block: a power of two near 2 / √ε, from 8 to 1024.

    The maxima are written and searched, at a cost of 1 / block for each component; ε · block of the components is
    looked at again, times the share of the subset that is replaced. The sum is least where these balance.
    """
    return 1 << min(10, max(3, round(math.log2(2 * math.sqrt(max(n, 1) / max(budget, 1))))))


@torch.no_grad()
def adamw_step(
    silos: Sequence[Sequence[AdamWTensor]],
    budgets: Sequence[int],
    kind: str,
    note: Callable[[list[SiloStep]], None] = lambda steps: None,
) -> list[SiloStep]:
    """Make one AdamW step of some silos under the constraint, and write their live weights.

    The number of kernel launches and of waits for the device does not grow with that of tensors or silos, but for one
    `topk` a silo: pass many silos at once. Afterwards moments are those of the dense step, each live weight
    is its seed with the new subset's rounded values, and the caller keeps what is returned for the next step.

    Args:
        silos: for each silo its tensors, in the order in which ties are decided.
        budgets: k of each silo, 0 <= k < its size. Where k is the size nothing competes: use the optimizer itself.
        kind: name of the distance.
        note: called with what is returned while all live weights are the seed, before the new subset is written. Whatever
            interrupts the call from then on, seeds put back where they are noted are the whole seed.

    Raises:
        NonFiniteStepError: if a Δ is NaN or infinite, be it the update or a weight that was so before. The live weights
            are then as before the call, as after whatever else is raised before `note` is called; the moments are updated.
        ValueError: if a budget is not less than its silo, or the distance is unknown.
    """
    if kind not in DISTANCES:
        raise ValueError(f"unknown distance {kind!r}: use one of {', '.join(DISTANCES)}")
    for position, (silo, budget) in enumerate(zip(silos, budgets, strict=True)):
        size = sum(tensor.weight.numel() for tensor in silo)
        if not (0 <= budget < size or budget == size == 0):
            raise ValueError(f"silo {position} has a budget of {budget} for {size} components: nothing competes in it")
    if not any(silos):
        return [SiloStep(Selection([], torch.zeros((), device="cpu")), [], []) for _ in silos]
    batch = _Batch(silos, budgets, kind)
    live = batch.read(batch.tensor, batch.position)
    try:
        batch.write(batch.tensor, batch.position, torch.full_like(live, -1))
        maxima, updated = batch.first_pass()
        batch.check_finite(maxima)
        winners, threshold = batch.choose(maxima, updated)
        rounded = batch.rounded(winners.tensor, winners.updated)
        batch.write(batch.tensor, batch.position, batch.seed_bits)
        steps = batch.divide(winners, threshold)
    except BaseException:
        batch.write(batch.tensor, batch.position, live)
        raise
    note(steps)
    batch.write(winners.tensor, winners.position, rounded)
    return steps


class _Entries(NamedTuple):
    """Some components of a batch: tensor and flat position int64, bits of Δ int32, θ̂ float32, each (c,)."""

    tensor: Tensor
    position: Tensor
    delta: Tensor
    updated: Tensor

    def at(self, order: Tensor) -> _Entries:
        return _Entries(*(part[order] for part in self))


class _Batch:
    """The tensors of a call with their tables on the device, and the kernels over them.

    Maxima lie in one buffer: for each silo a slot for each block of its tensors, then one for each component of the
    current subset. So a silo's bound is the `topk` of one slice.

    Attributes:
        groups: positions of the tensors by what a kernel is compiled for.
        first_slots: first slot of each tensor.
        regions: number of slots of each silo.
        entry_slots: slots of the current subset, int64 (k,).
        table, scalars: as `kernels_triton` describes them.
        tensor, position: tensor and flat position of the current subset, int64 (k,).
        seeds, seed_bits: seed values there, float32 (k,), and their bits as the weight holds them, int32 (k,).
        values: their exact values, float32 (k,).
    """

    def __init__(self, silos: Sequence[Sequence[AdamWTensor]], budgets: Sequence[int], kind: str):
        self.tensors = [tensor for silo in silos for tensor in silo]
        self.sizes = [tensor.weight.numel() for tensor in self.tensors]
        self.lengths = [len(silo) for silo in silos]
        self.budgets = list(budgets)
        self.kind = kind
        self.device = self.tensors[0].weight.device
        self.block = block_size(sum(self.sizes), sum(budgets))
        self.groups = _groups(self.tensors)
        self._lay_out(silos)
        self._tabulate()
        self._collect()

    def _lay_out(self, silos: Sequence[Sequence[AdamWTensor]]) -> None:
        """Give every tensor, and the current subset of every silo, its slots."""
        self.first_slots: list[int] = []
        self.regions: list[int] = []
        blocks, counts, end = [], [], 0
        for silo in silos:
            begin = end
            for tensor in silo:
                self.first_slots.append(end)
                end += -(-tensor.weight.numel() // self.block)
            blocks.append(end - begin)
            counts.append(sum(tensor.indices.numel() for tensor in silo))
            end += counts[-1]
            self.regions.append(end - begin)
        # The e-th component of the subset stands behind the blocks of its silo, and of all silos before.
        behind = self._spread(list(itertools.accumulate(blocks)), counts)
        self.entry_slots = torch.arange(sum(counts), device=self.device) + behind

    def _tabulate(self) -> None:
        """Put the tables on the device."""
        tiles = [-(-size // _TILE) for size in self.sizes]
        group, first = [0] * len(tiles), [0] * len(tiles)
        for number, members in enumerate(self.groups.values()):
            for position, before in zip(members, _offsets([tiles[p] for p in members]), strict=True):
                group[position], first[position] = number, before
        pointers = [[t.data_ptr() for t in (x.grad, x.exp_avg, x.exp_avg_sq, x.weight)] for x in self.tensors]
        columns = (self.sizes, self.first_slots, first, _offsets(self.sizes))
        self.table = self._to_device([[*own, *rest] for own, *rest in zip(pointers, *columns, strict=True)])
        self.scalars = self._to_device([adamw_scalars(t.options) for t in self.tensors], torch.float32)
        self.wide = self._to_device([t.weight.element_size() == 4 for t in self.tensors], torch.int32)
        self.group = self._to_device(group, torch.int32)
        self.programs = [self._spread(members, [tiles[p] for p in members]).int() for members in self.groups.values()]

    def _collect(self) -> None:
        """Join the current subsets."""
        self.tensor = self._spread(list(range(len(self.tensors))), [t.indices.numel() for t in self.tensors])
        self.position = torch.cat([t.indices for t in self.tensors])
        # Joining tensors of several dtypes widens to one that holds all of them exactly.
        self.seeds = torch.cat([t.seeds for t in self.tensors]).float()
        self.seed_bits = self.rounded(self.tensor, self.seeds)
        self.values = torch.cat([t.values for t in self.tensors])

    def _to_device(self, rows: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(rows, dtype=dtype, device="cpu").to(self.device, non_blocking=True)

    def _spread(self, items: list[int], counts: list[int]) -> Tensor:
        """Each item as often as its count says, int64; without waiting for the device."""
        return self._to_device(items).repeat_interleave(self._to_device(counts), output_size=sum(counts))

    def rounded(self, tensor: Tensor, values: Tensor) -> Tensor:
        """Bits, int32 (c,), that float32 values (c,) have in the dtype of the tensors they are for."""
        dtypes = [t.weight.dtype for t in self.tensors]
        present = list(dict.fromkeys(dtypes))
        result = bits(values.to(present[0])).int()
        if len(present) > 1:
            kinds = self._to_device([present.index(dtype) for dtype in dtypes])[tensor]
            for kind, dtype in enumerate(present[1:], 1):
                result = torch.where(kinds == kind, bits(values.to(dtype)).int(), result)
        return result

    def read(self, tensor: Tensor, position: Tensor) -> Tensor:
        """Bits of live weights, int32 (c,)."""
        found = torch.empty(position.shape, dtype=torch.int32, device=self.device)
        where = (tensor, position, self.wide, self.table)
        self._launch("read_weights", _lanes(found), (*where, found, found.numel()))
        return found

    def write(self, tensor: Tensor, position: Tensor, new: Tensor) -> None:
        """Write bits, int32 (c,), over live weights."""
        where = (tensor, position, self.wide, self.table)
        self._launch("write_weights", _lanes(new), (*where, new, new.numel()))

    def first_pass(self) -> tuple[Tensor, Tensor]:
        """Update all moments.

        Returns:
            The buffer of maxima, bits of Δ as int32, and θ̂ of the current subset, float32 (k,).
        """
        maxima = torch.empty(sum(self.regions), dtype=torch.int32, device=self.device)
        layout = {"BLOCK": self.block, "ROWS": _TILE // self.block}
        for (grads, weights, aligned), programs in zip(self.groups, self.programs, strict=True):
            compiled = {"KIND": self.kind, "GRADS": grads, "WEIGHTS": weights, "ALIGNED": aligned, **layout}
            self._launch("adamw_maxima", programs.numel(), (programs, self.table, self.scalars, maxima), compiled)
        updated = torch.empty_like(self.values)
        current = (self.tensor, self.position, self.seeds, self.values)
        out = (self.entry_slots, maxima, updated, updated.numel())
        self._launch("incumbents", _lanes(updated), (*current, self.table, self.scalars, *out), {"KIND": self.kind})
        return maxima, updated

    def _owners(self, slots: Tensor) -> Tensor:
        """Tensor of each slot (c,) of a block, int64."""
        # An empty tensor begins at the same slot as the tensor behind it, which is the one found.
        return torch.searchsorted(self._to_device(self.first_slots), slots, right=True) - 1

    def check_finite(self, maxima: Tensor) -> None:
        """Raise if a distance is NaN or infinite."""
        if not maxima.numel() or int(maxima.max()) < _INFINITY:
            return
        owner = self._owners(torch.arange(maxima.numel(), device=self.device))
        owner[self.entry_slots] = self.tensor
        position, silo = int(owner[maxima >= _INFINITY].min()), 0
        while position >= self.lengths[silo]:
            position -= self.lengths[silo]
            silo += 1
        raise NonFiniteStepError(silo, position)

    def bounds(self, maxima: Tensor) -> Tensor:
        """Bits, int32 (silos,), of a lower bound of each silo's threshold that is above zero."""
        found = []
        for slots, budget in zip(maxima.split(self.regions), self.budgets, strict=True):
            if 0 < budget < slots.numel():
                found.append(slots.topk(budget, sorted=False).values.amin())
            else:
                found.append(maxima.new_full((), 1 if budget else _NOTHING))
        return torch.stack(found).clamp_min_(1)

    def second_look(self, maxima: Tensor, bounds: Tensor) -> list[_Entries]:
        """Components outside the current subset that reach their silo's bound, in order."""
        bound = bounds.repeat_interleave(self._to_device(self.regions), output_size=maxima.numel())
        marked = maxima >= bound
        marked[self.entry_slots] = False
        slots = marked.nonzero().flatten()
        return [self._look_at(part, bound[part]) for part in slots.split(_CHUNK // self.block)]

    def _look_at(self, slots: Tensor, bound: Tensor) -> _Entries:
        """Components of marked blocks, given by their slots int64 (m,), that reach a bound, bits int32 (m,)."""
        tensor = self._owners(slots)
        block = slots - self.table[tensor, _FIRST_SLOT]
        delta = torch.empty(slots.numel() * self.block, dtype=torch.int32, device=self.device)
        updated = torch.empty_like(delta, dtype=torch.float32)
        arguments = (tensor, block, bound, self.group, self.table, self.scalars, delta, updated)
        for group, (_, weights, aligned) in enumerate(self.groups):
            compiled = {"GROUP": group, "KIND": self.kind, "WEIGHTS": weights, "ALIGNED": aligned, "BLOCK": self.block}
            self._launch("candidates", slots.numel(), arguments, compiled, warps=1 if self.block <= 256 else 4)
        at = delta.nonzero().flatten()
        row = at // self.block
        return _Entries(tensor[row], block[row] * self.block + at % self.block, delta[at], updated[at])

    def choose(self, maxima: Tensor, updated: Tensor) -> tuple[_Entries, Tensor]:
        """The new subset, in order, and the bits of each silo's threshold, int32 (silos,).

        Args:
            maxima: buffer of the first pass, int32.
            updated: θ̂ of the current subset, float32 (k,).
        """
        current = _Entries(self.tensor, self.position, maxima[self.entry_slots], updated)
        everything = [current, *self.second_look(maxima, self.bounds(maxima))]
        entries = _Entries(*(torch.cat(parts) for parts in zip(*everything, strict=True)))
        entries = entries.at(torch.argsort(self.table[entries.tensor, _FIRST_COMPONENT] + entries.position))
        silo = self._spread(list(range(len(self.lengths))), self.lengths)[entries.tensor]
        # A stable sort by silo, then falling distance, of entries in the order in which ties are decided.
        falling = torch.argsort((silo << 32) - entries.delta, stable=True)
        begin = torch.searchsorted(silo, torch.arange(len(self.lengths), device=self.device))
        rank = torch.empty_like(falling)
        rank[falling] = torch.arange(falling.numel(), device=self.device)
        within = rank - begin[silo] < self._to_device(self.budgets)[silo]
        kept = (within & (entries.delta > 0)).nonzero().flatten()
        winners = entries.at(kept)
        threshold = torch.full_like(begin, _NOTHING, dtype=torch.int32)
        threshold = threshold.scatter_reduce(0, silo[kept], winners.delta, "amin")
        return winners, threshold.masked_fill(threshold == _NOTHING, 0)

    def divide(self, winners: _Entries, threshold: Tensor) -> list[SiloStep]:
        """Divide what is known of the new subset by tensor. The live weights are the seed now."""
        seed_bits = self.read(winners.tensor, winners.position)
        ends = torch.searchsorted(winners.tensor, torch.arange(len(self.tensors), device=self.device), right=True)
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        indices, values = winners.position.split(counts), winners.updated.split(counts)
        dtypes = [tensor.weight.dtype for tensor in self.tensors]
        seeds = [_from_bits(*each) for each in zip(seed_bits.split(counts), dtypes, strict=True)]
        steps = []
        limits = threshold.view(torch.float32).unbind()
        for begin, length, limit in zip(_offsets(self.lengths), self.lengths, limits, strict=True):
            own = slice(begin, begin + length)
            steps.append(SiloStep(Selection(list(indices[own]), limit), seeds[own], list(values[own])))
        return steps

    def _launch(
        self,
        kernel: str,
        programs: int,
        arguments: tuple[object, ...],
        compiled: Mapping[str, object] = MappingProxyType({}),
        warps: int = 4,
    ) -> None:
        code = _device_code()
        assert code is not None
        if programs:
            # A fused product and sum would be rounded otherwise than the plain twin, and perhaps than the second look.
            options = {"num_warps": warps, "enable_fp_fusion": False}
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                getattr(code, kernel)[(programs,)](*arguments, **compiled, **options)


def _groups(tensors: Sequence[AdamWTensor]) -> dict[tuple[str, str, bool], list[int]]:
    """Positions of tensors by dtype of gradient, dtype of weight, and whether all is divisible into 16 bytes."""
    groups: dict[tuple[str, str, bool], list[int]] = {}
    for position, t in enumerate(tensors):
        addresses = (t.grad.data_ptr(), t.exp_avg.data_ptr(), t.exp_avg_sq.data_ptr(), t.weight.data_ptr())
        aligned = all(number % 16 == 0 for number in (*addresses, t.weight.numel()))
        dtypes = (str(t.grad.dtype).removeprefix("torch."), str(t.weight.dtype).removeprefix("torch."))
        groups.setdefault((*dtypes, aligned), []).append(position)
    return groups


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Sum of the sizes before each."""
    return [0, *itertools.accumulate(sizes)][: len(sizes)]


def _from_bits(patterns: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `bits`, from int32 (c,)."""
    return patterns.view(dtype) if dtype == torch.float32 else patterns.to(torch.int16).view(dtype)


def _lanes(tensor: Tensor) -> int:
    """Programs for the kernels that work on single entries."""
    return -(-tensor.numel() // _LANES)
