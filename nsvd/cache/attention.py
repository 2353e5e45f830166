"""How an attention layer makes its keys: projection, perhaps a norm, perhaps a rotation; found by trying, not by family."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from nsvd.cache.absorption import Attention, absorbs
from nsvd.stored.layers import CompressedLayer
from nsvd.walk.caches import cache_in, caches_of, input_of, with_cache
from nsvd.walk.hooks import as_float32, evaluating, in_float32, watch_calls
from nsvd.walk.text import trial

NORMS = ("k_norm", "k_layernorm")  # the names under which attention layers keep a norm of their keys
CLOSE = 1e-2  # relative, in float32; what is compared went through the same operations, or another recipe was used


def finish_keys(attention: Attention, keys: Tensor, rotation: tuple[Tensor, Tensor] | None, rotated: int) -> Tensor:
    """Projected keys (batch, s, heads · d) as they enter attention, (batch, heads, s, d): normed and rotated.

    ``rotation`` is (cos, sin) of the s tokens; the family's ``apply_rotary_pos_emb`` is given the first ``rotated`` channels
    of each head, the others stay as they are.
    """
    norm = next((module for name in NORMS if (module := getattr(attention, name, None)) is not None), None)
    if norm is not None and norm.weight.shape[-1] == keys.shape[-1]:  # over all heads together, before they part
        keys, norm = norm(keys), None
    keys = split_heads(attention, keys)
    if norm is not None:
        keys = norm(keys)
    if not rotated:
        return keys
    turning, kept = keys.tensor_split([rotated], dim=-1)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    _, turned = rotate(turning[:, :0], turning, *cast(tuple[Tensor, Tensor], rotation))  # no query heads
    return torch.cat([turned, kept], dim=-1) if kept.shape[-1] else turned


def split_heads(attention: Attention, states: Tensor) -> Tensor:
    """(batch, s, heads · d) → (batch, heads, s, d)."""
    return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def rotate_by(model: PreTrainedModel, x: Tensor, positions: Tensor, layer_type: str | None) -> tuple[Tensor, Tensor]:
    """(cos, sin) of positions (batch, s) by the model's own rotary embedding, in the dtype of x."""
    rotary: nn.Module = cast(Any, model.get_decoder()).rotary_emb
    takes_type = "layer_type" in inspect.signature(rotary.forward).parameters
    return rotary(x, positions, **({"layer_type": layer_type} if takes_type else {}))


def by_kind(model: PreTrainedModel, indices: Iterable[int]) -> dict[str | None, list[int]]:
    """Layer indices by kind (full, sliding, …): layers of one kind have caches of one length and one rotation."""
    kinds: dict[str | None, list[int]] = {}
    for index in sorted(indices):
        kinds.setdefault(kind_of(model, index), []).append(index)
    return kinds


def kind_of(model: PreTrainedModel, index: int) -> str | None:
    """The kind of a layer, None where the model has only one."""
    types = getattr(model.config.get_text_config(), "layer_types", None)
    return types[index] if types else None


def key_value_layers(model: nn.Module) -> dict[str, Attention]:
    """The modules with a ``k_proj`` and a ``v_proj`` of their own that are linear, by name."""
    linear = nn.Linear | CompressedLayer
    return {
        name: cast(Attention, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "k_proj", None), linear) and isinstance(getattr(module, "v_proj", None), linear)
    }


@torch.no_grad()
def examine(model: PreTrainedModel) -> dict[str, tuple[int, bool]]:
    """For every attention layer the channels of a head that are rotated, and whether it ``absorbs``; all ``finish_keys`` alike.

    Shown on a few tokens, in float32: what each layer hands its cache is compared with what is rebuilt from its projections.

    Raises:
        ValueError: if a layer does anything else, or the model has no separate key and value projections; the layer is named.
        FloatingPointError: if keys or values hold NaN or Inf.
    """
    layers, kind = key_value_layers(model), type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        raise ValueError(f"{kind} is not a decoder-only model of transformers, for which the latent cache is made")
    if not layers:
        attention = [
            f"{n} ({type(m).__name__})" for n, m in model.named_modules() if "attention" in type(m).__name__.lower()
        ]
        raise ValueError(
            f"a latent cache needs separate linear k_proj and v_proj, which {', '.join(attention[:1]) or kind} has not"
        )
    calls, cache = {}, _Recorder(config=model.config)
    with watch_calls(model, layers, lambda name, args, kwargs: calls.__setitem__(name, (args, kwargs))):
        _run(model, cache)
    found = {}
    for name, layer in layers.items():
        rotated = _rotated(model, name, layer, calls.get(name), cache)
        with in_float32(layer), evaluating(layer):
            found[name] = rotated, absorbs(layer, *as_float32(calls[name]))
    others = cache.seen.keys() - {layer.layer_idx for layer in layers.values()}
    if others:
        raise ValueError(f"{kind}: layer {min(others)} has a cache, but no separate linear k_proj and v_proj")
    return found


class _Recorder(DynamicCache):
    """A cache that remembers what each layer handed it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.seen[layer_idx] = keys, values
        return super().update(keys, values, layer_idx, *args, **kwargs)


def _run(model: PreTrainedModel, cache: DynamicCache) -> None:
    ids = trial(model)
    with evaluating(model):
        (name,) = caches_of(model.base_model(input_ids=ids, use_cache=True))
        model.base_model(input_ids=ids, use_cache=True, **{name: cache})


def _rotated(model: PreTrainedModel, name: str, layer: Attention, call: tuple | None, cache: _Recorder) -> int:
    kind = f"layer {name} ({type(layer).__name__})"
    if call is None or getattr(layer, "layer_idx", None) not in cache.seen:
        raise ValueError(f"{kind}: its keys do not reach a cache of their own, so no latents can be cached for it")
    args, kwargs = call
    x = input_of(layer, args, kwargs)
    if not isinstance(x, Tensor) or cache_in(args, kwargs) is not cache:
        raise ValueError(f"{kind} is not called with hidden states first and with the model's cache")
    keys, values = cache.seen[layer.layer_idx]
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise FloatingPointError(f"{kind}: keys or values hold NaN or Inf")
    rotation, recipes, positions = None, [0], kwargs.get("position_ids")
    known = hasattr(sys.modules[type(layer).__module__], "apply_rotary_pos_emb") and hasattr(
        model.get_decoder(), "rotary_emb"
    )
    if known and positions is not None and positions.ndim == 2:
        rotation = as_float32(rotate_by(model, x, positions, kind_of(model, layer.layer_idx)))
        recipes += [getattr(layer, "head_dim", 0), rotation[0].shape[-1]]
    with in_float32(layer), evaluating(layer):
        x, (keys, values) = as_float32(x), _handed(layer, *as_float32(call))
        if not hasattr(layer, "head_dim") or not _close(split_heads(layer, layer.v_proj(x)), values):
            raise ValueError(f"{kind}: values are not simply the heads of v_proj's output")
        projected = layer.k_proj(x)
        for rotated in recipes:
            if _makes(layer, projected, rotation, rotated, keys):
                return rotated
    raise ValueError(
        f"{kind} makes its keys in a way that cannot be repeated from k_proj, a norm and a rotation by positions"
    )


class _Handing(Exception):
    """Ends the forward pass of a layer where it hands its keys and values to the cache."""

    def update(self, *handed, **_):
        self.handed = handed
        raise self


def _handed(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Keys and values that a call of the layer gives its cache."""
    cache = _Handing()
    args, kwargs = with_cache(args, kwargs, cache)
    with suppress(_Handing):
        type(layer).forward(layer, *args, **kwargs)
    return cache.handed[:2]


def _makes(
    layer: Attention, projected: Tensor, rotation: tuple[Tensor, Tensor] | None, rotated: int, keys: Tensor
) -> bool:
    """Whether ``finish_keys`` gives the keys; a recipe that does not even fit the shapes, or the family's rotation, does not."""
    try:
        return _close(finish_keys(layer, projected, rotation, rotated), keys)
    except (RuntimeError, TypeError):
        return False


def _close(rebuilt: Tensor, given: Tensor) -> bool:
    return rebuilt.shape == given.shape and bool((rebuilt - given).norm() <= CLOSE * given.norm())
