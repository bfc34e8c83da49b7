"""What a subset changes, module by module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from .corrections import Correction, Entries, correction_of


#: PEFT's name for samples that no subset is for.
BASE = "__base__"
# Methods that make one bias for a whole batch from a table of relative positions, which is their module's child.
_BIAS_METHODS = ("compute_bias", "compute_position_bias")


class Reader(NamedTuple):
    """A module that is called, and reads parameters: its own, or a child's."""

    name: str
    module: nn.Module
    method: str = "forward"

    def __str__(self) -> str:
        return f"{self.name!r} ({type(self.module).__name__})"


class Readers:
    """Who reads which parameter of a model.

    Args:
        model: any module; its structure must stay as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self._owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
        # By the id of a child: whom to watch in its place.
        self._callers: dict[int, Reader] = {}
        for name, module in self.modules.items():
            for attribute, tensor in module._parameters.items():
                self._owners.setdefault(id(tensor), []).append((name, module, attribute))
            self._note_callers(name, module)

    def of(self, parameter: nn.Parameter) -> list[tuple[Reader, nn.Module, str]]:
        """Its readers, each with the module that has it, and its name there."""
        return [
            (self._callers.get(id(module)) or Reader(name, module), module, attribute)
            for name, module, attribute in self._owners[id(parameter)]
        ]

    def _note_callers(self, name: str, module: nn.Module) -> None:
        """Note modules that read a child's parameters, or use it for all samples at once."""
        if isinstance(module, nn.MultiheadAttention):
            self._callers[id(module.out_proj)] = self._callers[id(module)] = Reader(name, module)
        for method in _BIAS_METHODS:
            if hasattr(module, method):
                reader = Reader(name, module, method)
                self._callers |= {id(child): reader for child in module.children() if isinstance(child, nn.Embedding)}


class Patch(NamedTuple):
    """A subset's entries in one parameter, and who has it under which name. The live weight is the seed."""

    module: nn.Module
    attribute: str
    entries: Entries


class Whole(NamedTuple):
    """What takes the place of a module's parameter for a subset's samples. Others that it is tied to keep it."""

    module: nn.Module
    attribute: str
    parameter: nn.Parameter
    tensor: nn.Parameter
    tied: bool = False


@dataclass(eq=False)
class Changes:
    """What one subset changes of the parameters that one module reads.

    Attributes:
        patches: entries.
        wholes: whole tensors.
        correction: how the module's output with the seed is corrected; None if it runs with the values written in.
    """

    patches: list[Patch] = field(default_factory=list)
    wholes: list[Whole] = field(default_factory=list)
    correction: Correction | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are changed wherever they are read."""
        entries = [patch.entries.parameter for patch in self.patches]
        return entries + [whole.parameter for whole in self.wholes if not whole.tied]

    @property
    def nbytes(self) -> int:
        """Bytes of what was made for it; values, seeds and whole tensors are somebody else's."""
        made = sum(patch.entries.indices.nbytes for patch in self.patches)
        return made + (self.correction.nbytes if self.correction else 0)


def changes_of(readers: Readers, entries: Iterable[Entries], wholes: Sequence[Whole] = ()) -> dict[Reader, Changes]:
    """What a subset changes, by the modules that read it.

    Args:
        readers: of the model.
        entries: of the subset, for each parameter; none of them empty.
        wholes: whole tensors in the place of parameters.
    """
    found: dict[Reader, Changes] = {}
    for of_one in entries:
        for reader, module, attribute in readers.of(of_one.parameter):
            found.setdefault(reader, Changes()).patches.append(Patch(module, attribute, of_one))
    for whole in wholes:
        having = readers.of(whole.parameter)
        (reader,) = (r for r, module, attribute in having if (module, attribute) == (whole.module, whole.attribute))
        found.setdefault(reader, Changes()).wholes.append(whole._replace(tied=len(having) > 1))
    for reader, changes in found.items():
        if reader.method == "forward" and not changes.wholes:
            own = {patch.attribute: patch.entries for patch in changes.patches}
            changes.correction = correction_of(reader.module, own)
    return found
