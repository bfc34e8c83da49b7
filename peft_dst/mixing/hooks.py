"""A model that serves several subsets at once, for a while."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .batch import Batch, Host, Subsets
from .layouts import tensors_in
from .norms import is_norm, normalise
from .running import bias_by_sample, by_sample, corrected


@contextlib.contextmanager
def mixed(model: nn.Module, subsets: Subsets, names: Sequence[str], copies: int = 1) -> Iterator[None]:
    """While it lasts, each sample of a batch goes through a model with a subset of its own.

    The live weights must be the seed.

    Args:
        model: in evaluation mode.
        subsets: of the model.
        names: for each sample the name of a subset, or one that is not among them for the seed.
        copies: how many times `generate` repeats each sample (beams).
    """
    batch = Batch(model, subsets, names, copies)
    with contextlib.ExitStack() as stack:
        # Other weights stand there by the time of a backward pass, whose gradients would be wrong.
        stack.enter_context(torch.no_grad())
        # What is compiled knows nothing of hooks that come later.
        stack.enter_context(_eager())
        for module in subsets.callers:
            _watch(stack, module, batch.enter, batch.leave)
        for host in subsets.hosts:
            _attach(stack, host, batch)
        if subsets.hosts:
            stack.enter_context(_Guard(subsets.hosts, batch))
        yield


def _watch(
    stack: contextlib.ExitStack, module: nn.Module, enter: Callable[..., Any], leave: Callable[..., Any]
) -> None:
    """Have functions called before and after a module, the first before all others, and the second whatever happens."""
    before = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
    after = module.register_forward_hook(leave, with_kwargs=True, always_call=True)
    stack.callback(before.remove)
    stack.callback(after.remove)


def check_not_compiled() -> None:
    """To be called first: before the compiler gives up it follows everything that precedes a refusal, for minutes.

    Raises:
        RuntimeError: within what torch.compile made of a model.
    """
    with _eager():
        pass


def _eager() -> contextlib.AbstractContextManager[Any]:
    refusal = RuntimeError(
        "adapter_names were given to what torch.compile made of a PeftModel. Give them to the PeftModel itself; its base "
        "may be compiled: model.get_base_model().compile()."
    )
    if torch.compiler.is_compiling():
        raise refusal
    try:
        _STANCE.enter()
    except RuntimeError as error:
        raise refusal from error
    left = contextlib.ExitStack()
    left.callback(_STANCE.leave)
    return left


class _EagerStance:
    """Has everything run uncompiled from when the first thread enters until the last one has left.

    The compiler's stance is the process's. If each thread put back what it found, one that is left before another would
    switch that one's off, and the last would leave it on for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered: list[Any] = []

    def enter(self) -> None:
        """Enter.

        Raises:
            RuntimeError: within what is compiled.
        """
        with self._lock:
            self._entered.append(torch.compiler.set_stance("force_eager"))

    def leave(self) -> None:
        """Leave; the last one puts back what the first one found."""
        with self._lock:
            last = self._entered.pop()
            if not self._entered:
                last.__exit__(None, None, None)


_STANCE = _EagerStance()


def _attach(stack: contextlib.ExitStack, host: Host, batch: Batch) -> None:
    """Have a host serve the batch until the stack is left."""
    module, method = host.module, host.reader.method
    # torch's fused encoder layers, which call none of their children, are not used where there are hooks.
    _watch(stack, module, functools.partial(_before, host, batch), functools.partial(_after, host, batch))
    way: Callable[..., Any]
    if method != "forward":
        way = bias_by_sample
    elif host.corrections:
        way = corrected
    elif is_norm(host):
        way = normalise
    else:
        way = by_sample
    _replace(stack, module, method, functools.partial(way, host, batch, getattr(module, method)))


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
        # Shapes and the like, which make most of the calls; and in a trial the seed is whatever reads it.
        if not (result is None or isinstance(result, Tensor | list | tuple)) or batch.trial is not None:
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


def _before(host: Host, batch: Batch, module: nn.Module, args: Any, kwargs: Any) -> None:
    batch.enter(module, args, kwargs)
    if host.reader.method == "forward":
        batch.inside.append(host)
    else:
        batch.given = next(iter(tensors_in((args, kwargs))), None)


def _after(host: Host, batch: Batch, *_: Any) -> None:
    batch.leave()
    if host.reader.method == "forward":
        batch.inside.remove(host)
