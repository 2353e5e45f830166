"""Replace the linear layers of a model by low-rank ones, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from nsvd.linalg import Decomposition, saves_parameters
from nsvd.model.allocation import searched, uniform
from nsvd.model.arguments import Arguments, resolve
from nsvd.model.checkpoint import is_compressed, mark_compressed
from nsvd.model.exchange import Exchange, layer_table
from nsvd.model.layers import CompressedLayer
from nsvd.model.moments import Statistics
from nsvd.model.prepare import (
    check_gradients,
    check_statistics,
    check_weights,
    mean_gradients,
    prepare,
    take_statistics,
)
from nsvd.model.recipes import recipe
from nsvd.model.report import Clock, peak_memory, versions
from nsvd.model.sampling import own_text
from nsvd.model.sola import split
from nsvd.model.targets import targets

RANKS_EVERY = (
    2  # every second window is enough for moments that decide on ranks alone, as where the layers see shifted ones
)


@dataclass(frozen=True)
class Report:
    """What ``compress_`` did. Parameters and bytes count the target layers' weights, biases left out."""

    method: str
    options: dict
    allocation: str  # of ALLOCATIONS, or "given"
    factors: str  # of FACTORS
    shifted: bool
    refine: int  # steps a block
    search_tokens: int  # that went through the model to find the ranks
    ratio: float | None  # asked
    ratio_reached: float
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    seconds: dict[str, float]  # by stage
    peak_memory: int  # bytes: of the GPU where there is one, else of the process so far
    versions: dict[str, str]
    table: pd.DataFrame  # a row a layer; errors of the float64 factors, or of the refined ones in the model's dtype
    moves: list = field(default_factory=list)  # of SoLA's search, see ``nsvd.linalg.sola_ranks``

    def as_dict(self) -> dict:
        """Everything but the table and the moves, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("table", "moves")}


@torch.no_grad()
def compress_(
    model: nn.Module,
    stats: Statistics | None = None,
    *,
    method: str = "nsvd-1",
    ratio: float | None = None,
    ranks: Mapping[str, int] | None = None,
    allocation: str | None = None,
    factors: str | None = None,
    shifted: bool | None = None,
    refine: int = 0,
    windows: Tensor | Sequence[Tensor] | None = None,
    weights: Sequence[float] | str = "uniform",
    prepared: Mapping[str, Decomposition] | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: float | str,
) -> Report:
    """Replace every target layer by rank-k factors, in place, and report.

    All layers are decomposed, in float64, before the first is exchanged (with ``shifted`` those already exchanged are put
    back): when something raises, the model is unchanged. A layer whose factors would not be smaller than its weight stays
    dense and is reported so; the model's dtype is kept.

    Args:
        model: a model with ``nn.Linear`` layers.
        stats: moments from ``calibrate`` (not needed for ``svd``).
        method: a name of ``METHODS``; ``options`` are its own (``k1``, ``alpha``, ``mu``, ``eta``; for ``sola`` those
            of ``nsvd.linalg.sola.PUBLISHED`` and of its ``inner`` method). Or ``best``: ``kfac``
            with the allocation ``fisher``, pivoted factors and shifted inputs, on text that the model samples from itself
            where no ``windows`` are given.
        ratio: fraction of the target layers' parameters to remove, in [0, 1); 0 leaves all dense.
        ranks: in place of ``ratio``, the rank of each layer to compress; layers that are not named stay dense.
        allocation: how ``ratio`` is shared out: ``uniform`` (the default), the same for every layer; ``strs``, the ASVD
            paper's rank search, some nine passes over ``windows`` a layer; ``spectrum``, from the singular values; ``fisher``,
            from them and the gradients of the loss. The last three hold all decompositions in memory at once.
            For ``sola``: ``sola`` (its default), or ``uniform`` or ``spectrum`` over the layers that it compresses.
        factors: how they are stored: ``plain`` (the default), or ``pivoted``, which buys more rank for the same parameters.
        shifted: take the layers in order, each for the inputs it gets after those before it are compressed. With ranks to be found
            by a method that uses gradients, these are then averaged over the dense model and the compressed one.
        refine: after a block's layers are exchanged, this many steps of gradient descent on their factors, towards what the
            dense block gave out; goes with ``shifted``. A hundred or two are what it takes. Errors are weighed by the loss
            where the statistics hold the gradients of a block's last layer, else all alike.
        windows: token ids (count, length), or one such tensor for each of several domains: to calibrate on
            when ``stats`` is not given (every second one, with ``shifted``), to search on with ``strs``, to take gradients from, to
            follow with ``shifted``.
        weights: of the domains of ``windows`` where ``stats`` are taken from them: ``uniform``, ``worst-case`` or numbers, see
            ``mix``. Statistics that are given bring the weights they were mixed with.
        prepared: what ``prepare`` returned for this model, statistics, outer step and options.
        seed: of what is sampled.

    Raises:
        ValueError: unknown method, option, allocation or layer; ratio or k1 out of range or rounding to nothing (the layer
            is named); NaN or Inf in a weight (the layer is named); statistics that do not fit; a model compressed before.
        FloatingPointError: NaN or Inf in an activation, from ``calibrate``, or in a loss of the search.
    """
    ask = resolve(method, options, ratio, ranks, allocation, factors, shifted, refine, windows, weights)
    if weights != "uniform" and stats is not None:
        raise ValueError("weights are those of windows to calibrate on; statistics that are given are mixed already")
    if is_compressed(model):
        raise ValueError("this model is compressed already; dequantize() it first")
    layers, clock = targets(model), Clock()
    wanted = _given(model, layers, ask)
    check_weights(layers)
    if ask.sampled:
        ask = replace(ask, domains=[own_text(model, seed=seed)])
        clock.lap("sample")
    texts = ask.domains
    if stats is None and ask.shifted and wanted is None:
        texts = [ids[::RANKS_EVERY] for ids in texts]
    how = {"weights": weights, "ratio": ratio}
    stats = take_statistics(model, stats, texts, ask.judge, ask.allocation, clock, seed, progress, **how)
    check_statistics(layers if wanted is None else {name: layers[name] for name in wanted}, stats, ask.method)
    if ask.splits:
        result = _split(model, layers, stats, ask, prepared, clock, progress)
    else:
        result = _factor(model, layers, stats, ask, wanted, prepared, clock, seed, progress)
    return _report(model, ask, layers, result, clock)


class _Result(NamedTuple):
    table: pd.DataFrame
    changed: list[str]  # layers that are compressed now
    moves: list
    tokens: int  # that went through the model to find the ranks


def _given(model: nn.Module, layers: Mapping[str, nn.Linear], ask: Arguments) -> dict[str, int] | None:
    """The ranks that are known before anything is measured, None where they have to be found."""
    if ask.ranks is None:
        return None if ask.searches or ask.splits else uniform(model, ask.ratio, ask.factors)
    for name, k in ask.ranks.items():
        if name not in layers:
            raise ValueError(f"no layer {name!r} to compress; the model has {', '.join(list(layers)[:3])}, …")
        if not 1 <= k <= min(layers[name].weight.shape):
            raise ValueError(f"layer {name}: rank {k} is not in 1 … {min(layers[name].weight.shape)}")
    return dict(ask.ranks)


def _factor(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    stats: Statistics | None,
    ask: Arguments,
    wanted: dict[str, int] | None,
    prepared: Mapping[str, Decomposition] | None,
    clock: Clock,
    seed: int,
    progress: bool,
) -> _Result:
    """Find the ranks where they are not known, and exchange every layer that becomes smaller."""
    tokens = 0

    def exchange(stats: Statistics | None, ranks: Mapping[str, int]) -> tuple[Exchange, dict[str, int]]:
        smaller = {name: k for name, k in ranks.items() if saves_parameters(*layers[name].weight.shape, k, ask.factors)}
        return Exchange(layers, stats, ask.method, ask.method.resolve(ask.options), ask.factors, clock), smaller

    if wanted is None:
        wanted, tokens, prepared = _searched(model, layers, stats, ask, prepared, clock, progress)
        if ask.shifted and ask.method.needs_gradients:
            stats = _both_ends(model, stats, ask, *exchange(stats, wanted), prepared, clock, seed, progress)
            prepared = None  # of a large model a great deal of memory
            wanted, tokens, prepared = _searched(model, layers, stats, ask, None, clock, progress)
    job, smaller = exchange(stats, wanted)
    if ask.shifted:
        prepared = None
        errors = job.in_order(model, smaller, ask.domains, ask.refine, progress)
    else:
        errors = job.at_once(model, smaller, prepared, progress)
    return _Result(layer_table(layers, wanted, smaller, ask.factors, errors), list(smaller), [], tokens)


def _searched(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    stats: Statistics | None,
    ask: Arguments,
    prepared: Mapping[str, Decomposition] | None,
    clock: Clock,
    progress: bool,
) -> tuple[dict[str, int], int, Mapping[str, Decomposition]]:
    """Ranks, tokens that went through the model to find them, and the decompositions."""
    how = {"method": recipe(ask.name).method, "progress": progress, **ask.options}
    if ask.allocation == "fisher":
        check_gradients(layers, stats, "allocation 'fisher'")
    if prepared is None:
        prepared = prepare(model, stats, **how)
        clock.lap("decompose")
    text = torch.cat(ask.domains) if ask.allocation == "strs" else None
    ranks, tokens = searched(model, stats, prepared, ask.ratio, ask.allocation, text, factors=ask.factors, **how)
    clock.lap("search")
    return ranks, tokens, prepared


def _both_ends(
    model: nn.Module,
    stats: Statistics,
    ask: Arguments,
    job: Exchange,
    ranks: Mapping[str, int],
    prepared: Mapping[str, Decomposition],
    clock: Clock,
    seed: int,
    progress: bool,
) -> Statistics:
    """The statistics, their gradients averaged with those of the model compressed without following the inputs.

    The loss bends differently at the two ends of the way from the dense to the compressed model: the mean is the trapezoid rule.
    """
    known = stats.gradients
    how = {"layers": known, "diagonal": next(iter(known.values())).ndim == 1, "seed": seed, "progress": progress}
    try:
        job.at_once(model, ranks, prepared, progress)
        there = mean_gradients(model, ask.domains, stats.shares(len(ask.domains)), others=True, **how)
    finally:
        job.undo(model, ranks)
    clock.lap("gradients")
    return stats.with_gradients({name: there[name].add_(H.to(there[name])).div_(2) for name, H in known.items()})


def _split(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    stats: Statistics,
    ask: Arguments,
    prepared: Mapping[str, Decomposition] | None,
    clock: Clock,
    progress: bool,
) -> _Result:
    """The same for SoLA, which has its own search."""
    table, new, moves = split(
        model, layers, stats, ask.method, ask.options, ratio=ask.ratio, ranks=ask.ranks, allocation=ask.allocation,
        prepared=prepared, clock=clock, progress=progress,
    )  # fmt: skip
    for name, layer in new.items():
        model.set_submodule(name, layer)
    clock.lap("exchange")
    return _Result(table, [name for name, layer in new.items() if isinstance(layer, CompressedLayer)], moves, 0)


def _report(model: nn.Module, ask: Arguments, layers: Mapping[str, nn.Linear], result: _Result, clock: Clock) -> Report:
    """What was done; told to the model, too, so that it is saved with it."""
    table = result.table
    before, after = int((table.d_out * table.d_in).sum()), int(table.params.sum())
    size = next(iter(layers.values())).weight.element_size()
    report = Report(
        method=ask.name, options=ask.method.resolve(ask.options),
        allocation=ask.allocation if ask.ranks is None else "given", factors=ask.factors,
        shifted=ask.shifted, refine=ask.refine, search_tokens=result.tokens, ratio=ask.ratio,
        ratio_reached=1 - after / before, params_before=before, params_after=after, bytes_before=before * size,
        bytes_after=after * size, seconds=clock.seconds, peak_memory=peak_memory(), versions=versions(), table=table,
        moves=result.moves,
    )  # fmt: skip
    if result.changed:
        told = ("method", "options", "allocation", "factors", "shifted", "refine", "ratio", "ratio_reached")
        mark_compressed(model, result.changed, **{name: getattr(report, name) for name in told})
    return report
