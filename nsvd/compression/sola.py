"""SoLA on a model: ranks for the blocks of its layers, and the layers that take their place (arXiv 2604.03258).

Nothing is exchanged here: ``compress_`` does it when everything is computed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from nsvd.compression.measure import check_statistics, naming, prepare_layer
from nsvd.compression.report import Clock, relative_errors
from nsvd.compression.sola_blocks import blocks
from nsvd.linalg import Decomposition, LowRank, SplitMethod, saves_parameters
from nsvd.linalg.budget import cut, spectrum_steps
from nsvd.linalg.factors import remaining
from nsvd.linalg.precision import double, home
from nsvd.linalg.sola import COLUMNS, Block, Split
from nsvd.linalg.sola_ranks import Move, common, even, on_grid, search
from nsvd.stored.layers import LowRankLinear, SplitColumns, SplitRows
from nsvd.walk.moments import Statistics
from nsvd.walk.roles import Roles, roles

SOLA_ALLOCATIONS = ("sola", "uniform", "spectrum")


class Outcome(NamedTuple):
    """A row a layer for the report, the layers to exchange, and the moves of the search."""

    table: pd.DataFrame
    layers: dict[str, nn.Module]
    moves: list[Move]


def split(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    stats: Statistics,
    method: SplitMethod,
    options: dict,
    *,
    ratio: float | None,
    ranks: Mapping[str, int] | None,
    allocation: str,
    prepared: Mapping[str, Decomposition] | None,
    clock: Clock,
    progress: bool,
) -> Outcome:
    """Split the feed-forwards, factor all blocks, and say what takes the place of which layer."""
    settings, (inner, rest) = method.resolve(options), method.inner(options)
    found = roles(model)
    parts = blocks(layers, found, stats, settings, ratio)
    check_statistics({name: layers[name] for name in parts}, stats, inner)
    if unknown := [name for name in ranks or () if name not in parts]:
        raise ValueError(f"layer {unknown[0]} is not one that SoLA compresses with {_exclusions(settings)}")
    clock.lap("roles")
    if prepared is None:
        wanted = {name: parts[name] for name in (parts if ratio else ranks or ())}
        bars = tqdm(wanted.items(), "decompose", disable=not progress, leave=False)
        prepared = {n: prepare_layer(layers[n], n, stats, inner, rest, block).to("cpu") for n, block in bars}
        clock.lap("decompose")
    moves: list[Move] = []
    if ranks is None:
        spectra = {name: prepared[name].s for name in parts} if ratio else {}
        kinds = {name: found.places[name][1] if name in found.places else name for name in parts}
        ranks, moves = allocate(layers, parts, kinds, spectra, ratio, allocation, settings, inner.least_rank(rest))
        clock.lap("search")
    cut = {name: partial(inner.cut, prepared[name], k, **rest) for name, k in ranks.items()}
    table, values = _factor(layers, parts, ranks, cut, stats, clock)
    return Outcome(table, _exchanges(layers, found, parts, values), moves)


def _factor(
    layers: Mapping[str, nn.Linear],
    parts: Mapping[str, Block],
    ranks: Mapping[str, int],
    cut: Mapping[str, Callable[[], LowRank]],
    stats: Statistics,
    clock: Clock,
) -> tuple[pd.DataFrame, dict[str, Split]]:
    """A row a layer for the report, and in the model's dtype those layers split whose blocks become smaller."""
    rows, values = [], {}
    for name, layer in layers.items():
        d_out, d_in, k = *layer.weight.shape, ranks.get(name)
        row = {"layer": name, "d_out": d_out, "d_in": d_in, "rank": k, "dense": True}
        row |= {"prime": parts[name].prime if name in parts else 0, "params": d_out * d_in}
        if k is not None and saves_parameters(*parts[name].shape(d_out, d_in), k):
            with naming(name):
                value = parts[name].join(double(layer.weight), cut[name]().to(home(layer.weight)))
            values[name] = value.to(layer.weight.dtype)
            clock.lap("cut")
            row |= {"dense": False, "params": value.n_params} | relative_errors(layer, value.dense(), stats, name)
            clock.lap("errors")
        rows.append(row)
    return pd.DataFrame(rows).astype({"rank": "Int64"}), values


def _exchanges(
    layers: Mapping[str, nn.Linear], found: Roles, parts: Mapping[str, Block], values: Mapping[str, Split]
) -> dict[str, nn.Module]:
    """What takes the place of which layer; a dense one beside a split one has to follow its neurons."""
    new: dict[str, nn.Module] = {}
    for name, value in values.items():
        with naming(name):
            new[name] = _factored(layers[name], value)
    for last, first in found.neurons.items():
        group = [*first, last]
        if any(name in values and parts[name].prime for name in group):
            new |= {name: _permuted(layers[name], parts[name]) for name in group if name not in values}
    return new


def allocate(
    layers: Mapping[str, nn.Linear],
    parts: Mapping[str, Block],
    kinds: Mapping[str, str],
    spectra: Mapping[str, torch.Tensor],
    ratio: float,
    allocation: str,
    settings: Mapping,
    least: int,
) -> tuple[dict[str, int], list[Move]]:
    """Ranks of the blocks that remove ``ratio`` of the parameters of all ``layers``, and the moves of SoLA's search.

    Layers of one of the ``kinds``, those of one name in their block, get one rank.

    Raises:
        ValueError: if that much cannot be removed; the message names the options that stand in the way.
    """
    if not ratio:
        return {}, []
    whole = {name: layer.weight.numel() for name, layer in layers.items()}
    shapes = {name: block.shape(*layers[name].weight.shape) for name, block in parts.items()}
    total, sizes = sum(whole.values()), {name: math.prod(shape) for name, shape in shapes.items()}
    dense = total - sum(sizes.values())  # primes, and layers left out
    budget = remaining(total, ratio) - dense
    grid = settings["grid"] if allocation == "sola" else 1
    smallest = on_grid(least, grid)
    reach = sum(max(sizes[name] - smallest * sum(shape), 0) for name, shape in shapes.items())
    advice = f"loosen {_exclusions(settings)}"
    if sum(sizes.values()) - reach > budget:
        raise ValueError(f"ratio {ratio} is out of reach: at most {reach / total:.4f} can be removed; {advice}")
    if allocation == "uniform":
        primes = sum(whole[name] - sizes[name] for name in parts)
        return even(shapes, {name: whole[name] for name in parts}, budget + primes), []
    if allocation == "spectrum":
        return cut(spectrum_steps(spectra, shapes, least=least), shapes, 1 - budget / sum(sizes.values())), []
    try:
        ranks, moves = search(spectra, shapes, budget, grid=grid, least=least, floor=float(settings["floor"]))
    except ValueError as error:
        raise ValueError(f"ratio {ratio} is out of reach: {error}; lower floor or {advice}") from error
    return common(ranks, kinds, spectra, shapes, budget, grid=grid), moves


def _exclusions(settings: Mapping) -> str:
    return ", ".join(f"{name} = {settings[name]}" for name in ("keep_outer", "compress_v", "o_from", "prime"))


def _factored(layer: nn.Linear, value: Split) -> nn.Module:
    if not value.block.prime:
        return LowRankLinear.from_factors(layer, value.marginal)
    return (SplitColumns if value.block.dim == COLUMNS else SplitRows).from_split(layer, value)


@torch.no_grad()
def _permuted(layer: nn.Linear, block: Block) -> nn.Linear:
    """The dense layer with its prime neurons in front, as the others of its feed-forward have them."""
    new = copy.deepcopy(layer)
    new.weight.copy_(block.permute(layer.weight))
    if layer.bias is not None and block.dim != COLUMNS:
        new.bias.copy_(block.permute(layer.bias))
    return new
