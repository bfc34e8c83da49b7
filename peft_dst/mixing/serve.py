"""A model that serves several subsets at once, for a while."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .batch import Batch, Host
from .changes import Changes, Reader
from .norms import is_norm, normalise
from .running import bias_by_sample, by_sample, run_tuned


@contextlib.contextmanager
def serve(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    names: Sequence[str],
    subsets: Mapping[str, Mapping[Reader, Changes]],
    others: Sequence[Host] = (),
    copies: int = 1,
    kept: dict[Any, Any] | None = None,
) -> Iterator[None]:
    """While it lasts, each sample of a batch goes through a model with a subset of its own.

    The live weights must be the seed.

    Args:
        model: in evaluation mode.
        modules: all its modules by their names.
        names: for each sample the name of a subset, or one that is not in `subsets` for the seed.
        subsets: what each of them changes.
        others: modules that differ between subsets in some other way.
        copies: how many times `generate` repeats each sample (beams).
        kept: what an earlier call with the same names and subsets has arranged, and this one adds to.
    """
    batch = Batch(model, names, copies, kept)
    readers = dict.fromkeys(reader for subset in subsets.values() for reader in subset)
    hosts = [
        Host(reader, {name: subset[reader] for name, subset in subsets.items() if reader in subset})
        for reader in readers
    ]
    hosts += others
    with contextlib.ExitStack() as stack:
        # Other weights stand there by the time of a backward pass, whose gradients would be wrong.
        stack.enter_context(torch.no_grad())
        # What is compiled knows nothing of hooks that come later.
        stack.enter_context(_eager())
        for module in _callers(modules, hosts):
            # First of all hooks, and whatever happens.
            stack.callback(module.register_forward_pre_hook(batch.enter, prepend=True, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(batch.leave, always_call=True).remove)
        for host in hosts:
            _attach(stack, host, batch)
        if hosts:
            stack.enter_context(_Guard(hosts, batch))
        yield


def _callers(modules: Mapping[str, nn.Module], hosts: Sequence[Host]) -> list[nn.Module]:
    """The hosts, and all modules that they are in."""
    names = {"", *(host.reader.name for host in hosts)}
    for host in hosts:
        parts = host.reader.name.split(".")
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


def _attach(stack: contextlib.ExitStack, host: Host, batch: Batch) -> None:
    """Have a host serve the batch until the stack is left."""
    module, method = host.module, host.reader.method
    if host.run is not None:
        _replace(stack, module, method, functools.partial(by_sample, host, batch, host.run))
        return
    if method != "forward":
        note = module.register_forward_pre_hook(functools.partial(_note_given, batch), with_kwargs=True)
        stack.callback(note.remove)
        _replace(stack, module, method, functools.partial(bias_by_sample, host, batch, getattr(module, method)))
        return
    if not host.corrects and is_norm(host):
        _replace(stack, module, "forward", functools.partial(normalise, host, batch, module.forward))
    elif not host.corrects:
        run = functools.partial(run_tuned, host, module.forward)
        _replace(stack, module, "forward", functools.partial(by_sample, host, batch, run))
    # torch's fused encoder layers, which call none of their children, are not used where there are hooks.
    enter = module.register_forward_pre_hook(lambda *_: batch.inside.append(host))
    leave = functools.partial(_after_forward, host, batch)
    stack.callback(enter.remove)
    stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)


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
        self.hosts = {key: host for host in hosts for key in host.parameters if host.reader.method == "forward"}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        batch = self.batch
        if batch.trial is not None:
            # The seed is whatever reads it.
            return result
        for argument in (*args, *kwargs.values()) if kwargs else args:
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


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)


def _note_given(batch: Batch, module: nn.Module, args: Any, kwargs: Any) -> None:
    batch.given = _first_tensor(args, kwargs)


def _after_forward(host: Host, batch: Batch, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
    """What a module returns that has run once for all samples, corrected."""
    batch.inside.remove(host)
    if not host.corrects or output is None:
        return None
    input = _first_tensor(args, kwargs)
    assert input is not None
    if batch.trial is not None:
        batch.note(host, [input])
        return None
    names = [batch.alone] * len(input) if batch.alone else batch.names_for(host, input, batch.layout(host, [input])[0])
    if not names:
        return None
    if input.shape[0] < len(names):
        # One row for all samples, as positions often are: from here on each has its own.
        input = input.expand(len(names), *input.shape[1:])
        output = output.expand(len(names), *output.shape[1:])
    output = output.contiguous()
    # What is done here is none of the guard's business.
    with torch._C.DisableTorchFunction():
        if (stacked := batch.stacked(host, names)) is not None:
            stacked.correct(output, input)
    return output
