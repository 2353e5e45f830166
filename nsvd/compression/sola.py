"""SoLA on a model: ranks for the blocks of its layers, and the layers that take their place (arXiv 2604.03258)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from nsvd.compression.exchange import Exchange, told
from nsvd.compression.measure import check_statistics, decompositions, is_mine, naming
from nsvd.compression.report import relative_errors
from nsvd.compression.sola_blocks import blocks
from nsvd.compression.whole_layers import Result
from nsvd.linalg import Decomposition, LowRank, SplitMethod, saves_parameters
from nsvd.linalg.budget import cut, spectrum_steps
from nsvd.linalg.factors import remaining
from nsvd.linalg.precision import double, home
from nsvd.linalg.sola import COLUMNS, Block, Split
from nsvd.linalg.sola_ranks import Move, common, even, on_grid, search
from nsvd.stored.layers import LowRankLinear, SplitColumns, SplitRows
from nsvd.walk.lazy import held
from nsvd.walk.roles import Roles, roles
from nsvd.walk.soundness import check_exchanged
from nsvd.walk.targets import by_block, shape_of


def split(job: Exchange, prepared: Mapping[str, Decomposition] | None, before: Tensor) -> Result:
    """Split the feed-forwards, factor all blocks of layers, exchange them; when something raises, none.

    ``before`` is what the dense model said to the tokens that it is tried on afterwards.
    """
    ask, layers, method = job.ask, job.layers, cast(SplitMethod, job.ask.method)
    settings, (inner, rest) = method.resolve(ask.options), method.inner(ask.options)
    found = roles(job.model)
    parts = blocks(layers, found, job.stats, settings, ask.ratio)
    check_statistics({name: layers[name] for name in parts}, job.measured, inner)
    if unknown := [name for name in ask.ranks or () if name not in parts]:
        raise ValueError(f"layer {unknown[0]} is not one that SoLA compresses with {_exclusions(settings)}")
    job.clock.lap("roles")
    if prepared is None:
        prepared = job.shelf.own.kept("decompositions")
        wanted = {name: parts[name] for name in (parts if ask.ratio else ask.ranks or ())}
        how = {"parts": wanted, "progress": ask.progress}
        decompositions(prepared, job.model, layers, job.measured, inner, rest, **how)
        job.clock.lap("decompose")
    ranks, moves = ask.ranks, []
    if ranks is None:
        spectra = {name: prepared[name].s for name in parts} if ask.ratio else {}
        kinds = {name: found.places[name][1] if name in found.places else name for name in parts}
        how = (settings, inner.least_rank(rest))
        ranks, moves = allocate(layers, parts, kinds, spectra, ask.removed, ask.allocation, *how)
        job.clock.lap("search")
    smaller = {n: k for n, k in ranks.items() if saves_parameters(*parts[n].shape(*shape_of(layers[n])), k)}
    moved = _permuted_beside(found, parts, smaller)
    everything = {*smaller, *moved}
    try:
        for index, names in by_block(job.model, [name for name in layers if name in everything]).items():
            if not job.resumed(index):
                with held(job.blocks[index]):
                    factored = {n: layers[n] for n in names if n in smaller}
                    cut = {
                        n: partial(inner.cut, prepared[n], smaller[n], **rest)
                        for n in factored
                        if is_mine(job.owner, n)
                    }
                    new = told({n: _new(job, parts[n], n, cut[n]) for n in cut}, job.owner, factored)
                    new |= {n: _new(job, parts[n], n, None) for n in names if n not in smaller}
                    job.put(index, {n: new[n] for n in names})
        check_exchanged(job.model, {name: layers[name] for name in (*smaller, *moved)}, before)
    except BaseException:
        job.undo([*smaller, *moved])
        raise
    job.clock.lap("exchange")
    return Result(_rows(job, parts, ranks, smaller), list(smaller), moves=moves)


def _permuted_beside(found: Roles, parts: Mapping[str, Block], smaller: Mapping[str, int]) -> list[str]:
    """Layers that stay dense beside a split one, and have to follow its neurons."""
    groups = [[*first, last] for last, first in found.neurons.items()]
    split_up = [group for group in groups if any(name in smaller and parts[name].prime for name in group)]
    return [name for group in split_up for name in group if name not in smaller]


def _new(job: Exchange, part: Block, name: str, cut: Callable[[], LowRank] | None) -> nn.Module:
    """What takes the place of a layer; without a ``cut`` it is dense, and its neurons are in the others' order."""
    layer = job.layers[name]
    with naming(name):
        if cut is None:
            return _permuted(layer, part)
        value = part.join(double(layer.weight), cut().to(home(layer.weight)))
        job.clock.lap("cut")
        job.errors[name] = relative_errors(layer, value.dense(), job.stats, name)
        job.clock.lap("errors")
        return _factored(layer, value.to(layer.weight.dtype))


def _rows(
    job: Exchange, parts: Mapping[str, Block], ranks: Mapping[str, int], smaller: Mapping[str, int]
) -> list[dict]:
    """A row a layer for the report."""
    rows = []
    for name, layer in job.layers.items():
        (d_out, d_in), part = layer.weight.shape, parts.get(name)
        row = {"layer": name, "d_out": d_out, "d_in": d_in, "rank": ranks.get(name), "dense": name not in smaller}
        params = d_out * d_in
        if name in smaller:
            shape = parts[name].shape(d_out, d_in)
            params += smaller[name] * sum(shape) - math.prod(shape)
        rows.append(row | {"prime": part.prime if part else 0, "params": params} | job.errors.get(name, {}))
    return rows


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
    shapes = {name: block.shape(*shape_of(layers[name])) for name, block in parts.items()}
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
