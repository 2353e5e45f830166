"""A second device where there is none: tensors on the CPU that say they are elsewhere, and refuse what a real device refuses.

Inside ``pretending("cuda")`` the calls ``.to("cuda")`` and ``device="cuda"`` make such tensors. An operation that mixes them with
tensors of the CPU raises, as it does on a GPU; allowed are scalars (0-d) and indices on the CPU, and ``copy_``. Under
``pretending("mps")`` float64 raises besides, as that device has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
INDEXING = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_, Tensor.index_put, torch.index_put}
COPYING = {Tensor.copy_}
TO_HOST = {Tensor.numpy, Tensor.__array__}
BY_DATA = {
    torch._has_compatible_shallow_copy_type,
    Tensor.data.__set__,
    Tensor.grad.__set__,
    Tensor.requires_grad.__set__,
    Tensor.__setstate__,
}


class Elsewhere(Tensor):
    """A tensor that pretends: its numbers lie on the CPU."""

    device_name = None  # of the device pretended; set while ``pretending``

    @property
    def device(self) -> torch.device:
        return torch.device(Elsewhere.device_name)

    @property
    def is_cpu(self) -> bool:
        return False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return Pretence.run(func, args, kwargs or {})


class Generator(torch.Generator):
    """A generator on the CPU that says which device it is for."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.place = torch.device(device)
        return self


class Pretence(TorchFunctionMode):
    """Sends every operation of torch through ``run``."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return Pretence.run(func, args, kwargs or {})

    @staticmethod
    def run(func, args: tuple, kwargs: dict):
        with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
            return _run(func, args, kwargs)


def _run(func, args: tuple, kwargs: dict):
    if func is Tensor.to:
        return _moved(*args, **kwargs)
    if func in (Tensor.cpu, Tensor.double, Tensor.float, Tensor.half, Tensor.bfloat16):
        dtype = {Tensor.double: torch.float64, Tensor.float: torch.float32, Tensor.half: torch.float16}
        dtype[Tensor.bfloat16] = torch.bfloat16
        return _moved(args[0], CPU if func is Tensor.cpu else None, dtype.get(func))
    if func is Tensor.__deepcopy__:
        return _copied(*args)
    if func is Tensor.register_hook:
        tensor, hook = args
        return func(tensor, lambda g: hook(_tag(g, _place(tensor))))
    if func is torch.autograd.grad:  # of inputs wherever they lie
        return _gradients(*args, **kwargs)
    name = getattr(func, "__name__", str(func))
    place = _place_of_call(func, name, args, kwargs)
    if "device" in kwargs and kwargs["device"] is not None:
        kwargs = kwargs | {"device": CPU}
    if func in TO_HOST and place != CPU:
        raise TypeError(f"can't convert {place} tensor to numpy; use Tensor.cpu() to copy it to the host first")
    before = {id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    out = func(*args, **kwargs)
    return tree_map_only(Tensor, lambda x: x if id(x) in before else _tag(x, place), out)


def _gradients(outputs, inputs, *args, **kwargs) -> tuple[Tensor, ...]:
    """``torch.autograd.grad``: every gradient lies beside its input."""
    found = torch.autograd.grad(outputs, inputs, *args, **kwargs)
    many = isinstance(inputs, list | tuple)
    return tuple(_tag(g, _place(x)) for g, x in zip(found, inputs if many else [inputs], strict=True))


def _place_of_call(func, name: str, args: tuple, kwargs: dict) -> torch.device:
    """Where the result of an operation lies; raises where a device would."""
    if kwargs.get("device") is not None:
        place = torch.device(kwargs["device"])
        if (generator := kwargs.get("generator")) is not None and _where(generator).type != place.type:
            raise RuntimeError(f"Expected a '{place}' device type for generator but found '{_where(generator)}'")
        return place
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if func in COPYING or func in INDEXING:
        if (
            func in INDEXING
            and _place(args[0]) == CPU
            and any(_place(x) != CPU for x in tree_leaves(args[1]) if isinstance(x, Tensor))
        ):
            raise RuntimeError(f"{name}: indices should be on the same device as the indexed tensor (cpu)")
        if func in INDEXING and func is not Tensor.__getitem__:
            _one_place(name, [args[0], *(x for x in tree_leaves(args[2:]) if isinstance(x, Tensor))])
        return _place(args[0])
    if func in BY_DATA:
        return _place(args[0])
    return _one_place(name, tensors)


def _one_place(name: str, tensors: list[Tensor]) -> torch.device:
    places = {_place(x) for x in tensors if x.ndim or _place(x) != CPU}
    if len(places) > 1:
        raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, but found {sorted(map(str, places))}"
        )
    return places.pop() if places else CPU


def _place(x: Tensor) -> torch.device:
    return torch.device(Elsewhere.device_name) if isinstance(x, Elsewhere) else CPU


def _where(generator: torch.Generator) -> torch.device:
    return getattr(generator, "place", CPU)


def _tag(x: Tensor, place: torch.device) -> Tensor:
    """The tensor, saying that it lies there."""
    if x is None or place == CPU or isinstance(x, Elsewhere):
        return x
    if place.type == "mps" and x.dtype in (torch.float64, torch.complex128):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    return x.as_subclass(Elsewhere)


def _moved(x: Tensor, *args, **kwargs) -> Tensor:
    """``Tensor.to``; a move is always a copy."""
    other = next((a for a in (*args, kwargs.pop("other", None)) if isinstance(a, Tensor)), None)
    if other is not None:
        device, dtype = _place(other), other.dtype
        rest = {k: v for k, v in kwargs.items() if k in ("non_blocking", "copy")}
    else:
        given = [a for a in args if a is not None]
        device = kwargs.pop("device", None) or next((a for a in given if isinstance(a, str | torch.device)), None)
        dtype = kwargs.pop("dtype", None) or next((a for a in given if isinstance(a, torch.dtype)), None)
        rest = {k: v for k, v in kwargs.items() if k == "copy"}
    source, place = _place(x), _place(x) if device is None else torch.device(device)
    place = torch.device(place.type)
    plain = x.as_subclass(Tensor) if isinstance(x, Elsewhere) else x
    if place.type == "mps" and (dtype or x.dtype) == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    out = Tensor.to(plain, dtype or x.dtype, **rest)
    if place == source:
        return x if out is plain else _tag(out, place)
    return _tag(out.clone() if out is plain else out, place)


def _copied(x: Tensor, memo: dict) -> Tensor:
    """``copy.deepcopy`` of a tensor, a parameter among them."""
    if not isinstance(x, Elsewhere):
        return x.__deepcopy__(memo)
    if id(x) not in memo:
        memo[id(x)] = _tag(x.detach().clone(), _place(x)).requires_grad_(x.requires_grad)
        vars(memo[id(x)]).update(vars(x))
    return memo[id(x)]


@contextlib.contextmanager
def pretending(device: str) -> Iterator[None]:
    """A context in which there is a device of this name."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Elsewhere, "device_name", device)
        patch.setattr(torch, "Generator", Generator)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with Pretence():
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


def moved(model: nn.Module, device: str) -> nn.Module:
    """The model on the pretended device, its tied weights tied."""
    model.to(device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


def assert_on(model: nn.Module, device: str) -> None:
    """All its parameters and buffers lie there."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device.type == device, name
