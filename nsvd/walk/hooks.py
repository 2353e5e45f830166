"""Look at the inputs of named layers while a model runs, or exchange layers for a while; run it as it is used, not as trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@contextmanager
def watch_inputs(model: nn.Module, names: Iterable[str], observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``observe(name, x)`` with the input x (…, d_in) of each named layer, while in the context.

    Every hook is removed on exit, also when the forward pass raises.
    """

    with watch_calls(model, names, lambda name, args, _kwargs: observe(name, args[0].detach())):
        yield


@contextmanager
def inputs_seen(layer: nn.Module) -> Iterator[list[Tensor]]:
    """The inputs x (…, d_in) that the layer has had so far in the context."""
    seen: list[Tensor] = []
    with watch_inputs(layer, [""], lambda _name, x: seen.append(x)):
        yield seen


@contextmanager
def watch_calls(model: nn.Module, names: Iterable[str], observe: Callable[[str, tuple, dict], None]) -> Iterator[None]:
    """Call ``observe(name, args, kwargs)`` with the arguments each named module is called with, while in the context."""

    def hook_for(name: str) -> Callable:
        return lambda _module, args, kwargs: observe(name, args, kwargs)

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def watch_outputs(model: nn.Module, names: Iterable[str], observe: Callable[[str, object], None]) -> Iterator[None]:
    """Call ``observe(name, output)`` with what each named module gives out, while in the context."""
    with ExitStack() as stack:
        for name in names:
            hook = lambda _module, _args, out, name=name: observe(name, out)  # noqa: E731
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


@contextmanager
def intervening(
    model: nn.Module,
    inputs: Mapping[str, Callable[[Tensor], Tensor]],
    outputs: Mapping[str, Callable[[Tensor], Tensor]],
) -> Iterator[None]:
    """Put f(x) in the place of the input x, or f(y) of the output y, of named layers while in the context."""
    with ExitStack() as stack:
        for name, f in inputs.items():
            hook = model.get_submodule(name).register_forward_pre_hook(_changing(f))
            stack.callback(hook.remove)
        for name, f in outputs.items():
            hook = model.get_submodule(name).register_forward_hook(lambda _m, _args, y, f=f: f(y))
            stack.callback(hook.remove)
        yield


def _changing(f: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple], tuple]:
    """A hook that puts f(x) in the place of an input x."""
    return lambda _module, args: (f(args[0]), *args[1:])


@contextmanager
def exchanged(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The named layers of the model replaced while in the context; put back on exit, also when something raises."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in before.items():
            model.set_submodule(name, layer)


@contextmanager
def in_float32(module: nn.Module, besides: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Parameters and buffers of the module in float32 while in the context, where they are coarser; their own bits afterwards.

    Those of parts ``besides`` are left alone.
    What a tolerance decides is decided there: in bfloat16 a yes and a no may differ by less than rounding.
    """
    left = {id(tensor) for part in besides for tensor in (*part.parameters(), *part.buffers())}
    every = (tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in left)
    coarse = [tensor for tensor in every if tensor.is_floating_point() and tensor.dtype.itemsize < 4]
    before = [tensor.data for tensor in coarse]
    try:
        for tensor in coarse:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(coarse, before, strict=True):
            tensor.data = data


def as_float32(value: Any) -> Any:
    """Arguments of a call, the coarser tensors in tuples, lists and dictionaries in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value
    if isinstance(value, dict):
        return {key: as_float32(item) for key, item in value.items()}
    return type(value)(as_float32(item) for item in value) if type(value) in (tuple, list) else value


@contextmanager
def each_in_float32(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Every block computes ``in_float32`` while in the context, one at a time; what comes and goes keeps its dtype."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_float32_calls(block))
        yield


@contextmanager
def model_in_float32(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """A model computes in float32 while in the context; of its blocks no more than one is in memory so at a time."""
    blocks = list(blocks)
    with in_float32(model, besides=blocks), each_in_float32(blocks):
        yield


@contextmanager
def _float32_calls(block: nn.Module) -> Iterator[None]:
    came: list[torch.dtype] = []
    with ExitStack() as stack:
        inside = stack.enter_context(ExitStack())  # while the block runs

        def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple:
            came.append(next(x.dtype for x in (*args, *kwargs.values()) if _is_floating(x)))
            inside.enter_context(in_float32(block))
            return as_float32(args), as_float32(kwargs)

        def leave(_module: nn.Module, _args: tuple, out: object) -> object:
            inside.close()
            dtype = came.pop()
            return tree_map(lambda x: x.to(dtype) if _is_floating(x) else x, out)

        stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(leave).remove)
        yield


def _is_floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside; every module has its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
