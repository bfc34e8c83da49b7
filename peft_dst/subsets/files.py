"""Scores on disk: a safetensors file with one float32 tensor for each parameter, and metadata that says what it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..delta.files import replace_file
from .scores import Scores, check_scores


# The metadata key by which a file of scores is known, and the format's version under it.
_MARK, _VERSION = "peft_dst_scores", "1"
# "false" in the file of a pass that is not through: its tensors are sums so far.
COMPLETE = "complete"


def save_scores(path: str | os.PathLike[str], scores: Scores, metadata: Mapping[str, str] | None = None) -> None:
    """Save scores in one step: at any moment either the old file or the new one is there, whole.

    Args:
        path: the file, by custom `….safetensors`; its folder must exist.
        scores: what to save.
        metadata: any strings, for instance how the scores came about.

    Raises:
        ValueError: if they are not scores; nothing has been written.
    """
    check_scores(scores)
    replace_file(Path(path), scores, {**(metadata or {}), _MARK: _VERSION})


def load_scores(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load scores that `save_scores` wrote, or the complete cache of `score_parameters`.

    Args:
        path: the file.

    Returns:
        Parameter name → score, float32 on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a safetensors file, not one of scores, or of a pass that is not through.
    """
    scores, metadata = read(path)
    if metadata.get(COMPLETE) == "false":
        raise ValueError(
            f"{path} holds the unfinished sums of {metadata.get('examples', 'some')} examples. Give it to "
            "`score_parameters` as `cache` once more, which resumes it."
        )
    return scores


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, checked, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get(_MARK) != _VERSION:
                raise ValueError(
                    f"{path} is not a file of scores of this version: its metadata has no {_MARK!r} = {_VERSION!r}. Name "
                    "another file, or score the model again."
                )
            scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Score the model again.") from error
    try:
        check_scores(scores)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return scores, metadata
