"""Whose sample is which in a batch, for whatever is being called now."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .changes import Changes, Reader
from .corrections import Arrangement, Correction, Stacked
from .layouts import Layout, Selected, compare, tensors_in, with_rows


T = TypeVar("T")
# By model: module's name, method and kind of input → layout.
_LAYOUTS: WeakKeyDictionary[nn.Module, dict[Any, Layout]] = WeakKeyDictionary()
# By model: name of a norm → whether it runs once for all samples.
_AT_ONCE: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


@dataclass(eq=False)
class Host:
    """A module that is called, and what subsets change of the parameters it reads.

    Attributes:
        reader: which one.
        changes: by subset.
        run: what to call once a subset, with its name and the arguments; the module's own method with the values written
            in, if not given.
    """

    reader: Reader
    changes: Mapping[str, Changes] = field(default_factory=dict)
    run: Callable[[str, tuple[Any, ...], dict[str, Any]], Any] | None = None

    def __post_init__(self) -> None:
        self.module = self.reader.module
        found = {name: change.correction for name, change in self.changes.items() if change.correction is not None}
        #: By subset, all of one kind; none if it does not run once for all samples.
        self.corrections: dict[str, Correction] = found if len(found) == len(self.changes) else {}
        #: Ids of the parameters that differ between subsets.
        self.parameters = {id(parameter) for change in self.changes.values() for parameter in change.parameters}

    @property
    def kind(self) -> type[Correction]:
        """Of its corrections."""
        return type(next(iter(self.corrections.values())))

    def __str__(self) -> str:
        return str(self.reader)


class Subsets:
    """Some subsets of one model, and what was arranged for batches of them.

    Args:
        modules: all modules of the model by their names.
        changes: by subset, what it changes.
        others: modules that differ between subsets in some other way.
        writing: held whenever a subset's values stand in the live weights, for those who read the seed there meanwhile.

    Attributes:
        modules: all modules of the model by their names.
        hosts: the modules that differ.
        callers: the modules that they are in.
        arrangements: of corrections, by host.
    """

    # Batches whose corrections are kept.
    LAST = 4

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        changes: Mapping[str, Mapping[Reader, Changes]],
        others: Sequence[Host] = (),
        writing: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        self.modules, self.writing = modules, writing or contextlib.nullcontext()
        readers = dict.fromkeys(reader for of_one in changes.values() for reader in of_one)
        self.hosts = [
            Host(reader, {name: of_one[reader] for name, of_one in changes.items() if reader in of_one})
            for reader in readers
        ]
        self.hosts += others
        parts = [host.reader.name.split(".") for host in self.hosts]
        above = {"", *(".".join(names[:i]) for names in parts for i in range(1, len(names)))}
        self.callers = [module for name, module in modules.items() if name in above]
        self.arrangements: dict[Host, Arrangement] = {}
        self._batches: OrderedDict[tuple[str, ...], dict[Any, Any]] = OrderedDict()

    def made_for(self, names: Sequence[str]) -> dict[Any, Any]:
        """What was made for a batch of these samples; to be added to."""
        found = self._batches.pop(tuple(names), {})
        self._batches[tuple(names)] = found
        if len(self._batches) > self.LAST:
            self._batches.popitem(last=False)
        return found


class Batch:
    """Whose sample is which, for whatever is being called now.

    Attributes:
        names: the subset of each sample.
        copies: how many times `generate` repeats each sample, beside calls where it does not.
        rows: how many rows the samples have in the outermost call of a module that is going on.
        calls: the modules that are being called, of those that hosts are in; with what the outermost one was given.
        inside: the hosts that are being called.
        given: what the module was given that computes a bias for all samples.
        selected: tensors of the outermost call whose rows were selected by their values.
        written: ids of the parameters that a host inside which this is has a subset's values in.
        at_once: norms by their names: whether they can run once for all samples.
        trial: while the layouts are found out: what each module was given and returned.
    """

    def __init__(self, model: nn.Module, subsets: Subsets, names: Sequence[str], copies: int):
        self._share(list(names))
        self.copies = copies
        self.rows = len(names)
        self.calls: list[tuple[nn.Module, Any, Any]] = []
        self.inside: list[Host] = []
        self.given: Tensor | None = None
        self.written: set[int] = set()
        self.selected = Selected()
        self.trial: dict[Any, list[list[torch.Size]]] | None = None
        self.writing = subsets.writing
        self._subsets = subsets
        self._arrangements, self._kept = subsets.arrangements, subsets.made_for(names)
        self.at_once = _AT_ONCE.setdefault(model, {})
        self._known = _LAYOUTS.setdefault(model, {})
        self._tried = False
        self._failure: Exception | None = None

    def _share(self, names: list[str]) -> None:
        self.names = names
        #: The one subset of all samples, if there is one: then it does not matter where they are.
        self.alone = names[0] if len(set(names)) == 1 else None

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module is called."""
        if not self.calls and self.trial is None and not self._known:
            # By the time of a trial the first layers have added to the cache.
            args, kwargs = tree_map(_with_own_cache, (args, kwargs))
        self.calls.append((module, args, kwargs))
        if len(self.calls) > 1 or self.trial is not None:
            return
        self._tried, self._failure = False, None
        # Who made the inputs of the model knows what is in their rows: beams are selected, for one.
        self.selected = Selected()
        sizes = [tensor.shape[0] for tensor in tensors_in((args, kwargs)) if tensor.dim()]
        repeated = len(self.names) * self.copies
        self.rows = repeated if repeated in sizes else len(self.names)

    def leave(self, *_: Any) -> None:
        """Note that the call of a module is over."""
        self.calls.pop()

    def layout(self, host: Host, tensors: Sequence[Tensor]) -> Layout:
        """The layouts of what a host is given, and then of what it returns. The live weights must be the seed."""
        key = _key(host, tensors)
        if key not in self._known and not self._tried and self.calls:
            self._tried = True
            self._try()
        layout = self._known.get(key, (None,) * len(tensors))
        return (
            tuple(None if tensor in self.selected else at for tensor, at in zip(tensors, layout, strict=False))
            + layout[len(tensors) :]
        )

    def names_for(self, host: Host, tensor: Tensor | None, at: bool | None) -> list[str]:
        """The subset of each row of a tensor with this layout.

        Raises:
            ValueError: if its rows are not the samples, and it has more than one.
        """
        size = tensor.shape[0] if tensor is not None and tensor.dim() else 0
        if (at and size == self.rows) or (at is False and size == 1):
            return [name for name in self.names for _ in range(self.rows // len(self.names))]
        shape = "no tensor" if tensor is None else f"an input of shape {tuple(tensor.shape)}"
        why = "this module does not get its samples along the first dimension"
        if tensor is not None and tensor in self.selected:
            why = "the rows that this module gets were selected by their values, as the tokens of an expert are"
        elif self._failure is not None:
            why = f"where this module has its samples is not known, as the model fails with one more ({self._failure})"
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(self.names)} names, and "
            f"{host} was given {shape}. If the names are right, then {why}, and it cannot serve several adapters at once: "
            "call the model with one adapter at a time, or tune the adapters with this module in exclude_modules."
        ) from self._failure

    @contextlib.contextmanager
    def only(self, adapter: str) -> Iterator[None]:
        """While it lasts all samples are one adapter's."""
        before = self.names
        self._share([adapter])
        try:
            yield
        finally:
            self._share(before)

    def correction(self, host: Host, input: Tensor) -> tuple[int, Stacked | None]:
        """How many rows what a host returns for an input has for the batch, and what corrects them.

        Raises:
            ValueError: as `names_for`.
        """
        # All that it depends on, but for rows that were selected; the guard need not see how it is looked up.
        with torch._C.DisableTorchFunction():
            key = host, input.dim(), input.shape[:1], self.rows, self.alone
            found = self._kept.get(key) if self.alone or input not in self.selected else None
        if found is None:
            names = (
                [self.alone] * len(input) if self.alone else self.names_for(host, input, self.layout(host, [input])[0])
            )
            with torch._C.DisableTorchFunction():
                found = self._kept[key] = len(names), self._stacked(host, names) if names else None
        return found

    def _stacked(self, host: Host, names: Sequence[str]) -> Stacked | None:
        """The corrections of a host for these rows, in groups as large as can be."""
        if (arrangement := self._arrangements.get(host)) is None:
            arrangement = self._arrangements[host] = host.kind.arrange(host.corrections, host.module)
        # Runs of one name whose lengths have a common divisor are made of groups of that size.
        size = math.gcd(*(len(list(run)) for _, run in groupby(names)))
        return arrangement(names[::size])

    def kept(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What was made under a key before, or is made now."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def note(self, host: Host, tensors: Sequence[Tensor], outputs: Any = ()) -> None:
        """Note what a host was given in a trial, and what it returned."""
        assert self.trial is not None
        shapes = [tensor.shape for tensor in (*tensors, *tensors_in(outputs))]
        self.trial.setdefault(_key(host, tensors), []).append(shapes)

    def _try(self) -> None:
        """Find out where modules have their samples: call the outermost one as it is called, and with a sample more.

        All modules are looked at, also those that only other subsets change: one trial is enough.
        """
        module, args, kwargs = self.calls[0]
        before = self.calls, self.inside, self.given
        found = []
        for rows in (self.rows, self.rows + 1):
            self.trial, self.calls, self.inside = {}, [], []
            try:
                more = functools.partial(with_rows, self.rows, rows)
                with self._noting_others():
                    module(*tree_map(more, args), **tree_map(more, kwargs))
            except Exception as error:
                # What had been called by then is known all the same; the rest is refused.
                self._failure = error
            found.append(self.trial)
            self.trial = None
            self.calls, self.inside, self.given = before
        for key in found[0].keys() | found[1].keys():
            self._known[key] = compare(found[0].get(key, []), found[1].get(key, []), self.rows)

    @contextlib.contextmanager
    def _noting_others(self) -> Iterator[None]:
        """Note what modules are given and return that are no hosts, as if they were."""
        hosts = {host.reader.name for host in self._subsets.hosts}
        with contextlib.ExitStack() as stack:
            for name, module in self._subsets.modules.items():
                if name not in hosts:
                    note = functools.partial(self._note_other, Host(Reader(name, module)))
                    stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
            yield

    def _note_other(self, host: Host, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensors = tensors_in((args, kwargs))
        # Whether it is corrected, by its first tensor, or runs once a subset, is not known yet.
        for given in (tensors, tensors[:1]) if len(tensors) > 1 else (tensors,):
            if given:
                self.note(host, given, output)


def _with_own_cache(leaf: Any) -> Any:
    """An argument of a model; a cache of transformers as it is now, whatever becomes of the original."""
    return copy.deepcopy(leaf) if hasattr(leaf, "batch_select_indices") else leaf


def _key(host: Host, tensors: Sequence[Tensor]) -> Any:
    return host.reader.name, host.reader.method, tuple((t.dim(), t.dim() > 0 and t.shape[0] == 1) for t in tensors)
