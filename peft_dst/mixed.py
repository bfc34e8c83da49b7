"""Several adapters in one batch: `model(**inputs, adapter_names=["a", "__base__", "b", …])`, a name for each sample.

While it lasts the live weights are the seed, and no gradients are recorded. Linear layers and embeddings run once for the
whole batch, and the samples of each adapter are corrected by its entries (`core.correction`). Any other module whose own
parameters an adapter changes (norms, convolutions, attention with parameters of its own, modules_to_save) runs once an
adapter, on its samples alone and with its values written in.

For that one must know which tensors have their samples along the first dimension, and a size does not tell: a batch may
have as many samples as its texts have tokens, or an expert tokens. So the first mixed batch of a model is also put through
the seed twice, as it is and with a sample more, before anything is corrected. What is then longer by one row has its
samples there; what has not changed is what all samples have in common. This is remembered for each module and kind of
input.

Served are modules that get their samples along the first dimension, or one row for all samples. Refused, by name:
- modules that get them along another dimension, or flattened with others (sequence-first layers, windows, routers);
- rows that were selected by their values (the tokens of an expert, unpadded texts), whatever their number is;
- images and sounds that are not one for each sample, as far as the placeholders in `input_ids` tell;
- caches handed to a module that would run more than once, and whatever else cannot be divided;
- parameters that somebody reads without calling the module that has them;
- a model that fails with a sample more, where that leaves a module unknown.
The model's own inputs are taken at their word: one with as many rows as there are names has a row for each sample.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from transformers.pytorch_utils import Conv1D

from . import exchange
from .core import scatter
from .core.correction import correct_embedding, correct_linear, embedding_entries, linear_difference
from .core.distances import wide_dtype
from .layer import SparseLayer
from .layouts import Layout, Selected, compare, with_rows
from .overlay import OverlayWeight


#: PEFT's name for samples that no adapter is for.
BASE = "__base__"
Rows = slice | Tensor
# Methods that make one bias for a whole batch from a table of relative positions, which is their module's child.
_BIAS_METHODS = ("compute_bias", "compute_position_bias")
# Besides tensors, what a module may be given that runs once an adapter: it does not change from one run to the next.
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)
# By model: module's name, method and kind of input → layout.
_LAYOUTS: WeakKeyDictionary[nn.Module, dict[Any, Layout]] = WeakKeyDictionary()
# The placeholders that multimodal models have in their input_ids, as their configs call them.
_PLACEHOLDER = re.compile(r"(image|video|audio|speech|vision)_token_(id|index)")
# Inputs that have a row for each sample in these models.
_NO_IMAGES = re.compile("embeds|mask|labels|ids|position")


class Patch(NamedTuple):
    """One adapter's entries in one parameter, whose live weight (`data`) is the seed."""

    module: nn.Module
    attribute: str
    data: Tensor
    indices: Tensor
    values: Tensor
    seeds: Tensor


@dataclass(eq=False)
class Host:
    """A module that is called, and what adapters change of the parameters it reads: adapter → patches."""

    name: str
    module: nn.Module
    method: str = "forward"
    tuned: dict[str, list[Patch]] = field(default_factory=dict)
    parameters: set[int] = field(default_factory=set)
    overlaid: OverlayWeight | None = None

    def __str__(self) -> str:
        return f"{self.name!r} ({type(self.module).__name__})"


class Batch:
    """Whose sample is which, for whatever is being called now.

    Attributes:
        names: the adapter of each sample.
        copies: how many times `generate` repeats each sample, beside calls where it does not.
        rows: how many rows the samples have in the outermost call of a module that is going on.
        calls: the modules that are being called, of those that hosts are in; with what the outermost one was given.
        inside: the hosts that are being called.
        given: what the module was given that computes a bias for all samples.
        selected: tensors of the outermost call whose rows were selected by their values.
        trial: while the layouts are found out: what each module was given and returned.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], copies: int):
        self.names = list(names)
        self.copies = copies
        self.rows = len(names)
        self.calls: list[tuple[nn.Module, Any, Any]] = []
        self.inside: list[Host] = []
        self.given: Tensor | None = None
        self.selected = Selected()
        self.trial: dict[Any, list[list[torch.Size]]] | None = None
        self._known = _LAYOUTS.setdefault(model, {})
        self._tried = False
        self._failure: Exception | None = None

    @property
    def alone(self) -> str | None:
        """The one adapter of all samples, if there is one: then it does not matter where they are."""
        return self.names[0] if len(set(self.names)) == 1 else None

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module is called."""
        self.calls.append((module, args, kwargs))
        if len(self.calls) > 1 or self.trial is not None:
            return
        self._tried, self._failure = False, None
        # Who made the inputs of the model knows what is in their rows: beams are selected, for one.
        self.selected = Selected()
        sizes = [leaf.shape[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
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
        """The adapter of each row of a tensor with this layout.

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
        self.names = [adapter]
        try:
            yield
        finally:
            self.names = before

    def note(self, host: Host, tensors: Sequence[Tensor], outputs: Any = ()) -> None:
        """Note what a host was given in a trial, and what it returned."""
        assert self.trial is not None
        shapes = [leaf.shape for leaf in (*tensors, *tree_leaves(outputs)) if isinstance(leaf, Tensor)]
        self.trial.setdefault(_key(host, tensors), []).append(shapes)

    def _try(self) -> None:
        """Find out where modules have their samples: call the outermost one as it is called, and with a sample more."""
        module, args, kwargs = self.calls[0]
        before = self.calls, self.inside, self.given
        found = []
        for rows in (self.rows, self.rows + 1):
            self.trial, self.calls, self.inside = {}, [], []
            try:
                more = functools.partial(with_rows, self.rows, rows)
                module(*tree_map(more, args), **tree_map(more, kwargs))
            except Exception as error:
                # What had been called by then is known all the same; the rest is refused.
                self._failure = error
            found.append(self.trial)
            self.trial = None
            self.calls, self.inside, self.given = before
        for key in found[0].keys() | found[1].keys():
            self._known[key] = compare(found[0].get(key, []), found[1].get(key, []), self.rows)


def _key(host: Host, tensors: Sequence[Tensor]) -> Any:
    return host.name, host.method, tuple((t.dim(), t.dim() > 0 and t.shape[0] == 1) for t in tensors)


def segments(names: Sequence[str]) -> dict[str, Rows]:
    """The rows of each adapter: a slice if they are consecutive, else int64 (r,)."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return {
        name: slice(at[0], at[-1] + 1) if at[-1] - at[0] == len(at) - 1 else torch.tensor(at)
        for name, at in rows.items()
    }


def _count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def check_length(names: Sequence[str], inputs: Any) -> None:
    """Check that there is a name for each sample, as far as a model's inputs tell how many those are.

    Raises:
        ValueError: if no input has as many rows.
    """
    sizes = [leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    if sizes and len(names) not in sizes:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} names for inputs of {', '.join(map(str, dict.fromkeys(sizes)))} rows."
        )


def check_placeholders(model: nn.Module, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check that images (videos, sounds) that are as many as the samples are one for each, by their placeholders.

    There is one for each if every sample has a placeholder. Models that know none have no say in it: there the rows of
    every input are samples, as with CLIP.

    Args:
        model: the base model, whose config names the placeholders.
        names: for each sample the name of an adapter.
        args: what the model is given: its input_ids, int64 (batch, length), come first,
        kwargs: or by name, and floating tensors of two dimensions or more.

    Raises:
        ValueError: if a sample has none of what another one has, or there are no input_ids to tell.
    """
    config = getattr(model, "config", None)
    found = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    tokens = {value for key, value in found.items() if _PLACEHOLDER.fullmatch(key) and isinstance(value, int)}
    given = {key: value for key, value in kwargs.items() if isinstance(value, Tensor) and not _NO_IMAGES.search(key)}
    others = [t for t in given.values() if t.dim() > 1 and t.is_floating_point() and len(t) == len(names)]
    if not (tokens and others) or len(set(names)) == 1:
        return
    ids = kwargs.get("input_ids", args[0] if args else None)
    have = [(ids == token).any(1).tolist() for token in tokens] if isinstance(ids, Tensor) and ids.dim() == 2 else []
    if any(any(of_one) and not all(of_one) for of_one in have) or not any(map(any, have)):
        raise ValueError(
            f"{len(others[0])} images (or the like, {tuple(others[0].shape)}) were given for as many samples, but not one "
            "for each, as far as the placeholders in input_ids tell. Whose adapter each of them is for is not known: give "
            "each sample one, or call the model with one adapter at a time."
        )


@contextlib.contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str], copies: int = 1) -> Iterator[None]:
    """While it lasts, each sample of a batch goes through the model with an adapter of its own.

    Args:
        model: a model with DST adapters, in evaluation mode.
        names: for each sample the name of an adapter, or "__base__".
        copies: how many times `generate` repeats each sample (beams).

    Raises:
        ValueError: if the model is in training mode, an adapter does not exist or is merged.
        RuntimeError: if an adapter's tensors were not loaded.
    """
    wanted = dict.fromkeys(names)
    modules = dict(model.named_modules())
    found = [module for module in modules.values() if isinstance(module, SparseLayer)]
    if any(marker.disable_adapters for marker in found):
        # The seed shows, whatever is active, as with PEFT's LoRA.
        yield
        return
    _check(model, found, wanted.keys() - {BASE})
    # One adapter for all samples needs no corrections: it may as well stand in the weights.
    alone = tuple(wanted.keys() - {BASE}) if len(wanted) == 1 else ()
    batch = Batch(model, names, copies)
    with contextlib.ExitStack() as stack:
        # Other weights stand there by the time of a backward pass, whose gradients would be wrong.
        stack.enter_context(torch.no_grad())
        # What is compiled knows nothing of hooks that come later.
        stack.enter_context(_eager())
        for marker in found:
            stack.callback(marker.show, None)
            marker.show(alone)
        hosts = [] if len(wanted) == 1 else _hosts(modules, found, wanted.keys() - {BASE})
        hosts += [Host(name, module) for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)]
        for module in _callers(modules, hosts):
            # First of all hooks, and whatever happens.
            stack.callback(module.register_forward_pre_hook(batch.enter, prepend=True, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(batch.leave, always_call=True).remove)
        for host in hosts:
            (_attach_copies if isinstance(host.module, ModulesToSaveWrapper) else _attach)(stack, host, batch)
        if hosts:
            stack.enter_context(_Guard(hosts, batch))
        yield


def _callers(modules: Mapping[str, nn.Module], hosts: Sequence[Host]) -> list[nn.Module]:
    """The hosts, and all modules that they are in."""
    names = {"", *(host.name for host in hosts)}
    for host in hosts:
        parts = host.name.split(".")
        names.update(".".join(parts[:i]) for i in range(1, len(parts)))
    return [module for name, module in modules.items() if name in names]


def _eager() -> contextlib.AbstractContextManager[Any]:
    refusal = RuntimeError(
        "adapter_names were given to what torch.compile made of a PeftModel. Give them to the PeftModel itself; its base "
        "may be compiled: model.get_base_model().compile()."
    )
    if torch.compiler.is_compiling():
        raise refusal
    try:
        return torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise refusal from error


def _check(model: nn.Module, found: Sequence[SparseLayer], wanted: set[str]) -> None:
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first.")
    existing = exchange.constraints(model).keys()
    if unknown := sorted(wanted - existing):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are {', '.join(existing)}."
        )
    if any(marker.merged for marker in found):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    if any(marker.awaited for marker in found):
        exchange.check_loaded(model, wanted)


# Which modules to change


def _hosts(modules: Mapping[str, nn.Module], found: Sequence[SparseLayer], adapters: set[str]) -> list[Host]:
    """Every module that reads a parameter which one of the adapters changes. The live weights are the seed now."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    callers: dict[int, Host] = {}
    for name, module in modules.items():
        for attribute, tensor in module._parameters.items():
            owners.setdefault(id(tensor), []).append((name, module, attribute))
        _note_callers(name, module, callers)
    hosts: dict[int, Host] = {}
    for marker in found:
        marker.refresh()
        for adapter in adapters & marker.tuned.keys():
            for parameter, record in marker.scaled_records(adapter).items():
                if not record.indices.numel():
                    continue
                weight = marker.weights[parameter]
                indices = record.indices.to(weight.data.device, torch.int64)
                values, seeds = record.values.to(weight.data), weight.seeds_at(indices)
                for name, module, attribute in owners[id(weight.parameter)]:
                    caller = callers.get(id(module)) or Host(name, module)
                    host = hosts.setdefault(id(caller.module), caller)
                    if isinstance(weight, OverlayWeight):
                        host.overlaid = weight
                    patch = Patch(module, attribute, weight.data, indices, values, seeds)
                    host.tuned.setdefault(adapter, []).append(patch)
                    host.parameters.add(id(weight.parameter))
    return list(hosts.values())


def _note_callers(name: str, module: nn.Module, callers: dict[int, Host]) -> None:
    """Note whom to watch in a child's place: modules that read a child's parameters, or use it for all samples at once."""
    if isinstance(module, nn.MultiheadAttention):
        callers[id(module.out_proj)] = callers[id(module)] = Host(name, module)
    for method in _BIAS_METHODS:
        if hasattr(module, method):
            host = Host(name, module, method)
            callers |= {id(child): host for child in module.children() if isinstance(child, nn.Embedding)}


def _attach(stack: contextlib.ExitStack, host: Host, batch: Batch) -> None:
    """Have a host serve the batch until the stack is left."""
    module = host.module
    if host.method != "forward":
        note = module.register_forward_pre_hook(functools.partial(_note_given, batch), with_kwargs=True)
        stack.callback(note.remove)
        _replace(
            stack, module, host.method, functools.partial(_bias_by_sample, host, batch, getattr(module, host.method))
        )
        return
    correct = _corrector(host)
    if correct is None:
        run = functools.partial(_run_tuned, host, module.forward)
        _replace(stack, module, "forward", functools.partial(_by_sample, host, batch, run))
    # torch's fused encoder layers, which call none of their children, are not used where there are hooks.
    enter = module.register_forward_pre_hook(lambda *_: batch.inside.append(host))
    leave = functools.partial(_after_forward, host, batch, correct)
    stack.callback(enter.remove)
    stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)


def _attach_copies(stack: contextlib.ExitStack, host: Host, batch: Batch) -> None:
    """Have each sample go through its adapter's own dense copy of a module, if that has one."""

    def run(adapter: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wrapper = cast(ModulesToSaveWrapper, host.module)
        own = adapter in wrapper.modules_to_save
        return (wrapper.modules_to_save[adapter] if own else wrapper.original_module)(*args, **kwargs)

    _replace(stack, host.module, "forward", functools.partial(_by_sample, host, batch, run))


def _replace(stack: contextlib.ExitStack, module: nn.Module, method: str, function: Callable[..., Any]) -> None:
    """Put a function in the place of a method of one module, until the stack is left."""
    if method in vars(module):
        stack.callback(module.__dict__.__setitem__, method, vars(module)[method])
    else:
        stack.callback(module.__dict__.pop, method)
    module.__dict__[method] = function


class _Guard(TorchFunctionMode):
    """Refuses whatever makes a tensor of a changed parameter, unless its host was called to do so.

    And follows the tensors whose rows are no longer those of the samples because they were selected by their values.
    """

    def __init__(self, hosts: Sequence[Host], batch: Batch):
        super().__init__()
        self.batch = batch
        self.hosts = {key: host for host in hosts for key in host.parameters if host.method == "forward"}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        batch = self.batch
        if batch.trial is not None:
            # The seed is whatever reads it.
            return result
        for argument in (*args, *kwargs.values()):
            for tensor in argument if isinstance(argument, list | tuple) else (argument,):
                host = self.hosts.get(id(tensor))
                if host and not any(id(tensor) in h.parameters for h in batch.inside) and _has_tensor(result):
                    raise NotImplementedError(
                        f"a parameter of {host} is read without calling that module, so samples of several adapters "
                        "cannot be told apart there. Call the model with one adapter at a time, or tune the adapters "
                        "with this module in exclude_modules."
                    )
        if batch.calls and batch.alone is None:
            batch.selected.follow(func, args, kwargs, result, batch.rows)
        return result


def _has_tensor(result: Any) -> bool:
    return any(isinstance(part, Tensor) for part in (result if isinstance(result, list | tuple) else (result,)))


# Once for all samples, and corrected

Correct = Callable[[str, Tensor, Tensor], None]


def _corrector(host: Host) -> Correct | None:
    """What corrects an adapter's part of a host's output, given its part of the input; None if nothing does."""
    forward = type(host.module).forward
    if host.overlaid is not None:
        return _linear_corrector(host, host.overlaid.inputs_first)
    if forward is nn.Linear.forward or forward is Conv1D.forward:
        return _linear_corrector(host, inputs_first=forward is Conv1D.forward)
    if forward is nn.Embedding.forward and host.module.max_norm is None:
        return _embedding_corrector(host)
    return None


def _linear_corrector(host: Host, inputs_first: bool) -> Correct:
    weights, biases = {}, {}
    for adapter, patches in host.tuned.items():
        for patch in patches:
            if patch.attribute == "weight":
                shape = cast(tuple[int, int], tuple(patch.data.shape))
                difference = linear_difference(patch.indices, patch.values, patch.seeds, shape, inputs_first)
                weights[adapter] = difference
            else:
                wide = wide_dtype(patch.values)
                biases[adapter] = patch.indices, patch.values.to(wide) - patch.seeds.to(wide)

    def correct(adapter: str, output: Tensor, input: Tensor) -> None:
        if adapter in weights:
            correct_linear(output, input, weights[adapter])
        if adapter in biases:
            indices, differences = biases[adapter]
            output[..., indices] += differences.to(output.dtype)

    return correct


def _embedding_corrector(host: Host) -> Correct:
    entries = {
        adapter: embedding_entries(patch.indices, patch.values, cast(tuple[int, int], tuple(patch.data.shape)))
        for adapter, patches in host.tuned.items()
        for patch in patches
    }

    def correct(adapter: str, output: Tensor, input: Tensor) -> None:
        correct_embedding(output, input, entries[adapter])

    return correct


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)


def _after_forward(
    host: Host, batch: Batch, correct: Correct | None, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> Tensor | None:
    batch.inside.remove(host)
    if correct is None or output is None:
        return None
    input = _first_tensor(args, kwargs)
    assert input is not None
    if batch.trial is not None:
        batch.note(host, [input])
        return None
    names = [batch.alone] * len(input) if batch.alone else batch.names_for(host, input, batch.layout(host, [input])[0])
    if input.shape[0] < len(names):
        # One row for all samples, as positions often are: from here on each has its own.
        input = input.expand(len(names), *input.shape[1:])
        output = output.expand(len(names), *output.shape[1:])
    output = output.contiguous()
    for adapter, rows in segments(names).items():
        if adapter in host.tuned:
            # What is done here is none of the guard's business.
            with torch._C.DisableTorchFunction():
                part = output[rows]
                correct(adapter, part, input[rows])
                if not isinstance(rows, slice):
                    output[rows] = part
    return output


# Once an adapter, on its samples


def _by_sample(
    host: Host, batch: Batch, run: Callable[[str, tuple[Any, ...], dict[str, Any]], Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a module once an adapter on its samples, and put the outputs together."""
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if batch.trial is not None:
        output = run(BASE, args, kwargs)
        batch.note(host, tensors, output)
        return output
    if batch.alone:
        return run(batch.alone, args, kwargs)
    layout = batch.layout(host, tensors)
    # What all samples have in common is no obstacle beside something that has their rows.
    telling = next((i for i, at in enumerate(layout[: len(tensors)]) if at is not False), 0)
    bad = next((i for i, at in enumerate(layout[: len(tensors)]) if at is None), telling)
    names = batch.names_for(host, tensors[bad] if tensors else None, layout[bad] if tensors else None)
    first = tensors[0]
    # Attention and recurrent layers of torch: what is first need not be the sample, and theirs mix what is not.
    if not getattr(host.module, "batch_first", True) or (hasattr(host.module, "batch_first") and first.dim() < 3):
        raise NotImplementedError(
            f"{host} was given an input of shape {tuple(first.shape)} whose first dimension is not the sample. Make it "
            "with batch_first=True and call it with batches, call the model with one adapter at a time, or tune the "
            "adapters with this module in exclude_modules."
        )
    _check_plain(host, leaves)
    parts = segments(names)
    outputs = []
    for adapter, rows in parts.items():
        # What is done here is none of the guard's business.
        with torch._C.DisableTorchFunction():
            divided = iter([tensor[rows] if at else tensor for tensor, at in zip(tensors, layout, strict=False)])
        given = tree_unflatten([next(divided) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        with batch.only(adapter):
            outputs.append(run(adapter, *given))
    return _join(host, outputs, list(parts.values()), layout[len(tensors) :])


def _check_plain(host: Host, arguments: Any) -> None:
    for leaf in tree_leaves(arguments):
        if not isinstance(leaf, (Tensor, *_PLAIN)):
            raise NotImplementedError(
                f"{host} has parameters that differ between adapters, and so runs once an adapter; but it was given a "
                f"{type(leaf).__name__}, which cannot be divided by sample. Call the model with one adapter at a time, or "
                "(for a cache) with use_cache=False, or tune the adapters with this module in exclude_modules."
            )


def _run_tuned(
    host: Host, forward: Callable[..., Any], adapter: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    with contextlib.ExitStack() as stack:
        for patch in (patch for patches in host.tuned.values() for patch in patches):
            if getattr(patch.module, "max_norm", None) is not None:
                # Such an embedding shortens whole rows when it is called, with whatever values, beyond the entries.
                stack.callback(patch.data.copy_, patch.data.clone())
        for patch in host.tuned.get(adapter, ()):
            stack.callback(scatter, patch.data, patch.indices, patch.seeds)
            scatter(patch.data, patch.indices, patch.values)
        return forward(*args, **kwargs)


def _join(host: Host, outputs: list[Any], rows: list[Rows], layout: Layout) -> Any:
    """Put the samples of all adapters back in their order, in whatever structure they came."""
    layouts = iter(layout)
    counts = [_count(at) for at in rows]
    places = torch.cat([torch.arange(at.start, at.stop) if isinstance(at, slice) else at for at in rows])
    order = None if bool((places.diff() > 0).all()) else places.argsort()
    flat = [tree_flatten(output) for output in outputs]

    def join(leaves: Sequence[Any]) -> Any:
        if not isinstance(leaves[0], Tensor):
            if any(isinstance(leaf, Tensor) or leaf != leaves[0] for leaf in leaves):
                raise NotImplementedError(f"{host} returns values that cannot be put together for several adapters.")
            return leaves[0]
        common = all(leaf.dim() and leaf.shape[0] == 1 for leaf in leaves)
        # Rows that all samples have in common may happen to be as many as an adapter's samples.
        fits = next(layouts, None) or common
        if common:
            # One row for all samples of an adapter, as positions often are.
            leaves = [leaf.expand(n, *leaf.shape[1:]) for leaf, n in zip(leaves, counts, strict=True)]
        fits = fits and all(leaf.dim() and leaf.shape[0] == n for leaf, n in zip(leaves, counts, strict=True))
        if not fits or any(leaf.shape[1:] != leaves[0].shape[1:] for leaf in leaves):
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise ValueError(
                f"{host} returns tensors of shapes {shapes} for {', '.join(map(str, counts))} samples of the adapters in "
                "this batch, which cannot be put together. Heads of modules_to_save must have the same width; otherwise "
                "call the model with one adapter at a time."
            )
        with torch._C.DisableTorchFunction():
            joined = torch.cat(list(leaves))
            return joined if order is None else joined[order]

    if any(spec != flat[0][1] for _, spec in flat):
        raise NotImplementedError(f"{host} returns different structures for the adapters in this batch.")
    return tree_unflatten([join(leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)], flat[0][1])


# One bias for all samples


def _note_given(batch: Batch, module: nn.Module, args: Any, kwargs: Any) -> None:
    batch.given = _first_tensor(args, kwargs)


def _bias_by_sample(host: Host, batch: Batch, method: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A bias of relative positions (1 or batch, heads, queries, keys), which each adapter makes from its own table."""
    given = [] if batch.given is None else [batch.given]
    if batch.trial is not None:
        batch.note(host, given)
        return method(*args, **kwargs)
    if batch.alone:
        return _run_tuned(host, method, batch.alone, args, kwargs)
    names = batch.names_for(host, batch.given, batch.layout(host, given)[0] if given else None)
    made = {}
    for adapter in dict.fromkeys(names):
        with batch.only(adapter):
            made[adapter] = _run_tuned(host, method, adapter, args, kwargs)
        if made[adapter].dim() != 4 or made[adapter].shape[0] not in (1, len(names)):
            raise NotImplementedError(
                f"{host} computes a bias of shape {tuple(made[adapter].shape)}, where one of (batch, heads, queries, keys) "
                "could be divided by sample. Call the model with one adapter at a time."
            )
    return torch.stack([made[name][min(row, made[name].shape[0] - 1)] for row, name in enumerate(names)])
