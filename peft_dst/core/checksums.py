"""Checksums of a weight's seed, by which a change shows that nobody told us of.

They are sums of bit patterns, which can be corrected at the subset: so the seed need not be rebuilt to be summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .shards import together
from .tiles import bits


if TYPE_CHECKING:
    from .weights import SparseWeight


class SeedChecksum:
    """The checksum of one weight's seed: of what this process holds, and of the whole.

    Args:
        weight: the weight.

    Attributes:
        whole: of the whole seed, where that was noted before it was divided, or by all processes (`join_checksums`).
    """

    def __init__(self, weight: SparseWeight):
        self._weight = weight
        self._own: tuple[torch.dtype, torch.Size, int] | None = None
        self.whole: int | None = None
        #: The dtype that the whole seed had.
        self._whole_dtype: torch.dtype | None = None
        #: Whether it is to be noted again when the seed is replaced.
        self._watched = False

    @property
    def is_noted(self) -> bool:
        """Whether there is one, of what this process holds."""
        return self._own is not None

    @property
    def own(self) -> int | None:
        """Of the seed of what this process holds; None if it was not noted."""
        self._weight.noted()
        return None if self._own is None else self._own[2]

    def forget(self) -> None:
        """The seed was replaced."""
        self._own = self.whole = None

    def let_go(self) -> None:
        """The weight may change as it will."""
        self.forget()
        self._watched = False

    def note(self) -> None:
        """Note it as the seed is now, if the weight has memory."""
        weight = self._weight
        self._watched = True
        if not weight.data.is_meta:
            _, seeds = weight.noted()
            self._own = weight.data.dtype, weight.shape, _sum(weight.data, seeds, weight.values())
            if not weight.is_divided:
                self.note_whole(self._own[2])

    def note_whole(self, checksum: int | None) -> None:
        """Note that of the whole seed, in the dtype of that of what is held here."""
        self.whole, self._whole_dtype = checksum, None if self._own is None else self._own[0]

    def watch(self) -> None:
        """Note it if that was not done yet: the weight may be trained from now on."""
        if self._own is None:
            self.note()

    def note_again(self) -> None:
        """Renew it after new dense weights were loaded, if there was one."""
        if self._watched:
            self.note()

    def note_cast(self, cast: Callable[[Tensor], Tensor]) -> None:
        """Renew it for what a cast (`nn.Module._apply`) is about to make of the weight."""
        weight = self._weight
        if self._own is None or weight.data.is_meta or cast(weight.data.new_empty(0)).dtype == weight.data.dtype:
            return
        if self.is_intact():
            weight.generation += 1
            _, seeds = weight.noted()
            new = cast(weight.data)
            self._own = new.dtype, weight.shape, _sum(new, cast(seeds), cast(weight.values()))
            self.note_whole(None if weight.is_divided else self._own[2])

    def check_shape(self) -> None:
        """Check that the weight has the shape it had when its seed was noted.

        Raises:
            RuntimeError: if not.
        """
        if self._own is not None and self._own[1] != self._weight.shape:
            raise RuntimeError(
                f"{self._weight.name!r} has changed its shape since the adapter was added, so its positions and budget no "
                "longer hold. Resize the base model (resize_token_embeddings) before get_peft_model."
            )

    def is_intact(self) -> bool:
        """Whether everything outside the subset still has the seed's bits, or its values in a wider dtype, where somebody
        has given `.data` of the parameter another one; True if the seed was never noted.

        Raises:
            RuntimeError: if the weight has no memory.
        """
        if self._own is None:
            return True
        weight = self._weight
        weight.check_memory()
        _, seeds = weight.noted()
        dtype, shape, checksum = self._own
        return shape == weight.shape and checksum == _sum_in(dtype, weight.data, seeds, weight.values())

    def was_narrowed(self) -> bool:
        """Whether the weight has come to a dtype that does not hold all values of the one its seed was noted in, so that
        nobody can tell whether it is still that seed.
        """
        return self._own is not None and not _holds(self._weight.data.dtype, self._own[0])

    def whole_is_intact(self, whole: Tensor, seeds: Tensor, values: Tensor) -> bool:
        """The same of the whole weight, gathered from all processes that hold it together.

        Args:
            whole: the weight.
            seeds: the seed's values at the positions of the subset in it, (k,).
            values: its own values there, (k,).

        Returns:
            True also if the whole seed was never noted, or if it was gathered in another dtype than it has.
        """
        if self.whole is None or whole.dtype != self._weight.data.dtype:
            return True
        return self.whole == _sum_in(self._whole_dtype or whole.dtype, whole, seeds, values)


def join_checksums(weights: Iterable[SparseWeight]) -> None:
    """Note the checksums of whole seeds that were divided before they were noted. To be called by all that hold them."""
    found = [weight for weight in weights if weight.is_divided and weight.seed_checksum.whole is None]
    processes = together(weight.box for weight in found)
    if processes is not None:
        sums = [weight.seed_checksum.own for weight in found]
        own = [(known or 0) * processes.counts(weight.box) for weight, known in zip(found, sums, strict=True)]
        missing = [known is None for known in sums]
        message = torch.tensor([own, missing], dtype=torch.int64, device=processes.mesh.device_type)
        for weight, total, unknown in zip(found, *processes.reduce(message).tolist(), strict=True):
            weight.seed_checksum.note_whole(None if unknown else total)


def _sum_in(dtype: torch.dtype, live: Tensor, seeds: Tensor, values: Tensor) -> int | None:
    """The checksum that the seed had in a dtype which does not round any of it; None if it has not come from there."""
    if dtype == live.dtype:
        return _sum(live, seeds, values)
    if not _holds(live.dtype, dtype) or _rounded(live, dtype) != _rounded(values, dtype):
        return None
    return _sum(live.to(dtype), seeds.to(dtype), values.to(dtype))


def _sum(live: Tensor, seeds: Tensor, values: Tensor) -> int:
    total = bits(live).sum(dtype=torch.int64)
    return int(total + bits(seeds).sum(dtype=torch.int64) - bits(values).sum(dtype=torch.int64))


def _holds(wide: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a dtype has all values of another one."""
    return torch.promote_types(wide, dtype) == wide


def _rounded(tensor: Tensor, dtype: torch.dtype) -> int:
    """The number of values of a tensor that a narrower dtype does not have."""
    return int((bits(tensor.to(dtype).to(tensor.dtype)) != bits(tensor)).sum())
