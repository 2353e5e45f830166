r"""Factor the key and value projections so far that their latents make a KV cache of the size wanted.

A dense cache holds d_k + d_v numbers a token and layer, a latent one r_k + r_v (or one rank r for both), and the digits of the
token's position in one layer of each kind. ``cache_ratio`` is the fraction of bytes KEPT, unlike ``ratio`` in ``compress_``, the
fraction removed. Every layer gets the same share; the layers that keep positions pay for them from theirs. Within a layer the
share is split so that the sum of the relative squared errors is least,

    min over r_k + r_v = share of  Σ_{i>r_k} s_i(W_k S)² / ‖W_k S‖² + Σ_{i>r_v} s_i(W_v S)² / ‖W_v S‖²,

in the metric S of the method. With ``joint=True`` the same sum is least over one latent for both: that is the rank-r decomposition
of the stacked matrix [W_k / ‖W_k S‖; W_v / ‖W_v S‖], whose latent takes r numbers a token where the separate ones take r_k + r_v
(as in the joint form of Palu, arXiv 2407.21118; the latent cache itself is the ASVD paper's, arXiv 2312.05821).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nsvd.linalg import LowRank, Method, Moments, by_name
from nsvd.linalg.methods import check_finite
from nsvd.model.attention import by_kind, examine, key_value_layers
from nsvd.model.checkpoint import mark_compressed
from nsvd.model.latent import DIGITS, attach, bytes_per_token, latent_layers
from nsvd.model.layers import LowRankLinear
from nsvd.model.moments import Statistics, calibrate
from nsvd.model.prepare import check_statistics, naming
from nsvd.model.report import Clock, peak_memory, relative_errors, versions


@dataclass(frozen=True)
class CacheReport:
    """What ``compress_kv_`` did. Bytes are those of the cache, for one token; parameters those of the key and value projections."""

    method: str
    options: dict
    joint: bool
    cache_ratio: float  # asked, fraction kept
    cache_ratio_reached: float
    bytes_before: int
    bytes_after: int
    params_before: int
    params_after: int
    seconds: dict[str, float]  # by stage
    peak_memory: int  # bytes: of the GPU where there is one, else of the process so far
    versions: dict[str, str]
    table: pd.DataFrame  # a row an attention layer: ranks and relative errors of both projections

    def as_dict(self) -> dict:
        """Everything but the table, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name != "table"}


@torch.no_grad()
def compress_kv_(
    model: PreTrainedModel,
    stats: Statistics | None = None,
    *,
    cache_ratio: float = 0.5,
    method: str = "asvd-1",
    joint: bool = False,
    absorb: bool | str = "auto",
    windows: Tensor | None = None,
    **options: float,
) -> CacheReport:
    """Factor ``k_proj`` and ``v_proj`` of every attention layer and let transformers' caches hold their latents, in place.

    Afterwards ``generate`` and any forward pass with a cache hold latents; ``save`` and ``load`` keep that, ``dequantize`` undoes
    it. A model that ``compress_`` has compressed before is welcome: what is factored is then the product of its factors. Nothing
    is changed when something raises.

    Args:
        model: a decoder-only model of transformers with separate key and value projections.
        stats: moments from ``calibrate`` (not needed for ``svd``), of the model as it was when dense, or as it is.
        cache_ratio: fraction of the bytes of the dense cache to KEEP, in (0, 1], positions included.
        method: a name of ``METHODS``; ``options`` are its own (``k1``, ``alpha``, ``mu``).
        joint: one latent for keys and values.
        absorb: never rebuild values where attention over their latents is cheaper, which is decided at every call: fewer
            multiplications and, as attention functions copy wide values for every head, r_v ≤ head width or a single text.
            The outputs are the same but for rounding. ``auto``: in the layers that allow it; True: or raise; False: nowhere.
        windows: token ids to calibrate on when ``stats`` is not given.

    Raises:
        ValueError: unknown method or option; ``cache_ratio`` out of range or leaving nothing to a layer; an attention layer
            that latents cannot be cached for, or with ``absorb=True`` not absorbed (it is named); NaN or Inf in a weight; statistics that do not fit; done before.
        FloatingPointError: NaN or Inf in an activation; the layer is named.
    """
    chosen, settings, clock = by_name(method), by_name(method).resolve(options), Clock()
    if not 0 < cache_ratio <= 1:
        raise ValueError(f"cache_ratio is {cache_ratio}, but the fraction of the cache kept lies in (0, 1]")
    if latent_layers(model):
        raise ValueError("this model caches latents already; dequantize() it first")
    projections = _projections(model)
    examined = examine(model)
    rotated = {name: turned for name, (turned, _) in examined.items()}
    absorbing = _absorbing(model, {name: able for name, (_, able) in examined.items()}, absorb)
    clock.lap("examine")
    if stats is None and windows is not None and chosen.needs_moments:
        names = [name for pair in projections.values() for name in pair]
        stats = calibrate(model, windows, layers=names)
        clock.lap("calibrate")
    check_statistics({n: layer for pair in projections.values() for n, layer in pair.items()}, stats, chosen)
    shares = _shares(model, projections, rotated, cache_ratio)

    rows, factored = [], {}
    for attention, pair in projections.items():
        moments = stats[next(iter(pair))].to(model.device) if chosen.needs_moments else None
        with naming(attention):
            W_k, W_v = (layer.weight.double() for layer in pair.values())
            values = (_joint if joint else _separate)(chosen, settings, W_k, W_v, moments, shares[attention])
        row = {"layer": attention, "rank_k": values[0].rank, "rank_v": values[1].rank}
        for (name, layer), value, letter in zip(pair.items(), values, "kv", strict=True):
            row |= {f"{letter}_{error}": number for error, number in relative_errors(layer, value, stats, name).items()}
            factored[name] = value.to(layer.weight.dtype)
        rows.append(row)
    clock.lap("decompose")

    before = sum(layer.weight.numel() for pair in projections.values() for layer in pair.values())
    for pair in projections.values():
        for name, layer in pair.items():
            model.set_submodule(name, LowRankLinear.from_factors(layer, factored[name]))
    latent = {name: {"rotated": rotated[name], "joint": joint, "absorb": absorbing[name]} for name in projections}
    attach(model, latent)
    about = {"method": method, "options": settings, "cache_ratio": cache_ratio, "layers": latent}
    mark_compressed(model, factored, latent_cache=about)
    clock.lap("exchange")
    dense, held = bytes_per_token(model)
    after = sum({id(p): p.numel() for name in factored for p in _weights(model.get_submodule(name))}.values())
    return CacheReport(
        method, settings, joint, cache_ratio, held / dense, dense, held, before, after,
        clock.seconds, peak_memory(), versions(), pd.DataFrame(rows),
    )  # fmt: skip


def _projections(model: nn.Module) -> dict[str, dict[str, nn.Linear]]:
    """Key and value projection of every attention layer, by names; factored ones multiplied out."""
    found = {}
    for attention, module in key_value_layers(model).items():
        pair = {f"{attention}.k_proj": module.k_proj, f"{attention}.v_proj": module.v_proj}
        for name, layer in pair.items():
            for weight in _weights(layer):
                check_finite(f"the weight of layer {name}", weight)
        found[attention] = {
            name: layer.to_linear() if isinstance(layer, LowRankLinear) else layer for name, layer in pair.items()
        }
    return found


def _absorbing(model: nn.Module, able: dict[str, bool], absorb: bool | str) -> dict[str, bool]:
    """Which attention layers may keep values latent."""
    if absorb not in (True, False, "auto"):
        raise ValueError(f"absorb is {absorb!r}, but it is True, False or 'auto'")
    for name in able:
        if absorb is True and not able[name]:
            kind = type(model.get_submodule(name)).__name__
            raise ValueError(
                f"layer {name} ({kind}): the values' up-projection cannot be absorbed, because the weights do not sum to "
                "one or something comes between the weighted sum of values and the output projection"
            )
    return {name: bool(absorb) and able[name] for name in able}


def _weights(layer: nn.Module) -> list[Tensor]:
    return [parameter for parameter in layer.parameters() if parameter.ndim == 2]


def _shares(model: PreTrainedModel, projections: dict, rotated: dict[str, int], cache_ratio: float) -> dict[str, int]:
    """Latent numbers a token for each attention layer: ⌊cache_ratio (d_k + d_v)⌋, less the digits where positions are kept."""
    index = {attention: model.get_submodule(attention).layer_idx for attention in projections}
    keepers = {of[0] for of in by_kind(model, [index[name] for name in projections if rotated[name]]).values()}
    shares = {}
    for attention, pair in projections.items():
        whole = cache_ratio * sum(layer.out_features for layer in pair.values())
        shares[attention] = int(round(whole, 9)) - DIGITS * (index[attention] in keepers)
        if shares[attention] < 2:
            raise ValueError(f"layer {attention}: cache_ratio {cache_ratio} leaves no rank for keys and values")
    return shares


def _separate(
    method: Method, options: dict, W_k: Tensor, W_v: Tensor, moments: Moments | None, share: int
) -> tuple[LowRank, LowRank]:
    """W_k and W_v each by its own decomposition; the ranks add up to ``share`` at most."""
    one, other = (method.prepare(W, moments, **options) for W in (W_k, W_v))
    r_k, r_v = split_share(one.s, other.s, share, least=method.least_rank(options))
    return method.cut(one, r_k, **options), method.cut(other, r_v, **options)


def split_share(s_k: Tensor, s_v: Tensor, share: int, *, least: int = 1) -> tuple[int, int]:
    """(r_k, r_v), r_k + r_v = share (or all there is), each at least ``least``, that minimise the summed relative squared tails."""
    lost_k, lost_v = _relative_tails(s_k), _relative_tails(s_v)
    share = min(share, len(s_k) + len(s_v))
    first, last = max(least, share - len(s_v)), min(len(s_k), share - least)
    if first > last:
        raise ValueError(f"{share} numbers a token leave keys and values less than rank {least} each")
    r_k = torch.arange(first, last + 1, device=s_k.device)
    best = first + int((lost_k[r_k] + lost_v[share - r_k]).argmin())
    return best, share - best


def _relative_tails(s: Tensor) -> Tensor:
    """Σ_{i>r} s_i² / Σ s_i² for r = 0 … len(s)."""
    squares = s.square()
    if not squares.sum():
        raise ValueError("keys or values are zero")
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) / squares.sum()


def _joint(
    method: Method, options: dict, W_k: Tensor, W_v: Tensor, moments: Moments | None, share: int
) -> tuple[LowRank, LowRank]:
    """Two up-projections on one down-projection of rank ``share`` (or all there is)."""
    norms = [method.prepare(W, moments, **options).s.norm() for W in (W_k, W_v)]
    if not all(norms):
        raise ValueError("keys or values are zero")
    stacked = method.prepare(torch.cat([W_k / norms[0], W_v / norms[1]]), moments, **options)
    both = method.cut(stacked, min(share, len(stacked.s)), **options)
    left_k, left_v = both.left.split([len(W_k), len(W_v)])
    return LowRank(norms[0] * left_k, both.right), LowRank(norms[1] * left_v, both.right)
