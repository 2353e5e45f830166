"""Which layers of a model are compressed: those in the blocks of its text decoder that compute W x + b and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from nsvd.stored.checkpoint import check_unwrapped
from nsvd.stored.kinds import check_continues
from nsvd.stored.layers import CompressedLayer
from nsvd.stored.quantized import is_quantized
from nsvd.stored.transposed import Transposed, as_linear
from nsvd.walk.decoder import head_of, longest_list, text_decoder

NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # a weight of another dtype is quantized


def targets(
    model: nn.Module, layers: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None
) -> dict[str, nn.Linear]:
    """The layers that are compressed, by dotted name, in the order of the model.

    A layer is taken if it is an ``nn.Linear`` of more than one output in the text decoder's blocks, or a ``Conv1D`` as GPT-2 has
    them (what is returned of it is a view as an ``nn.Linear``). A subclass with a ``forward`` of its own is taken if it gives
    W x + b for a random x. The output embedding, and vision towers, are left out.
    A model without a list of blocks counts as one block.

    Args:
        layers: names or glob patterns (``*``, ``?``, ``[…]``) of those to take; by default all.
        exclude: likewise, of those to leave alone. Either is held against a layer's whole name, and against its end after a
            dot: ``q_proj``, ``mlp.*`` and ``model.layers.0.*`` all take some.

    Raises:
        ValueError: if there is no such layer (the message names what the model has instead), a pattern fits none, or nothing is
            left; or the model is wrapped, is no decoder, is quantized, or holds an adapter that is not merged; the layer is named.
    """
    _check_model(model)
    name, whole = longest_list(model) or text_decoder(model)
    inside = {id(part) for m in whole.modules() if isinstance(m, CompressedLayer) for part in m.modules()}
    head = head_of(model)
    found = {}
    for inner, module in whole.named_modules(prefix=name):
        if id(module) in inside:
            continue
        _check_adapter(inner, module)
        module = as_linear(module)
        if isinstance(module, nn.Linear) and module is not head and module.out_features > 1:
            _check_stored(inner, module)
            if is_plain(module):
                found[inner] = module
    if not found:
        raise ValueError(_instead(model))
    return _picked(found, patterns(layers), patterns(exclude) or ())


def by_block(model: nn.Module, names: Iterable[str]) -> dict[int, list[str]]:
    """The names by the number of the block they are in, in the order of the blocks; -1 for a model without a list of blocks."""
    found, groups = longest_list(model), {}
    for name in names:
        inner = name.removeprefix(f"{found[0]}.") if found else ""
        number = inner.partition(".")[0]
        groups.setdefault(int(number) if found and inner != name and number.isdigit() else -1, []).append(name)
    return dict(sorted(groups.items()))


def patterns(given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """One name or pattern, or several, as a tuple; None stays None. Raises ``ValueError`` for anything else, or an empty one."""
    if given is None:
        return None
    found = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if not found or not all(isinstance(pattern, str) and pattern for pattern in found):
        raise ValueError(f"layers are chosen by names or patterns, not by {given!r}")
    return found


def _picked(
    found: Mapping[str, nn.Linear], wanted: tuple[str, ...] | None, excluded: tuple[str, ...]
) -> dict[str, nn.Linear]:
    """Those of the layers that fit one of the wanted patterns, if there are any, and none of the excluded ones."""
    for pattern in (*(wanted or ()), *excluded):
        if not any(fits(name, pattern) for name in found):
            raise ValueError(f"no layer is called {pattern!r}; the model has {', '.join(list(found)[:3])}, …")
    picked = {
        name: layer
        for name, layer in found.items()
        if (wanted is None or any(fits(name, pattern) for pattern in wanted))
        and not any(fits(name, pattern) for pattern in excluded)
    }
    if not picked:
        raise ValueError(f"exclude {', '.join(excluded)} leaves no layer to compress")
    return picked


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern is of a layer's whole name, or of its end after a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def among(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Linear]:
    """The target layers that are named, or all, in the order of the model."""
    layers, known = targets(model), None if names is None else set(names)
    return layers if known is None else {name: layer for name, layer in layers.items() if name in known}


@torch.inference_mode(False)
@torch.no_grad()
def shapes(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the target layers that are named, or of all."""
    return {name: shape_of(layer) for name, layer in among(model, names).items()}


def shape_of(layer: nn.Linear) -> tuple[int, int]:
    """(d_out, d_in) of a layer's weight."""
    d_out, d_in = layer.weight.shape
    return d_out, d_in


def is_plain(layer: nn.Linear) -> bool:
    """Whether a layer computes W x + b, to rounding, and holds nothing else: known of ``nn.Linear`` and ``Conv1D``, else tried."""
    if {name for name, _ in (*layer.named_parameters(), *layer.named_buffers())} - {"weight", "bias"}:
        return False
    if type(layer).forward in (nn.Linear.forward, Transposed.forward) and "forward" not in vars(layer):
        return True
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.weight)
    try:
        out = layer(x)
    except Exception:  # whatever it needs, it is no plain layer
        return False
    wanted = linear(x, layer.weight, layer.bias)
    if not isinstance(out, Tensor) or out.shape != wanted.shape or out.is_meta:
        return False
    return bool((out - wanted).norm() <= 8 * torch.finfo(x.dtype).eps * wanted.norm())


def _check_model(model: nn.Module) -> None:
    """Raise ``ValueError`` for a model that is wrapped, no decoder, or quantized."""
    check_unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        return
    kind = type(model).__name__
    check_continues(model)
    about = getattr(model.config, "quantization_config", None)
    method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", None)
    if method is not None and method != "nsvd":
        raise ValueError(f"{kind} is quantized by {getattr(method, 'value', method)}: dequantize it first")


def _check_adapter(name: str, module: nn.Module) -> None:
    """Raise ``ValueError`` for a layer that holds another and adapters beside it, or beside its own weight."""
    adapters = [part for part, _ in module.named_parameters() if part.split(".")[0].startswith("lora_")]
    if isinstance(getattr(module, "base_layer", None), nn.Module) or (adapters and isinstance(module, nn.Linear)):
        raise ValueError(f"layer {name} ({type(module).__name__}) holds an adapter beside its weight: merge it first")


def _check_stored(name: str, layer: nn.Linear) -> None:
    """Raise ``ValueError`` for a weight that is not kept as numbers of its own."""
    if is_quantized(layer.weight):
        kind = type(layer.weight).__name__
        raise ValueError(f"layer {name} keeps its weight quantized ({kind}): compress the model before it is quantized")
    if layer.weight.dtype not in NUMBERS or layer.weight.shape != (layer.out_features, layer.in_features):
        kept = f"{str(layer.weight.dtype).removeprefix('torch.')} {tuple(layer.weight.shape)}"
        raise ValueError(
            f"layer {name} ({type(layer).__name__}) keeps its weight as {kept}: dequantize the model first"
        )


def _instead(model: nn.Module) -> str:
    kinds = {type(m).__name__ for m in model.modules() if isinstance(vars(m)["_parameters"].get("weight"), Tensor)}
    return f"{type(model).__name__} has no nn.Linear layer left to compress (it has {', '.join(sorted(kinds))})"
