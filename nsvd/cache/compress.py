r"""Factor the key and value projections so far that their latents make a KV cache of the size wanted.

A dense cache holds d_k + d_v numbers a token and layer, a latent one r_k + r_v (or one rank r for both), and the digits of the
token's position in one layer of each kind. ``cache_ratio`` is the fraction of bytes KEPT, unlike ``ratio`` in ``compress_``, the
fraction removed. Every layer gets the same share; the layers that keep positions pay for them from theirs. Within a layer the
share is split so that the sum of the relative squared errors is least,

    min over r_k + r_v = share of  Σ_{i>r_k} s_i(W_k S)² / ‖W_k S‖² + Σ_{i>r_v} s_i(W_v S)² / ‖W_v S‖²,

in the metric S of the method. With ``joint=True`` the same sum is least over one latent for both: that is the rank-r decomposition
of the stacked matrix [W_k / ‖W_k S‖; W_v / ‖W_v S‖], whose latent takes r numbers a token where the separate ones take r_k + r_v
(as in the joint form of Palu, arXiv 2407.21118; the latent cache itself is the ASVD paper's, arXiv 2312.05821).

The squares of ``kfac``, with a metric on both sides, are losses of the whole model and need no norm under them. One threshold on
them then shares out the bytes of all layers together (``allocation="fisher"``), and each layer's cache gets its own width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nsvd.cache.attention import by_kind, examine, key_value_layers
from nsvd.cache.latent import DIGITS, attach, bytes_per_token, latent_layers
from nsvd.cache.pairs import Factoring, Pair
from nsvd.compression.measure import check_gradients, check_statistics, naming, take_statistics
from nsvd.compression.report import Clock, Tabled, peak_memory, relative_errors, versions
from nsvd.compression.request import RECIPES, recipe
from nsvd.linalg import matrix_method
from nsvd.linalg.methods import check_finite
from nsvd.linalg.precision import double, home
from nsvd.markup import bar, block, table, text
from nsvd.stored.changes import factor_sums, is_changed
from nsvd.stored.checkpoint import check_unwrapped, mark_compressed
from nsvd.stored.layers import CompressedLayer, LowRankLinear
from nsvd.walk.sampling import own_text
from nsvd.walk.soundness import check_values
from nsvd.walk.statistics import Statistics

CACHE_ALLOCATIONS = ("uniform", "fisher")


@dataclass(frozen=True, repr=False)
class CacheReport(Tabled):
    """What ``compress_kv_`` did. Bytes are those of the cache, for one token; parameters those of the key and value projections."""

    method: str
    options: dict
    joint: bool
    allocation: str  # of CACHE_ALLOCATIONS
    cache_ratio: float  # asked, fraction kept
    cache_ratio_reached: float
    bytes_before: int
    bytes_after: int
    params_before: int
    params_after: int
    seconds: dict[str, float]  # by stage
    peak_memory: int | None  # bytes: of the GPU where there is one, else of the process so far; None: not known
    versions: dict[str, str]
    rows: list[dict]  # one an attention layer: ranks and relative errors of both projections

    def as_dict(self) -> dict:
        """Everything but the rows, ready for JSON."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "rows"}

    def __repr__(self) -> str:
        return (
            f"CacheReport({self.method}, {self.bytes_before:,} → {self.bytes_after:,} bytes a token "
            f"({self.cache_ratio_reached:.1%} kept), {len(self.rows)} attention layers, {sum(self.seconds.values()):.1f} s)"
        )

    def _repr_html_(self) -> str:
        """The bytes of a token in one line, then a row an attention layer; bars show ranks and relative errors."""
        names = [name for name in self.rows[0] if name != "layer"] if self.rows else []
        most = {name: max(row.get(name) or 0 for row in self.rows) for name in names}
        form = lambda name: "{:.0f}" if name.startswith("rank") else "{:.1%}"  # noqa: E731
        lines = [[text(row["layer"]), *(bar(row.get(n), most[n], form(n)) for n in names)] for row in self.rows]
        title = f"{self.method}: KV cache of {self.bytes_after:,} bytes a token, {self.cache_ratio_reached:.1%} of the dense one"
        return block(title, table(["layer", *(name.replace("_", " ") for name in names)], lines))


@torch.inference_mode(False)
@torch.no_grad()
def compress_kv_(
    model: PreTrainedModel,
    stats: Statistics | None = None,
    *,
    cache_ratio: float = 0.5,
    method: str = "asvd-1",
    joint: bool | None = None,
    allocation: str | None = None,
    absorb: bool | str = "auto",
    windows: Tensor | Sequence[Tensor] | None = None,
    seed: int = 0,
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
        method: a name of ``METHODS``; ``options`` are its own (``k1``, ``alpha``, ``mu``, ``eta``). Or ``best``: ``kfac``,
            ``joint``, with the allocation ``fisher``, on text that the model samples from itself where neither ``stats`` nor
            ``windows`` are given.
        joint: one latent for keys and values; False but for ``best``.
        allocation: ``uniform`` (the default), the same share for every layer; or ``fisher``, the smallest rise of the loss for
            all layers together, as the gradients predict it, which keeps all decompositions in memory at once.
        absorb: never rebuild values where attention over their latents is cheaper, which is decided at every call: fewer
            multiplications and, as attention functions copy wide values for every head, r_v ≤ head width or a single text.
            The outputs are the same but for rounding. ``auto``: in the layers that allow it; True: or raise; False: nowhere.
        windows: token ids (count, length), or one such tensor for each of several domains that count equally, to calibrate on
            when ``stats`` is not given, and to take gradients from.
        seed: of what is sampled.

    Raises:
        ValueError: unknown method, option or allocation; ``cache_ratio`` out of range or leaving nothing to a layer; an attention
            layer that latents cannot be cached for, or values not absorbed in with ``absorb=True`` (it is named); NaN or Inf in
            a weight; statistics that do not fit; done before.
        FloatingPointError: NaN or Inf in an activation; the layer is named.
    """
    chosen, usual, clock = matrix_method(recipe(method).method), recipe(method).cache, Clock()
    allocation = allocation or usual.get("allocation", "uniform")
    joint = usual.get("joint", False) if joint is None else joint
    settings, domains = chosen.resolve(options), [windows] if isinstance(windows, Tensor) else list(windows or ())
    _check(model, cache_ratio, allocation, absorb)
    check_values(model)
    changed = is_changed(model)
    projections = _projections(model)
    rotated, absorbing = _examined(model, absorb)
    clock.lap("examine")
    if method in RECIPES and stats is None and not domains:
        domains = [own_text(model, seed=seed)]
        clock.lap("sample")
    layers = {name: layer for pair in projections.values() for name, layer in pair.items()}
    stats = take_statistics(model, stats, domains, chosen, allocation, clock, seed, layers=list(layers))
    check_statistics(layers, stats, chosen)
    if allocation == "fisher":
        check_gradients(layers, stats, "allocation 'fisher'")
    shares = _shares(model, projections, rotated, cache_ratio)
    factoring = Factoring(chosen, settings, joint, allocation == "fisher")
    pairs, ranks = {}, {}
    if allocation == "fisher":
        pairs = {name: _prepare(factoring, name, pair, stats).to("cpu") for name, pair in projections.items()}
        ranks = factoring.over_all(pairs, sum(shares.values()))
    rows, factored = [], {}
    for attention, pair in projections.items():
        prepared = pairs.pop(attention, None) or _prepare(factoring, attention, pair, stats)
        prepared = prepared.to(home(next(iter(pair.values())).weight))
        with naming(attention):
            values = factoring.cut(prepared, ranks.get(attention) or factoring.within(prepared, shares[attention]))
        row = {"layer": attention, "rank_k": values[0].rank, "rank_v": values[1].rank}
        for (name, layer), value, letter in zip(pair.items(), values, "kv", strict=True):
            row |= {
                f"{letter}_{error}": number
                for error, number in relative_errors(layer, value.dense(), stats, name).items()
            }
            factored[name] = value.to(layer.weight.dtype)
        rows.append(row)
    clock.lap("decompose")

    before = sum(layer.weight.numel() for pair in projections.values() for layer in pair.values())
    new = {}
    for pair in projections.values():
        for name, layer in pair.items():
            with naming(name):
                new[name] = LowRankLinear.from_factors(layer, factored[name])
    for name, layer in new.items():
        model.set_submodule(name, layer)
    latent = {name: {"rotated": rotated[name], "joint": joint, "absorb": absorbing[name]} for name in projections}
    attach(model, latent)
    about = {
        "method": method,
        "options": settings,
        "allocation": allocation,
        "cache_ratio": cache_ratio,
        "layers": latent,
    }
    sums = {} if changed else {"factor_sums": factor_sums(model)}  # the earlier ones tell that it was changed
    mark_compressed(model, factored, latent_cache=about, **sums)
    clock.lap("exchange")
    dense, held = bytes_per_token(model)
    after = sum({id(p): p.numel() for name in factored for p in _weights(model.get_submodule(name))}.values())
    return CacheReport(
        method, settings, joint, allocation, cache_ratio, held / dense, dense, held, before, after,
        clock.seconds, peak_memory(), versions(), rows,
    )  # fmt: skip


def _check(model: nn.Module, cache_ratio: float, allocation: str, absorb: bool | str) -> None:
    check_unwrapped(model)
    if not 0 < cache_ratio <= 1:
        raise ValueError(f"cache_ratio is {cache_ratio}, but the fraction of the cache kept lies in (0, 1]")
    if allocation not in CACHE_ALLOCATIONS:
        raise ValueError(f"unknown allocation {allocation!r}; there are {', '.join(CACHE_ALLOCATIONS)}")
    if absorb not in (True, False, "auto"):
        raise ValueError(f"absorb is {absorb!r}, but it is True, False or 'auto'")
    if latent_layers(model):
        raise ValueError("this model caches latents already; dequantize() it first")


def _examined(model: PreTrainedModel, absorb: bool | str) -> tuple[dict[str, int], dict[str, bool]]:
    """For every attention layer the rotated channels of a head, and whether it may keep values latent."""
    found = examine(model)
    for name, (_, able) in found.items():
        if absorb is True and not able:
            raise ValueError(
                f"layer {name} ({type(model.get_submodule(name)).__name__}): the values' up-projection cannot be absorbed: "
                "the weights do not sum to one, or something comes between their sum of values and the output projection"
            )
    return {n: rotated for n, (rotated, _) in found.items()}, {
        n: bool(absorb) and able for n, (_, able) in found.items()
    }


def _prepare(factoring: Factoring, attention: str, pair: Mapping[str, nn.Linear], stats: Statistics | None) -> Pair:
    weights = [double(layer.weight) for layer in pair.values()]
    known = [cast(Statistics, stats)[name].to(weights[0].device) if factoring.needs_moments else None for name in pair]
    with naming(attention):
        return factoring.prepare(weights, known)


def _projections(model: nn.Module) -> dict[str, dict[str, nn.Linear]]:
    """Key and value projection of every attention layer, by names; factored ones multiplied out."""
    found = {}
    for attention, module in key_value_layers(model).items():
        pair = {f"{attention}.k_proj": module.k_proj, f"{attention}.v_proj": module.v_proj}
        for name, layer in pair.items():
            for weight in _weights(layer):
                check_finite(f"the weight of layer {name}", weight)
        found[attention] = {
            name: layer.to_linear() if isinstance(layer, CompressedLayer) else layer for name, layer in pair.items()
        }
    return found


def _weights(layer: nn.Module) -> list[Tensor]:
    return [parameter for parameter in layer.parameters() if parameter.ndim == 2]


def _shares(model: PreTrainedModel, projections: dict, rotated: dict[str, int], cache_ratio: float) -> dict[str, int]:
    """Latent numbers a token for each attention layer: ⌊cache_ratio (d_k + d_v)⌋, less the digits where positions are kept."""
    index = {name: layer.layer_idx for name, layer in key_value_layers(model).items() if name in projections}
    keepers = {of[0] for of in by_kind(model, [index[name] for name in projections if rotated[name]]).values()}
    shares = {}
    for attention, pair in projections.items():
        whole = cache_ratio * sum(layer.out_features for layer in pair.values())
        shares[attention] = int(round(whole, 9)) - DIGITS * (index[attention] in keepers)
        if shares[attention] < 2:
            raise ValueError(f"layer {attention}: cache_ratio {cache_ratio} leaves no rank for keys and values")
    return shares
