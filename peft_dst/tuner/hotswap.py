"""Another adapter in the place of one that is loaded, under its name: PEFT's hot swap, for DST."""

from __future__ import annotations

import os
from operator import attrgetter
from typing import Any

from peft import PeftModel
from peft.config import PeftConfig
from peft.utils.other import ModulesToSaveWrapper, infer_device
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from ..config import DSTConfig
from ..core import Constraint
from .constraints import constraints
from .exchange import check_shape
from .layer import SparseLayer, markers
from .model import DSTModel
from .overlay import OverlayWeight
from .plan import plan_of
from .records import no_entries
from .states import record_keys
from .targets import find_targets


def prepare_model_for_compiled_hotswap(model: nn.Module, **options: Any) -> None:
    """Do nothing: what PEFT's function of that name is for (padding to a common rank) DST does not need.

    Args:
        model: a model with DST adapters.
        **options: as PEFT's takes them.
    """


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Load a saved adapter in the place of one that the model has, which may be active.

    No tensor of the model is replaced, and a compiled model (`torch.compile`) is not compiled again. The new adapter may
    have another budget, selection or siloing; it tunes the same parameters. What was trained of the old one is lost.

    What `peft.utils.hotswap.hotswap_adapter` is for LoRA, and what that does for a model with DST adapters once `peft_dst`
    is imported.

    Args:
        model: a PeftModel, or what torch.compile made of one.
        model_name_or_path: folder or hub id of the new adapter.
        adapter_name: name of the adapter to replace, which stays.
        torch_device: where to load the file to; by default PEFT's choice.
        **kwargs: as for from_pretrained: subfolder, revision, cache_dir, token, …

    Raises:
        ValueError: if the file is no DST adapter, is damaged, belongs to another base, tunes other parameters or has other
            dense copies; or if the old one does not exist or is merged. Nothing has been changed by then.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, DSTModel):
        raise ValueError(f"hotswap_adapter replaces an adapter of a PeftModel with DST adapters, got a {type(model)}.")
    path = str(model_name_or_path)
    hub = {key: kwargs[key] for key in ("subfolder", "revision", "cache_dir", "token") if key in kwargs}
    kind = PeftConfig._get_peft_type(path, **hub)
    if kind != "DST":
        raise ValueError(f"{path!r} holds an adapter of type {kind}, which cannot replace one of type DST.")
    config = DSTConfig.from_pretrained(path, **kwargs)
    tensors = load_peft_weights(path, device=torch_device or infer_device(), **kwargs)
    old = model.base_model.constraint(adapter_name), model.peft_config[adapter_name]
    _check_copies(model, adapter_name, old[1], config, tensors)
    config.inference_mode = old[1].inference_mode
    if config.records is None:
        config.records = {}
    new = _new_constraint(model.base_model, adapter_name, config)
    new.total_steps = old[0].total_steps
    before = _tensors(model, adapter_name)
    seeds = [(weight, dict(weight.summaries)) for weight in new.weights if isinstance(weight, OverlayWeight)]
    try:
        _put(model.base_model, new, config)
        set_peft_model_state_dict(model, tensors, adapter_name)
    except BaseException:
        _put(model.base_model, *old)
        model.load_state_dict(before, strict=False)
        for weight, summaries in seeds:
            weight.summaries = summaries
        _release(model, adapter_name)
        raise
    old[0].retire()
    _release(model, adapter_name)


def _release(model: PeftModel, adapter_name: str) -> None:
    for _, marker in markers(model):
        marker.release(adapter_name)


def _tensors(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """All that a swap replaces, as `load_state_dict` takes it: records, and dense copies."""
    found: dict[str, Tensor] = {}
    for name, marker in markers(model):
        records = marker.records(adapter_name) if adapter_name in marker.tuned else {}
        for parameter in marker.tuned.get(adapter_name, ()):
            record = records.get(parameter) or no_entries(marker.weights[parameter])
            found |= zip(record_keys(f"{name}.", adapter_name, parameter), record, strict=True)
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            copies = module.modules_to_save[adapter_name].state_dict(prefix=f"{name}.modules_to_save.{adapter_name}.")
            # Records are replaced, copies are written into.
            found |= {key: tensor.clone() for key, tensor in copies.items()}
    return found


def _new_constraint(tuner: DSTModel, adapter_name: str, config: DSTConfig) -> Constraint:
    """The constraint that an adapter of this name would have under another config, of the same parameters.

    Raises:
        ValueError: if the config tunes other parameters, is malformed, or the adapter is merged.
    """
    model = tuner.model
    found = {w.name: w for m in model.modules() if isinstance(m, SparseLayer) for w in m.weights.values()}
    if any(adapter_name in marker.merged_adapters for _, marker in markers(model)):
        raise ValueError(f"adapter {adapter_name!r} is merged into the base weights. Call unmerge_adapter() first.")
    targets = find_targets(model, config)
    own = [weight.name for weight in tuner.constraint(adapter_name).weights]
    if different := sorted({target.name for target in targets} ^ set(own)):
        raise ValueError(
            f"the new adapter and {adapter_name!r} do not tune the same parameters; only one of them tunes "
            f"{different[0]!r} ({len(different)} such tensors). Load it under a name of its own: "
            "model.load_adapter(path, name)."
        )
    return plan_of(model, config, targets).constraint(adapter_name, found)


def _put(tuner: DSTModel, constraint: Constraint, config: DSTConfig) -> None:
    """Replace an adapter's constraint and config, before the records that belong to them are loaded. What was there may
    be put back; retire it when it will not be.
    """
    found, name = constraints(tuner.model), constraint.adapter
    Constraint.live.discard(found[name])
    found[name], tuner.peft_config[name] = constraint, config
    Constraint.live.add(constraint)
    for _, marker in markers(tuner.model):
        marker.static.discard(name)
        marker.static |= {name} & (marker.tuned.keys() if config.fixed else set())


def _check_copies(
    model: PeftModel, adapter_name: str, old: PeftConfig, new: DSTConfig, tensors: dict[str, Tensor]
) -> None:
    if set(old.modules_to_save or ()) != set(new.modules_to_save or ()):
        raise ValueError(
            f"the adapter {adapter_name!r} has modules_to_save={old.modules_to_save}, the one in the file "
            f"{new.modules_to_save}. Load it under a name of its own, onto a model without the other."
        )
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for saved, loaded in module.adapter_state_dict_load_map(adapter_name).items():
                key = f"{name}.{saved}"
                check_shape(key, attrgetter(f"{name}.{loaded}")(model), tensors.get(key))
