r"""A KV cache that holds latents: what is cached of a layer is z = right x, not K = left z + bias and V.

After ``k_proj`` and ``v_proj`` of an attention layer are factored, ``LatentAttention`` stands in for its ``forward``. The family's
own forward still runs, unchanged; only the cache it is given is a stand-in, whose ``update`` stores the latents in the real one
(any of transformers' classes: dynamic, static, sliding) as one head of width k, and returns keys and values rebuilt from all
latents held: keys through the up-projection, the family's norm and the family's ``apply_rotary_pos_emb``, values through the
up-projection. Without a cache nothing differs from the plain low-rank layers.

Rotating old keys takes their positions. These are stored once for each kind of layer (full, sliding: those whose caches hold
equally many tokens), behind the key latents of the first rotated layer of that kind, as ``DIGITS`` digits to base 256, which
bfloat16 and float16 hold exactly.

Memory falls and arithmetic rises: every step rebuilds K of all tokens held, s r_k d_k multiplications a layer, and the new tokens
pass the down-projections a second time. V is rebuilt alike, or not at all where it pays to absorb its up-projection into the output
projection, see ``absorption``; K's cannot, because keys are rotated in between. Compilation of the decoding step is off.
Where latents cannot be cached, as in paged (continuous) batching, the layer raises: it never caches dense keys and values.

The idea is that of the ASVD paper (arXiv 2312.05821); Palu (arXiv 2407.21118) builds on it with fused kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from nsvd.cache.absorption import Factored, Redirected, as_values, lift, output_of, pays
from nsvd.cache.attention import by_kind, finish_keys, key_value_layers, rotate_by, split_heads
from nsvd.stored.checkpoint import LATENT_CACHE
from nsvd.walk.caches import cache_in, input_of, with_cache

DIGITS, BASE = 3, 256  # positions below 2²⁴
_ROTATIONS: WeakKeyDictionary[Cache, dict[int, tuple[Tensor, Tensor]]] = WeakKeyDictionary()  # by owner, see Rotation


def encode_positions(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers (…) as floating-point digits (…, DIGITS), exact in any dtype with 8 significant bits or more."""
    places = BASE ** torch.arange(DIGITS, device=positions.device)
    digits = positions[..., None].div(places, rounding_mode="floor")
    digits[..., :-1] %= BASE  # the last keeps the sign
    return digits.to(dtype)


def decode_positions(digits: Tensor) -> Tensor:
    """The inverse of ``encode_positions``."""
    return (digits.long() * BASE ** torch.arange(DIGITS, device=digits.device)).sum(-1)


class Rotation:
    """The rotary embedding of the layers of one kind; the first of them, ``owner``, caches the positions for all.

    From the owner's ``update`` to that of the ``last`` layer of its kind, in one forward pass, the rotation of all tokens held is
    kept beside the cache, so that it is computed once.
    """

    def __init__(self, model: PreTrainedModel, layer_type: str | None, owner: int, last: int):
        self.model, self.layer_type, self.owner, self.last = model, layer_type, owner, last

    def of_all(self, cache: Cache, layer: int, held: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of all tokens; ``held`` (batch, s, …) is what the layer has cached, digits last where it is the owner."""
        current = _ROTATIONS.setdefault(cache, {})
        if layer == self.owner:
            current[self.owner] = rotate_by(self.model, held, decode_positions(held[..., -DIGITS:]), self.layer_type)
        return current.pop(self.owner) if layer == self.last else current[self.owner]


class LatentAttention:
    """In place of an attention layer's ``forward``: the same, but what is cached are latents."""

    def __init__(self, attention: Factored, rotation: Rotation | None, rotated: int, joint: bool, absorb: bool = False):
        self.attention, self.rotation, self.rotated, self.joint = attention, rotation, rotated, joint
        self.absorb = absorb

    @property
    def owns_positions(self) -> bool:
        """Whether this layer caches the positions for its kind."""
        return self.rotation is not None and self.rotation.owner == self.attention.layer_idx

    @property
    def width(self) -> int:
        """Numbers cached a token."""
        ranks = self.attention.k_proj.rank + (0 if self.joint else self.attention.v_proj.rank)
        return ranks + DIGITS * self.owns_positions

    def __call__(self, *args, **kwargs):
        attention, cache = self.attention, cache_in(args, kwargs)
        if cache is None:
            if kwargs.get("use_cache"):
                raise ValueError(f"layer {attention.layer_idx} is to cache latents, but it is given no cache")
            return type(attention).forward(attention, *args, **kwargs)
        stand_in = _StandIn(self, cache, cast(Tensor, input_of(attention, args, kwargs)), kwargs.get("position_ids"))
        args, kwargs = with_cache(args, kwargs, stand_in)
        redirected = Redirected(attention, stand_in.output, stand_in.ours) if self.absorb else attention
        output = type(attention).forward(redirected, *args, **kwargs)
        if not stand_in.updated:
            raise ValueError(
                f"layer {attention.layer_idx} is to cache latents, but it does not use the cache it is given"
            )
        return output

    def latents(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is cached for inputs x (batch, s, d_in): (batch, 1, s, k) twice, the second of width 0 where one serves both."""
        attention = self.attention
        z_k = attention.k_proj.down(x)
        z_v = z_k[..., :0] if self.joint else attention.v_proj.down(x)
        if self.owns_positions:
            if positions is None:
                raise ValueError(f"layer {attention.layer_idx}: a latent cache needs position_ids")
            digits = encode_positions(positions.expand(len(x), -1), z_k.dtype)
            z_k = torch.cat([z_k, digits.to(z_k.device)], dim=-1)
        return z_k[:, None], z_v[:, None]

    def rebuild(self, cache: Cache, z_k: Tensor, z_v: Tensor, queries: int) -> tuple[Tensor, Tensor, bool]:
        """Keys and values (batch, heads, s, d) from the latents of all tokens held; and whether the values are latents still."""
        attention, rotation = self.attention, None
        if self.rotation is not None:
            cos, sin = self.rotation.of_all(cache, attention.layer_idx, z_k[:, 0])
            rotation = cos.to(z_k.device), sin.to(z_k.device)
        z_k = z_k[..., : attention.k_proj.rank]
        z_v = z_k if self.joint else z_v
        keys = finish_keys(attention, attention.k_proj.up(z_k[:, 0]), rotation, self.rotated)
        if self.absorb and pays(attention, z_v, queries):
            return keys, as_values(attention, z_v), True
        return keys, split_heads(attention, attention.v_proj.up(z_v[:, 0])), False


class _StandIn:
    """The cache that a family's forward sees: it takes finished keys and values, holds latents, returns all keys and values."""

    def __init__(self, layer: LatentAttention, cache: Cache, x: Tensor, positions: Tensor | None):
        self.layer, self.cache, self.x, self.positions = layer, cache, x, positions
        self.absorbed, self.updated, self.queries = False, False, 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.updated = True
        latents = self.layer.latents(self.x, self.positions)
        held = self.cache.update(*latents, layer_idx, *args, **kwargs)
        if hasattr(self.cache.layers[layer_idx], "_quantized_keys"):
            raise ValueError("latents cannot be held by a quantized cache, which would round the positions")
        if held[0].shape[-2] == keys.shape[-2]:  # nothing but the new tokens
            return keys, values
        self.queries = keys.shape[-2]
        keys, values, self.absorbed = self.layer.rebuild(self.cache, *held, queries=self.queries)
        return keys, values

    def ours(self) -> bool:
        """Whether a new token attends over latents by ``absorption.attend``, in the place of what is slow at it on a GPU."""
        function = getattr(self.layer.attention.config, "_attn_implementation", None)
        return self.absorbed and self.queries == 1 and slow_at_latents(self.x.device) and function == "sdpa"

    def output(self, x: Tensor) -> Tensor:
        """The output projection, of attention over values or over their latents."""
        attention = self.layer.attention
        return output_of(attention)(lift(attention, x) if self.absorbed else x)


def slow_at_latents(device: torch.device) -> bool:
    """Whether the device's own attention functions are slow where values are wide and the same for all heads."""
    return device.type != "cpu"


def attach(model: PreTrainedModel, layers: Mapping[str, Mapping[str, int | bool]]) -> None:
    """Let the named attention layers, already factored, cache latents.

    ``layers`` maps their names to {"rotated": channels of a head that are rotated, "joint": whether K and V share one latent,
    "absorb": whether V stays latent where that pays, False where it is not told}.
    """
    modules = {name: _factored(model, name) for name in layers}
    kinds = by_kind(model, [layer.layer_idx for name, layer in modules.items() if layers[name]["rotated"]])
    rotations = {kind: Rotation(model, kind, of[0], of[-1]) for kind, of in kinds.items()}
    rotation_of = {index: rotations[kind] for kind, of in kinds.items() for index in of}
    for name, layer in modules.items():
        if layers[name]["joint"]:
            _tie(model, name)
        layer.forward = LatentAttention(
            layer, rotation_of.get(layer.layer_idx), **cast(Mapping[str, Any], layers[name])
        )


def detach(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Give the named attention layers their own forward back."""
    for name in names:
        layer = _factored(model, name)
        if cast(LatentAttention, layer.forward).joint:
            del layer.v_proj._tied_weights_keys, model.all_tied_weights_keys[f"{name}.v_proj.down.weight"]
        del layer.forward


LATENT_CACHE.update(attach=attach, detach=detach)  # for checkpoints that are read


def latent_layers(model: nn.Module) -> dict[str, LatentAttention]:
    """The attention layers that cache latents, by name."""
    found = {name: vars(module).get("forward") for name, module in model.named_modules()}
    return {name: forward for name, forward in found.items() if isinstance(forward, LatentAttention)}


def _factored(model: PreTrainedModel, name: str) -> Factored:
    """The attention layer of this name, whose keys and values are factored."""
    return cast(Factored, model.get_submodule(name))


def _tie(model: PreTrainedModel, name: str) -> None:
    """One down-projection for both; transformers then stores it once and ties it again on loading."""
    layer = _factored(model, name)
    layer.v_proj.down.weight = layer.k_proj.down.weight
    told = {"down.weight": "the down-projection of the keys"}
    layer.v_proj._tied_weights_keys = told  # pyright: ignore[reportArgumentType]  # an attribute like any other
    model.all_tied_weights_keys[f"{name}.v_proj.down.weight"] = f"{name}.k_proj.down.weight"


def cache_bytes(cache: Cache) -> int:
    """Bytes held by the tensors of a cache: of their storages, each counted once, so that a view counts what it keeps alive."""
    tensors = (value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def bytes_per_token(model: PreTrainedModel) -> tuple[int, int]:
    """(dense, latent) bytes that a cache takes for one token, in the model's dtype; equal where nothing is latent."""
    latent, dense, held = latent_layers(model), 0, 0
    for name, layer in key_value_layers(model).items():
        size = layer.k_proj.out_features + layer.v_proj.out_features
        dense, held = dense + size, held + (latent[name].width if name in latent else size)
    return dense * model.dtype.itemsize, held * model.dtype.itemsize
