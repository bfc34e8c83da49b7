"""A model that serves several subsets at once, for a while."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .batch import Batch, Host, Subsets
from .changes import StackedNorm
from .norms import is_norm, normalise
from .running import bias_by_sample, by_sample, run_tuned


@contextlib.contextmanager
def serve(model: nn.Module, subsets: Subsets, names: Sequence[str], copies: int = 1) -> Iterator[None]:
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
    # torch's fused encoder layers, which call none of their children, are not used where there are hooks.
    _watch(stack, module, functools.partial(_before, host, batch), functools.partial(_after, host, batch))
    if host.run is not None:
        _replace(stack, module, method, functools.partial(by_sample, host, batch, host.run))
    elif method != "forward":
        _replace(stack, module, method, functools.partial(bias_by_sample, host, batch, getattr(module, method)))
    elif host.corrects and _keeps_moments(module):
        _replace(stack, module, "forward", functools.partial(_normalise, host, batch))
    elif not host.corrects and is_norm(host):
        _replace(stack, module, "forward", functools.partial(normalise, host, batch, module.forward))
    elif not host.corrects:
        run = functools.partial(run_tuned, host, module.forward)
        _replace(stack, module, "forward", functools.partial(by_sample, host, batch, run))


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


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)


def _before(host: Host, batch: Batch, module: nn.Module, args: Any, kwargs: Any) -> None:
    batch.enter(module, args, kwargs)
    if host.reader.method == "forward":
        batch.inside.append(host)
    else:
        batch.given = _first_tensor(args, kwargs)


def _keeps_moments(module: nn.Module) -> bool:
    """Whether a module is a norm whose kernel also returns the moments of its input, not rounded to few bits."""
    if not isinstance(module, nn.LayerNorm) or type(module).forward is not nn.LayerNorm.forward:
        return False
    return module.weight.dtype in (torch.float32, torch.float64)


def _normalise(host: Host, batch: Batch, input: Tensor) -> Tensor:
    """What the module's own forward computes, with the moments kept for its correction."""
    module: Any = host.module
    shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
    if input.dtype != weight.dtype or torch.is_autocast_enabled(input.device.type):
        return functional.layer_norm(input, shape, weight, bias, eps)
    output, mean, scale = torch.native_layer_norm(input, shape, weight, bias, eps)
    batch.moments[host] = mean, scale
    return output


def _after(host: Host, batch: Batch, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
    """What a module returns: corrected, if it has run once for all samples."""
    batch.leave()
    if host.reader.method != "forward":
        return None
    batch.inside.remove(host)
    if not host.corrects or output is None:
        return None
    input = _first_tensor(args, kwargs)
    assert input is not None
    if batch.trial is not None:
        batch.note(host, [input], output)
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
        stacked = batch.stacked(host, names)
        if isinstance(stacked, StackedNorm) and host in batch.moments:
            mean, scale = (moment.expand(len(names), *moment.shape[1:]) for moment in batch.moments.pop(host))
            stacked = stacked._replace(moments=(mean, scale))
        if stacked is not None:
            stacked.correct(output, input)
    return output
