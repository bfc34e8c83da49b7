"""Patches for inference engines: positions and absolute values in the coordinates of the base's checkpoint.

vLLM takes such patches (`CheckpointWeightPatch` of vllm/model_executor/model_loader/checkpoint_weight_patch.py, and
`SparseWeightPatch` of its sparse_nccl weight transfer): name, shape and dtype of the checkpoint's tensor, flat int32
positions, values. Its weight loaders map them to its own joined and sharded parameters. It defines no file; ours has

    <name>.indices     int32 (k,), sorted (int64 past 2^31 components)
    <name>.values      (k,) in the checkpoint's dtype; without indices the whole tensor, flat
    metadata `shapes`  JSON, name → shape of the checkpoint's tensor
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

from torch import Tensor

from .checkpoint import Checkpoint, Layout, place
from .files import replace_file
from .merging import check_free
from .sparse import SparseDelta


def export_patches(
    base: str | PathLike[str], delta: SparseDelta, path: str | PathLike[str], *, layout: Layout | None = None
) -> int:
    """Write a delta as patches of its base's checkpoint.

    Args:
        base: folder of the checkpoint that the engine has loaded; only read.
        delta: what leads from it to the tuned weights.
        path: the file, which is not there yet.
        layout: what the base's model class knows of the checkpoint.

    Returns:
        Number of patches.

    Raises:
        DeltaError: if the base is not the delta's, or has a tensor in another layout than the model (`place`).
        ValueError: if the file is there, or base is no checkpoint. Nothing has been written by then.
    """
    path = Path(path)
    check_free(path)
    placement = place(delta, Checkpoint(base), layout)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entries in placement.entries.items():
        # Copies: of a tied tensor the checkpoint may hold two, and a file refuses memory that two share.
        tensors[f"{name}.indices"], tensors[f"{name}.values"] = (part.clone() for part in entries.record())
        shapes[name] = entries.shape
    for name, dense in {**placement.replaced, **placement.added}.items():
        tensors[f"{name}.values"] = dense.reshape(-1).contiguous()
        shapes[name] = tuple(dense.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, tensors, {"shapes": json.dumps(shapes, separators=(",", ":"))})
    return len(shapes)
