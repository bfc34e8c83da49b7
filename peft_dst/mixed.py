"""Several adapters in one batch: `model(**inputs, adapter_names=["a", "__base__", "b", …])`, a name for each sample.

While it lasts the live weights are the seed, and no gradients are recorded. Linear layers and embeddings run once for the
whole batch, and the samples of each adapter are corrected by its entries (`core.correction`). Any other module whose own
parameters an adapter changes (norms, convolutions, attention with parameters of its own, modules_to_save) runs once an
adapter, on its samples alone and with its values written in.

What cannot be told apart by sample is refused by name: flattened tokens of mixtures of experts, caches handed to a module
that would run more than once, and parameters that somebody reads without calling the module that has them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

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
from .overlay import OverlayWeight


#: PEFT's name for samples that no adapter is for.
BASE = "__base__"
Rows = slice | Tensor
# Methods that make one bias for a whole batch from a table of relative positions, which is their module's child.
_BIAS_METHODS = ("compute_bias", "compute_position_bias")
# Besides tensors, what a module may be given that runs once an adapter: it does not change from one run to the next.
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


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
        size: number of samples in the last call of a module that computes a bias for all of them.
        inside: the hosts that are being called.
    """

    def __init__(self, names: Sequence[str], copies: int):
        self.names = list(names)
        self.copies = copies
        self.size = len(names)
        self.inside: list[Host] = []

    def names_for(self, host: Host, tensor: Tensor | None) -> list[str]:
        """The adapter of each row of an input.

        Raises:
            ValueError: if its rows are not the samples.
        """
        size = tensor.shape[0] if tensor is not None and tensor.dim() else 0
        # A vector of ids could as well be positions that all samples have in common.
        if size and not (tensor is not None and tensor.dim() == 1 and isinstance(host.module, nn.Embedding)):
            if size in (1, len(self.names)):
                return self.names
            if size == len(self.names) * self.copies:
                return [name for name in self.names for _ in range(self.copies)]
        shape = "no tensor" if tensor is None else f"an input of shape {tuple(tensor.shape)}"
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(self.names)} names, and "
            f"{host} was given {shape}. If the names are right, then this module does not get its samples along the first "
            "dimension, and cannot serve several adapters at once: call the model with one adapter at a time, or tune the "
            "adapters with this module in exclude_modules."
        )

    @contextlib.contextmanager
    def only(self, adapter: str, rows: int) -> Iterator[None]:
        """While it lasts all samples are one adapter's."""
        before = self.names, self.copies, self.size
        self.names, self.copies, self.size = [adapter] * rows, 1, rows
        try:
            yield
        finally:
            self.names, self.copies, self.size = before


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
    batch = Batch(names, copies)
    with contextlib.ExitStack() as stack:
        # Other weights stand there by the time of a backward pass, whose gradients would be wrong.
        stack.enter_context(torch.no_grad())
        # What is compiled knows nothing of hooks that come later.
        stack.enter_context(_eager())
        for marker in found:
            stack.callback(marker.show, None)
            marker.show(alone)
        hosts = [] if len(wanted) == 1 else _hosts(modules, found, wanted.keys() - {BASE})
        for host in hosts:
            _attach(stack, host, batch)
        for name, module in modules.items():
            if isinstance(module, ModulesToSaveWrapper):
                _attach_copies(stack, Host(name, module), batch)
        if hosts:
            stack.enter_context(_Guard(hosts, batch))
        yield


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
        note = module.register_forward_pre_hook(functools.partial(_note_size, batch), with_kwargs=True)
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
    """Refuses whatever makes a tensor of a changed parameter, unless its host was called to do so."""

    def __init__(self, hosts: Sequence[Host], batch: Batch):
        super().__init__()
        self.batch = batch
        self.hosts = {key: host for host in hosts for key in host.parameters if host.method == "forward"}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for argument in (*args, *(kwargs or {}).values()):
            for tensor in argument if isinstance(argument, list | tuple) else (argument,):
                host = self.hosts.get(id(tensor))
                if host and not any(id(tensor) in h.parameters for h in self.batch.inside) and _has_tensor(result):
                    raise NotImplementedError(
                        f"a parameter of {host} is read without calling that module, so samples of several adapters "
                        "cannot be told apart there. Call the model with one adapter at a time, or tune the adapters "
                        "with this module in exclude_modules."
                    )
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
    names = batch.names_for(host, input)
    assert input is not None
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
    first = _first_tensor(args, kwargs)
    names = batch.names_for(host, first)
    assert first is not None
    # Attention and recurrent layers of torch: what is first need not be the sample, and theirs mix what is not.
    if not getattr(host.module, "batch_first", True) or (hasattr(host.module, "batch_first") and first.dim() < 3):
        raise NotImplementedError(
            f"{host} was given an input of shape {tuple(first.shape)} whose first dimension is not the sample. Make it "
            "with batch_first=True and call it with batches, call the model with one adapter at a time, or tune the "
            "adapters with this module in exclude_modules."
        )
    size = first.shape[0]
    parts = segments(names)
    if len(parts) > 1:
        _check_plain(host, (args, kwargs))
    outputs = []
    for adapter, rows in parts.items():

        def take(leaf: Any, rows: Rows = rows) -> Any:
            return (
                leaf[rows] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size == len(names) else leaf
            )

        with batch.only(adapter, _count(rows)):
            outputs.append(run(adapter, tree_map(take, args), tree_map(take, kwargs)))
    return outputs[0] if len(outputs) == 1 else _join(host, outputs, list(parts.values()))


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
        for patch in host.tuned.get(adapter, ()):
            if getattr(patch.module, "max_norm", None) is not None:
                # Such an embedding shortens whole rows when it is called, beyond the entries that can be put back.
                stack.callback(patch.data.copy_, patch.data.clone())
            stack.callback(scatter, patch.data, patch.indices, patch.seeds)
            scatter(patch.data, patch.indices, patch.values)
        return forward(*args, **kwargs)


def _join(host: Host, outputs: list[Any], rows: list[Rows]) -> Any:
    """Put the samples of all adapters back in their order, in whatever structure they came."""
    counts = [_count(at) for at in rows]
    places = torch.cat([torch.arange(at.start, at.stop) if isinstance(at, slice) else at for at in rows])
    order = None if bool((places.diff() > 0).all()) else places.argsort()
    flat = [tree_flatten(output) for output in outputs]

    def join(leaves: Sequence[Any]) -> Any:
        if not isinstance(leaves[0], Tensor):
            if any(isinstance(leaf, Tensor) or leaf != leaves[0] for leaf in leaves):
                raise NotImplementedError(f"{host} returns values that cannot be put together for several adapters.")
            return leaves[0]
        if all(leaf.dim() and leaf.shape[0] == 1 for leaf in leaves):
            # One row for all samples of an adapter, as positions often are.
            leaves = [leaf.expand(n, *leaf.shape[1:]) for leaf, n in zip(leaves, counts, strict=True)]
        fits = all(leaf.dim() and leaf.shape[0] == n for leaf, n in zip(leaves, counts, strict=True))
        if not fits or any(leaf.shape[1:] != leaves[0].shape[1:] for leaf in leaves):
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise ValueError(
                f"{host} returns tensors of shapes {shapes} for {', '.join(map(str, counts))} samples of the adapters in "
                "this batch, which cannot be put together. Heads of modules_to_save must have the same width; otherwise "
                "call the model with one adapter at a time."
            )
        joined = torch.cat(list(leaves))
        return joined if order is None else joined[order]

    if any(spec != flat[0][1] for _, spec in flat):
        raise NotImplementedError(f"{host} returns different structures for the adapters in this batch.")
    return tree_unflatten([join(leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)], flat[0][1])


# One bias for all samples


def _note_size(batch: Batch, module: nn.Module, args: Any, kwargs: Any) -> None:
    first = _first_tensor(args, kwargs)
    if first is not None:
        batch.size = first.shape[0]


def _bias_by_sample(host: Host, batch: Batch, method: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A bias of relative positions (1 or batch, heads, queries, keys), which each adapter makes from its own table."""
    names = batch.names_for(host, torch.empty(batch.size, 0))
    made = {}
    for adapter in dict.fromkeys(names):
        with batch.only(adapter, batch.size):
            made[adapter] = _run_tuned(host, method, adapter, args, kwargs)
        if made[adapter].dim() != 4 or made[adapter].shape[0] not in (1, len(names)):
            raise NotImplementedError(
                f"{host} computes a bias of shape {tuple(made[adapter].shape)}, where one of (batch, heads, queries, keys) "
                "could be divided by sample. Call the model with one adapter at a time."
            )
    if len(made) == 1:
        return made[names[0]]
    return torch.stack([made[name][min(row, made[name].shape[0] - 1)] for row, name in enumerate(names)])
