"""Makes DST a method of PEFT. The only code of this package that changes anything of PEFT's.

PEFT has no entry points, and its enum of methods is closed: a name that is not in it is refused by
`register_peft_method`, and a plain string in the mappings breaks transformers, which reads `peft_type.value`. So DST
becomes a real member of the enum, five methods of PeftModel learn what DST adds to them, and three functions that look for
LoRA's layers find DST's.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from peft import PeftModel, helpers
from peft import __version__ as peft_version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME, PeftType, hotswap, register_peft_method
from torch import nn

from .core.hook import install


NAME = "DST"


def register() -> None:
    """Register DST with PEFT. Importing `peft_dst` does this; calling it again changes nothing.

    Raises:
        ImportError: if PEFT, or another plugin, has a method of that name, or PEFT's enum is none that can be extended.
    """
    from .config import DSTConfig
    from .tuner.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
    from .tuner.model import DSTModel
    from .tuner.parallel import keep_from_ddp
    from .tuner.rescale import rescale_adapter_scale
    from .tuner.saving import save_pretrained

    known = _registered_config()
    if known is not None and known.__module__ != DSTConfig.__module__:
        raise ImportError(
            f"peft {peft_version} already knows a method {NAME!r}, {known.__module__}.{known.__qualname__}, so peft_dst "
            "cannot register its own under that name. Use that one, or uninstall what brings it."
        )
    _extend_peft_type()
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=DSTConfig, model_cls=DSTModel)
    else:
        # The package may have been imported anew, and its classes with it.
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(NAME)] = DSTConfig
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType(NAME)] = DSTModel
    install()
    keep_from_ddp()
    _extend("get_nb_trainable_parameters", _count)
    _extend("save_pretrained", save_pretrained)
    _extend("load_adapter", _load)
    _extend("create_or_update_model_card", _write_model_card)
    _extend("_upload_modified_files", _upload)
    _stand_in(hotswap, "hotswap_adapter", hotswap_adapter)
    _stand_in(hotswap, "prepare_model_for_compiled_hotswap", prepare_model_for_compiled_hotswap)
    _stand_in(helpers, "rescale_adapter_scale", rescale_adapter_scale)


def _registered_config() -> type | None:
    member = PeftType.__members__.get(NAME)
    return None if member is None else PEFT_TYPE_TO_CONFIG_MAPPING.get(member)


# The member


def _extend_peft_type() -> None:
    if NAME in PeftType.__members__:
        return
    try:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType)
        # Pickles of it are read by processes that have imported nothing but peft.
        member.__reduce_ex__ = lambda protocol: (_member, ())
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        # Attribute access finds members in the class; the enum's metaclass forbids setting them the ordinary way.
        type.__setattr__(PeftType, NAME, member)
        extended = PeftType(NAME) is PeftType[NAME] is getattr(PeftType, NAME) is list(PeftType)[-1] is member
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise ImportError(_NO_MEMBER) from error
    if not extended:
        raise ImportError(_NO_MEMBER)


_NO_MEMBER = (
    f"peft_dst cannot add {NAME!r} to peft {peft_version}'s PeftType: it, or Python's enum, is made otherwise than in the "
    "versions that peft_dst is tested with. Install one of those: see its constraints.txt."
)


def _member() -> PeftType:
    """What a pickled PeftType.DST comes back as; to find this function unpickling imports the package, which registers."""
    return PeftType(NAME)


# What is added to PeftModel


def _extend(method: str, replacement: Any) -> None:
    """Let `replacement` stand before a method of PeftModel, for models of DST's; it is given the original first."""
    original = getattr(PeftModel, method, None)
    if original is None or hasattr(original, "dst_original"):
        return

    @functools.wraps(original)
    def wrapper(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        # By its prefix: after a second import of the package there are two classes of the name.
        if getattr(self.base_model, "prefix", None) == f"{NAME.lower()}_":
            return replacement(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    wrapper.__dict__["dst_original"] = original
    setattr(PeftModel, method, wrapper)


def _count(original: Any, model: PeftModel) -> tuple[int, int]:
    return model.base_model.get_nb_trainable_parameters()


def _load(
    original: Any, model: PeftModel, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **options: Any
) -> Any:
    """Tensors that no saved config has announced (loaded again, or with a config of the caller's) announce themselves, so
    that the base is compared with theirs. Of an adapter that cannot be loaded, for whatever reason, nothing stays that the
    load has added.
    """
    from .tuner.model import take_back

    config = model.peft_config.get(adapter_name)
    records = config and config.records
    try:
        if config is not None and records is None:
            config.records = _announced(model_id, options)
        return original(model, model_id, adapter_name, *args, **options)
    except BaseException:
        if config is not None:
            config.records = records
        # Who called this method of a PeftModel: whoever made one for it alone has added the adapter, too.
        made = sys._getframe(2).f_code is inspect.unwrap(PeftModel.from_pretrained).__code__
        if config is None or made:
            take_back(model, adapter_name, made)
        raise


def _announced(model_id: str | os.PathLike[str], options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a saved adapter says of its tensors: as where it is loaded anew, in a folder or from the hub."""
    from .config import DSTConfig
    from .delta import WEIGHTS_NAME, read_metadata

    folder = Path(model_id, options.get("subfolder") or "")
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        # PEFT needs none to load over an adapter.
        tensors = folder / WEIGHTS_NAME
        return read_metadata(tensors).get("records") if tensors.is_file() else None
    return getattr(DSTConfig.from_pretrained(model_id, **options), "records", None)


def _write_model_card(original: Any, model: PeftModel, output_dir: str) -> None:
    from .tuner.card import read_metadata, update_model_card

    before = read_metadata(output_dir)
    original(model, output_dir)
    update_model_card(output_dir, model, before)


def _upload(original: Any, model: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
    """`push_to_hub` saves the adapter and then writes the hub's own README over the new one: bring it up to date."""
    model.create_or_update_model_card(working_dir)
    return original(model, working_dir, *args, **kwargs)


def _stand_in(module: ModuleType, name: str, ours: Callable[..., Any]) -> None:
    """Let a function of PEFT that knows LoRA's layers only do what it is for with models that have DST's."""
    original = getattr(module, name)
    if hasattr(original, "dst_original"):
        return

    @functools.wraps(original)
    def wrapper(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from .tuner.layer import markers

        return (ours if any(markers(model)) else original)(model, *args, **kwargs)

    wrapper.__dict__["dst_original"] = original
    setattr(module, name, wrapper)
