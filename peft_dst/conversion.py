"""Adapters of other methods, and dense checkpoints, made into deltas.

PEFT puts the other adapter into its base, as it would to serve it; the delta is what then differs from the base. So the
values are those that PEFT computes, in the dtype in which it does, for every method and variant that it can merge. Methods
that change few components (SHiRA, Super-Tuning) come over exactly. Of one that changes all of them (LoRA) the largest
changes are kept, as many as the budget allows: of all deltas of that size over one silo the nearest.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from .config import DSTConfig
from .core.distances import Distance
from .core.silos import Siloing
from .delta import CONFIG_NAME, WEIGHTS_NAME, Checkpoint, Layout, SparseDelta, check_free, open_file
from .extraction import Extraction, extract, layout_of, skeleton
from .tuner.card import AUTO_CLASSES
from .tuner.targets import is_saved_densely


# Methods whose change is sparse by itself.
_SPARSE = ("SHIRA", "SUPERTUNING")
_HEADS = ("classifier.weight", "score.weight", "out_proj.weight")


def is_delta(folder: Path) -> bool:
    """Whether a folder's adapter_config.json is that of a DST adapter.

    Raises:
        ValueError: if it cannot be read.
    """
    path = folder / CONFIG_NAME
    try:
        return json.loads(path.read_text()).get("peft_type") == "DST"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}). It is damaged; save or download it again.") from error


def convert_adapter(
    adapter: str | PathLike[str],
    base: str | PathLike[str],
    output: str | PathLike[str],
    *,
    epsilon: float | None = None,
    num_free_parameters: int | None = None,
    siloing: Siloing = "none",
    distance: Distance = "absolute",
    progress: bool = True,
) -> Extraction:
    """Turn an adapter of another PEFT method into one of this package.

    The base is loaded once, with the adapter merged into it. Its modules_to_save are kept whole.

    Args:
        adapter: folder of the adapter.
        base: folder of its base's checkpoint.
        output: folder for the new adapter, which is not there yet.
        epsilon: fraction of the tensors that the adapter changes which may differ. Without it and num_free_parameters
            everything that differs is kept, which only makes sense for methods that change few components.
        num_free_parameters: the same budget as a number.
        siloing: within what the budget is shared, as in `DSTConfig`; "none" and the absolute distance give the delta
            that is nearest in the Frobenius norm.
        distance: what ranks a component, as in `DSTConfig`.
        progress: show bars.

    Returns:
        What was kept and what was cut off; `error` of its figures is the relative Frobenius norm of the latter.

    Raises:
        ValueError: if it is no adapter that PEFT can merge, it changes nothing, or a dense method is given no budget.
    """
    check_free(Path(output))
    if not any((Path(adapter) / name).is_file() for name in (WEIGHTS_NAME, "adapter_model.bin")):
        raise ValueError(f"{adapter} has no {WEIGHTS_NAME}. Give the folder of a saved adapter.")
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{adapter} has an {CONFIG_NAME} that PEFT cannot read ({type(error).__name__}: {error}). It is damaged, or of "
            "a method that is not installed."
        ) from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    exact = epsilon is None and num_free_parameters is None
    if kind == "DST":
        raise ValueError(f"{adapter} is a DST adapter already; to get a dense checkpoint merge it into its base.")
    # Super-Tuning may have LoRA beside it.
    if exact and (kind not in _SPARSE or (kind == "SUPERTUNING" and config.r)):
        raise ValueError(
            f"{adapter} is a {kind} adapter, which changes every component of its modules. Say how many may be kept: "
            "epsilon, a fraction of them, or num_free_parameters."
        )
    if not exact:
        # What is wrong with these is told before the base is loaded.
        DSTConfig(epsilon=epsilon, num_free_parameters=num_free_parameters, siloing=siloing, distance=distance)
    merged = _merged(Path(adapter), Path(base), config, progress)
    changed = _changed(merged, Path(base), config)
    if not changed:
        raise ValueError(f"{adapter} changes none of the base's weights: there is nothing to convert.")
    return extract(
        base,
        merged,
        output,
        DSTConfig(
            epsilon=epsilon,
            num_free_parameters=sum(changed.values()) if exact else num_free_parameters,
            siloing="none" if exact else siloing,
            distance="absolute" if exact else distance,
            target_parameters=[*changed],
            modules_to_save=config.modules_to_save,
            task_type=config.task_type,
            base_model_name_or_path=config.base_model_name_or_path,
        ),
        progress=progress,
    )


def convert_checkpoint(
    tuned: str | PathLike[str], base: str | PathLike[str], output: str | PathLike[str]
) -> SparseDelta:
    """Turn a fine-tuned checkpoint into the delta that leads to it from its base: every component whose bits differ.

    Args:
        tuned: folder of the fine-tuned checkpoint.
        base: folder of the base's, with tensors of the same names and shapes.
        output: folder for the adapter, which is not there yet.

    Raises:
        ValueError: if the two do not belong together (`SparseDelta.between`), nothing differs, or tensors that are one
            parameter in the base are two.
    """
    check_free(Path(output))
    fine = Checkpoint(tuned)
    delta = SparseDelta.between(Checkpoint(base), fine)
    if not delta:
        raise ValueError(f"{tuned} has the same weights as {base}: there is nothing to convert.")
    try:
        layout = layout_of(base)
    except ValueError:
        # Without a model class names are taken as they are.
        layout = Layout({name: name for name in delta})
    if joined := [name for name in delta if name not in layout.names]:
        raise ValueError(
            f"{joined[0]!r} is joined with others or turned when transformers loads it, so positions in the file mean "
            "nothing in the model. Load both models and pass them to peft_dst.extract."
        )
    renamed = {layout.names[name]: tensor for name, tensor in delta.items()}
    held = {layout.names.get(name) for name in fine}
    for names in layout.tied:
        first, *others = [name for name in names if name in held] or [""]
        if untied := [name for name in others if renamed.get(name) != renamed.get(first)]:
            raise ValueError(
                f"{first!r} and {untied[0]!r} are one parameter in {base}, and differ in {tuned}, which was trained with "
                "two: no delta over this base can say that. Give a base that has two (tie_word_embeddings in its "
                "config.json)."
            )
    twins = {name for names in layout.tied for name in names[1:] if names[0] in renamed}
    kept = SparseDelta({name: tensor for name, tensor in renamed.items() if name not in twins})
    kept = kept.described(base_model_name_or_path=str(base))
    kept.save(output)
    return kept


def _merged(adapter: Path, base: Path, config: PeftConfig, progress: bool) -> nn.Module:
    """The base with an adapter merged into it, as PEFT does it."""
    labels = _number_of_labels(adapter)
    options = {} if labels is None else {"num_labels": labels}
    model = _class_for(base, config).from_pretrained(base, dtype="auto", **options)
    try:
        # SHiRA's merge trusts the positions in its file otherwise.
        with torch.sparse.check_sparse_tensor_invariants():
            return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(progressbar=progress)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{adapter} is a {config.peft_type} adapter, which PEFT cannot merge into its base ({error}). Only what can be "
            "merged can be converted."
        ) from error


def _class_for(base: Path, config: PeftConfig) -> Any:
    """The class that the adapter was trained with: its task's, or else the base's own."""
    task = str(getattr(config.task_type, "value", config.task_type))
    if task in AUTO_CLASSES:
        return getattr(transformers, AUTO_CLASSES[task])
    names = getattr(transformers.AutoConfig.from_pretrained(base), "architectures", None) or ["AutoModel"]
    return getattr(transformers, names[0], transformers.AutoModel)


def _number_of_labels(adapter: Path) -> int | None:
    """Rows of the trained head, if the adapter holds one."""
    path = adapter / WEIGHTS_NAME
    if not path.is_file():
        return None
    tensors = open_file(path)
    rows = [tensors.get_slice(key).get_shape()[0] for key in tensors.keys() if key.endswith(_HEADS)]  # noqa: SIM118
    return rows[0] if rows else None


def _changed(merged: nn.Module, base: Path, config: PeftConfig) -> dict[str, int]:
    """Name of each parameter outside dense modules that differs from the base's → number of components that do."""
    seeds = skeleton.read(merged, skeleton.tensors_of(base, "base"), "base").found
    changed = {}
    for name, parameter in merged.named_parameters():
        seed = seeds.get(name)
        if seed is None or seed.shape != parameter.shape or is_saved_densely(config, name.rpartition(".")[0]):
            continue
        if seed.is_floating_point() and (count := int((seed != parameter.detach().to(seed)).sum())):
            changed[name] = count
    return changed
