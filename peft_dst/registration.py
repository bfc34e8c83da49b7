"""Makes DST a method of PEFT. The only code of this package that changes anything of PEFT's.

PEFT has no entry points, and its enum of methods is closed: a name that is not in it is refused by
`register_peft_method`, and a plain string in the mappings breaks transformers, which reads `peft_type.value`. So DST
becomes a real member of the enum, two methods of PeftModel learn to ask the tuner, and two functions that look for LoRA's
layers find DST's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from peft import PeftModel, helpers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, hotswap, register_peft_method
from torch import nn

from .core.hook import install


def _extend_peft_type() -> None:
    if "DST" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "DST")
    member._name_ = member._value_ = "DST"
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append("DST")
    PeftType._member_map_["DST"] = member
    PeftType._value2member_map_["DST"] = member
    # Attribute access finds members in the class; the enum's metaclass forbids setting them the ordinary way.
    type.__setattr__(PeftType, "DST", member)


def _ask_the_tuner(method: str) -> None:
    """Let a method of PeftModel defer to the tuner's own, where the tuner is DST's."""
    original = getattr(PeftModel, method)
    if hasattr(original, "dst_original"):
        return

    @functools.wraps(original)
    def wrapper(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        from .model import DSTModel

        tuner = self.base_model
        if isinstance(tuner, DSTModel):
            return getattr(tuner, method)(*args, **kwargs)
        return original(self, *args, **kwargs)

    wrapper.__dict__["dst_original"] = original
    setattr(PeftModel, method, wrapper)


def _extend_model_card() -> None:
    original = PeftModel.create_or_update_model_card
    if hasattr(original, "dst_original"):
        return

    @functools.wraps(original)
    def wrapper(self: PeftModel, output_dir: str) -> None:
        from .card import update_model_card
        from .model import DSTModel

        original(self, output_dir)
        if isinstance(self.base_model, DSTModel):
            update_model_card(output_dir, self)

    wrapper.__dict__["dst_original"] = original
    PeftModel.create_or_update_model_card = wrapper


def _stand_in(module: ModuleType, name: str, ours: Callable[..., Any]) -> None:
    """Let a function of PEFT that knows LoRA's layers only do what it is for with models that have DST's."""
    original = getattr(module, name)
    if hasattr(original, "dst_original"):
        return

    @functools.wraps(original)
    def wrapper(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from .layer import markers

        return (ours if any(markers(model)) else original)(model, *args, **kwargs)

    wrapper.__dict__["dst_original"] = original
    setattr(module, name, wrapper)


def register() -> None:
    """Register DST with PEFT. Importing `peft_dst` does this; calling it again changes nothing."""
    _extend_peft_type()
    if PeftType("DST") not in PEFT_TYPE_TO_CONFIG_MAPPING:
        from .config import DSTConfig
        from .model import DSTModel

        register_peft_method(name="dst", config_cls=DSTConfig, model_cls=DSTModel)
    install()
    _ask_the_tuner("get_nb_trainable_parameters")
    _extend_model_card()
    from .hotswap import hotswap_adapter
    from .rescale import rescale_adapter_scale

    _stand_in(hotswap, "hotswap_adapter", hotswap_adapter)
    _stand_in(helpers, "rescale_adapter_scale", rescale_adapter_scale)
