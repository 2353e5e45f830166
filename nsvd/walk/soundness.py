"""Whether a model can be worked on, and still runs once its layers are exchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nsvd.linalg.methods import check_finite
from nsvd.stored.changes import CASTS, cast_through
from nsvd.stored.checkpoint import compressed_layer
from nsvd.stored.experts import take_apart_for
from nsvd.stored.folder import CheckpointError
from nsvd.stored.foreign import quiet
from nsvd.stored.layers import CompressedLayer
from nsvd.stored.reread import reread, with_numbers
from nsvd.stored.transposed import Transposed
from nsvd.walk.decoder import longest_list
from nsvd.walk.hooks import evaluating, exchanged, model_in_float32, watch_outputs
from nsvd.walk.lazy import LazyBlock, is_lazy, slots
from nsvd.walk.text import TRIED, trial

CLOSE = 1e-2  # relative error of what a model read again says: 0, but where it keeps parameters in several precisions


def check_values(model: nn.Module) -> None:
    """Raise ``ValueError`` naming the first parameter that holds NaN or Inf, or buffer that holds NaN (a mask may hold Inf).

    Blocks that lie in files are left out: they are looked at when they are read.
    """
    unread = {
        id(slot.tensor) for block in model.modules() if isinstance(block, LazyBlock) for slot in slots(block).values()
    }
    for name, value in model.named_parameters():
        if id(value) in unread:
            continue
        if value.is_meta:
            raise ValueError(f"the parameter {name} is on the device meta, so it has no values")
        layer, _, part = name.rpartition(".")
        linear = part == "weight" and isinstance(model.get_submodule(layer), nn.Linear)
        check_finite(f"the weight of layer {layer}" if linear else f"the parameter {name}", value)
    for name, value in model.named_buffers():
        if id(value) not in unread and value.is_floating_point() and value.isnan().any():
            raise ValueError(f"the buffer {name} holds NaN")


@torch.no_grad()
def predicted(model: nn.Module) -> Tensor:
    """What the model says to a few tokens, logits where it has a head.

    Raises:
        ValueError: if the model changes its parameters while it runs: once saved and read again, they would be changed twice. If
            it does not run on tokens alone; if what it says of a token depends on those behind it.
        FloatingPointError: if that holds NaN or Inf; the first module that gives it out is named.
    """
    ids = trial(model)
    out = _run(model, ids)
    if not out.isfinite().all():
        raise FloatingPointError(f"the model predicts NaN or Inf for {TRIED} tokens{first_broken(model)}")
    if getattr(model, "can_generate", bool)() and _looks_ahead(model, ids, out):
        raise ValueError(
            f"what {type(model).__name__} says of a token depends on those behind it, as in an encoder; "
            "only models that continue a text are compressed"
        )
    return out


def _looks_ahead(model: nn.Module, ids: Tensor, out: Tensor) -> bool:
    """Whether what the model says of tokens, ``out``, changes with the last one. Where rounding may hide it, in float32."""
    other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    said, again = out[:, :-1], _run(model, other)[:, :-1]
    if torch.equal(again, said):
        return False
    if said.dtype.itemsize < 4 and not is_lazy(model):
        with model_in_float32(model, (longest_list(model) or ("", ()))[1]):
            said, again = _run(model, ids)[:, :-1], _run(model, other)[:, :-1]
    return not (again - said).norm() <= torch.finfo(said.dtype).eps ** 0.5 * said.norm()


@torch.no_grad()
def first_broken(model: nn.Module, ids: Tensor | None = None) -> str:
    """Where NaN or Inf begins, as the end of a sentence: the first module, none inside it, that gives it out."""
    leaves, broken = [name for name, module in model.named_modules() if not any(module.children())], []

    def observe(name: str, out: object) -> None:
        if isinstance(out, Tensor) and out.is_floating_point() and not out.isfinite().all():
            broken.append(name)

    with watch_outputs(model, leaves, observe):
        _run(model, ids)
    return f"; it begins in the output of {broken[0]}" if broken else ""


def check_exchanged(model: nn.Module, dense: Mapping[str, nn.Module], before: Tensor) -> None:
    """Run a few tokens through a model whose ``dense`` layers have been exchanged, and through what is read of it once it is saved.

    ``before`` is what it ``predicted`` with them. Of a model whose blocks lie in files, only the names and shapes of what is read
    again are looked at.

    Raises:
        ValueError: if it does not run, or gives out another shape; the layer that does this alone is named. If it cannot be read
            again, or says something else then.
        FloatingPointError: likewise, if it predicts NaN or Inf.
    """
    fault = _fault(model, before)
    if fault is None:
        _check_reread(model)
        return
    for name in () if is_lazy(model) else dense:  # the dense layers of a lazy model are not at hand any more
        with exchanged(model, {other: layer for other, layer in dense.items() if other != name}):
            if alone := _fault(model, before):
                raise type(alone)(f"layer {name}: once it is exchanged, {alone}") from alone
    raise type(fault)(
        f"layer {next(iter(dense))} and {len(dense) - 1} others: once they are exchanged, {fault}"
    ) from fault


def check_runs(model: nn.Module, before: Tensor) -> None:
    """Raise unless a model that has lost neurons runs: ``before`` and the errors are those of ``check_exchanged``."""
    if fault := _fault(model, before):
        raise type(fault)(
            f"neurons cannot be left out of {type(model).__name__}, neurons=0 leaves all: {fault}"
        ) from fault


def _check_reread(model: nn.Module) -> None:
    """Raise ``ValueError`` unless the model, saved and read again, says the same; a tensor or layer that differs is named."""
    if not isinstance(model, PreTrainedModel):
        return
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, CompressedLayer)}
    if not is_lazy(model) and _by_hand(model, layers):
        return
    try:
        again = reread(model, layers)
    except Exception as error:  # of whatever kind, a folder with this model could not be read
        raise ValueError(f"{type(model).__name__} could not be read again once it is saved: {error}") from error
    if not with_numbers(model):
        return
    _as_cast(again, model)
    said, now = _run(model), _run(again)
    if not (now - said).norm() <= CLOSE * said.norm():
        pairs = ((name, compressed_layer(again, name), layer) for name, layer in layers.items())
        differs = (name for name, other, layer in pairs if not torch.equal(other.dense(), layer.dense()))
        where = next((f"; layer {name} is another" for name in differs), "")
        raise ValueError(f"{type(model).__name__} says something else once it is saved and read again{where}")


def _as_cast(again: nn.Module, model: nn.Module) -> None:
    """Give a model the other's buffers where these are its own, cast: ``model.half()`` casts those, too, that no file holds."""
    for name, buffer in model.named_buffers():
        owner, _, last = name.rpartition(".")
        other = again.get_buffer(name)
        cast = (cast_through(other, dtypes).to(buffer.dtype) for dtypes in CASTS if dtypes)
        if other.is_floating_point() and any(torch.equal(buffer, one) for one in cast):
            setattr(again.get_submodule(owner), last, buffer)


def _by_hand(model: PreTrainedModel, layers: Iterable[str]) -> bool:
    """Whether the model has modules that its configuration does not tell of: then no folder gives it back."""
    with torch.device("meta"), quiet():
        dense = type(model)(copy.deepcopy(model.config))
        take_apart_for(dense, layers)
        plain = dict(dense.named_modules())
    beside = tuple(f"{name}." for name in layers)
    others = ((n, part) for n, part in model.named_modules() if n not in layers and not n.startswith(beside))
    return any(type(part) is not type(plain.get(name)) and not isinstance(part, Transposed) for name, part in others)


def _fault(model: nn.Module, before: Tensor) -> Exception | None:
    try:
        out = _run(model)
    except (CheckpointError, OSError):  # a block could not be read
        raise
    except Exception as error:  # of whatever kind, it is the exchange that brought it about
        return ValueError(f"the model does not run any more ({type(error).__name__}: {error})")
    if out.shape != before.shape:
        return ValueError(f"the model gives out {tuple(out.shape)} in place of {tuple(before.shape)}")
    if not out.isfinite().all():
        return FloatingPointError("the model predicts NaN or Inf")
    return None


@torch.no_grad()
def _run(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    ids = trial(model) if ids is None else ids
    versions = [p._version for p in model.parameters() if not p.is_inference()]
    with evaluating(model):
        out = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    if versions != [p._version for p in model.parameters() if not p.is_inference()]:
        raise ValueError(f"{type(model).__name__} changes its own parameters while it runs, which is not supported")
    return out if isinstance(out, Tensor) else out[0]
