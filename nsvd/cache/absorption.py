r"""Attention over value latents: the values' up-projection moves behind the weighted sum, to the output projection.

With values v_t = L z_t + b, and weights that sum to one, query head h of key-value head g attends to

    Σ_t a_t v_t = L_g u_h + b_g,    u_h = Σ_t a_t z_t,

so the sum can be taken over the latents, which all heads share, and V is never rebuilt. Multiplications for q new tokens, s held,
h query and n key-value heads of width d, rank r:

| | V rebuilt | absorbed |
|---|---|---|
| V from z | s n d r | |
| weighted sum | q h s d | q h s r |
| L_g on the sum | | q h d r |
| output projection | q h d hidden | the same |

At one new token the first row is nearly all there is, and goes. The product O_h L_g is not formed: its h r hidden numbers are more
than the h d hidden + r n d of the two factors, unless r is below about d, and then spare a percent or two of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nsvd.stored.layers import CompressedLayer, LowRankLinear
from nsvd.walk.caches import with_cache

OUTPUTS = ("o_proj", "out_proj", "dense")  # the names under which attention layers keep their output projection
CLOSE = 1e-4  # relative, in float32
ANY_WIDTH = ("eager", "sdpa")  # attention functions of transformers that take values wider than keys
OURS = "nsvd_latents"  # ``attend``, by its name among them


class Attention(nn.Module):
    """What is read of an attention layer of transformers. For annotations alone: no layer is of this class."""

    head_dim: int
    layer_idx: int
    k_proj: nn.Linear | CompressedLayer
    v_proj: nn.Linear | CompressedLayer


class Factored(Attention):
    """One whose keys and values are factored. Likewise."""

    k_proj: LowRankLinear
    v_proj: LowRankLinear


def output_name(attention: nn.Module) -> str | None:
    """The name of the output projection, None where it has none of those known."""
    return next((name for name in OUTPUTS if isinstance(getattr(attention, name, None), nn.Module)), None)


def output_of(attention: nn.Module) -> nn.Linear:
    """The output projection of a layer that has one of a known name."""
    return getattr(attention, cast(str, output_name(attention)))


class Redirected:
    """An attention layer with another output projection, for one call of its family's ``forward``; nothing is changed in it.

    Where ``ours`` says so, its attention function is ``attend``.
    """

    def __init__(
        self, attention: nn.Module, output: Callable[[Tensor], Tensor], ours: Callable[[], bool] = lambda: False
    ):
        self._attention, self._ours = attention, ours
        setattr(self, cast(str, output_name(attention)), output)

    @property
    def config(self) -> Any:
        config = self._attention.config
        return _Attending(config) if self._ours() else config

    def __getattr__(self, name: str):
        return getattr(self._attention, name)


class _Attending:
    """A configuration that names ``attend``."""

    _attn_implementation = OURS

    def __init__(self, config: object):
        self._config = config

    def __getattr__(self, name: str):
        return getattr(self._config, name)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers' ``sdpa`` gives for one query and values (batch, n, s, width) that are the same for all heads.

    The values are read once. A GPU's own functions read such values once for each head, and are made for narrow ones. Scores are in
    float32. Where a query may see nothing, the result is the values' mean and not 0. ``softcap`` is left to ``sdpa``.
    """
    if softcap is not None:
        how = {"scaling": scaling, "position_bias": position_bias, "softcap": softcap}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how, **more)
    d, n = query.shape[-1], key.shape[1]
    query = query.float() * (d**-0.5 if scaling is None else scaling)
    scores = query.unflatten(1, (n, -1)).flatten(2, 3) @ key.float().mT  # heads of a group after each other
    scores = scores.flatten(1, 2).unsqueeze(2)
    for mask in (attention_mask, position_bias):
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.clamp(min=torch.finfo(torch.float32).min).softmax(-1).to(value.dtype)
    return (weights.flatten(1, 2) @ value[:, 0])[:, None], None


AttentionInterface.register(OURS, attend)


def multiplications(queries: int, held: int, heads: int, kv_heads: int, d: int, r: int) -> tuple[int, int]:
    """(V rebuilt, absorbed), by the table above without its last row."""
    rebuilt = held * kv_heads * d * r + queries * heads * held * d
    return rebuilt, queries * heads * held * r + queries * heads * d * r


def pays(attention: Factored, z: Tensor, queries: int) -> bool:
    """Whether absorbing takes fewer multiplications and no larger tensors for these latents z (batch, 1, s, r).

    No larger are those with r ≤ d, and those of a single text; else attention functions copy them for every head.
    """
    batch, _, held, r = z.shape
    d, v_proj, output = attention.head_dim, attention.v_proj, output_of(attention)
    if r > d and (batch > 1 or getattr(attention.config, "_attn_implementation", None) not in ANY_WIDTH):
        return False
    if type(v_proj.up) is not nn.Linear or attention.training:  # an adapter; dropout, and weights no longer sum to one
        return False
    rebuilt, absorbed = multiplications(queries, held, output.in_features // d, v_proj.out_features // d, d, r)
    return absorbed < rebuilt


def as_values(attention: Factored, z: Tensor) -> Tensor:
    """Latents (batch, 1, s, r) in the place of values (batch, n, s, max(r, d)), not copied for each of the n heads."""
    z = pad(z, (0, max(0, attention.head_dim - z.shape[-1])))
    return z.expand(-1, attention.v_proj.out_features // attention.head_dim, -1, -1)


def lift(attention: Factored, u: Tensor) -> Tensor:
    """What attention over values gives, (batch, q, h · d), from what it gives over ``as_values``, (batch, q, h · max(r, d))."""
    v_proj, d, r = attention.v_proj, attention.head_dim, attention.v_proj.rank
    n = v_proj.out_features // d
    u = u.unflatten(-1, (n, -1, max(r, d)))[..., :r]  # (batch, q, n, heads of a group, r)
    values = torch.einsum("bqgir,gdr->bqgid", u, v_proj.up.weight.unflatten(0, (n, d)))
    if v_proj.up.bias is not None:
        values = values + v_proj.up.bias.unflatten(0, (n, 1, d))
    return values.flatten(-3)


@torch.no_grad()
def absorbs(attention: Attention, args: tuple, kwargs: dict) -> bool:
    """Whether the layer's weights sum to one and its output projection reads nothing but the sum; shown on one call of it.

    Its values are shifted and widened by one channel, and have to come through so. To be asked in float32: weights sum to one
    no better than the dtype allows.
    """
    if output_name(attention) is None:
        return False
    plain, wide = _Handed(widen=False), _Handed(widen=True)
    try:
        expected = _summed(attention, *with_cache(args, kwargs, plain))
        given = _summed(attention, *with_cache(args, kwargs, wide))
        given = given.unflatten(-1, (-1, attention.head_dim + 1))[..., :-1].flatten(-2) - wide.shift
    except (AttributeError, RuntimeError, TypeError, ValueError):  # something wants values of the layer's own width
        return False
    return given.shape == expected.shape and bool((given - expected).norm() <= CLOSE * expected.norm())


def _summed(attention: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    """What the output projection is given."""
    seen, like = [], output_of(attention)

    def output(x: Tensor) -> Tensor:
        seen.append(x)
        return x.new_zeros(*x.shape[:-1], like.out_features)

    type(attention).forward(Redirected(attention, output), *args, **kwargs)
    if len(seen) != 1:
        raise ValueError("the output projection is not called once")
    return seen[0]


class _Handed:
    """In the place of a cache: gives back the keys and the values, these as they are or shifted and one channel wider."""

    def __init__(self, widen: bool):
        self.widen, self.shift = widen, 0.0

    def update(self, keys: Tensor, values: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        if self.widen:
            self.shift = values.abs().mean()
            values = torch.cat([values + self.shift, values[..., :1]], dim=-1)
        return keys, values
