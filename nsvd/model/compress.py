"""Replace the linear layers of a model by low-rank ones, in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.linalg import Decomposition, LowRank, Method, by_name, saves_parameters
from nsvd.linalg.methods import SplitMethod
from nsvd.model import sola
from nsvd.model.allocation import ALLOCATIONS, check_allocation, searched, uniform
from nsvd.model.checkpoint import is_compressed, mark_compressed
from nsvd.model.layers import CompressedLayer, LowRankLinear, targets
from nsvd.model.moments import Statistics, calibrate
from nsvd.model.prepare import check_statistics, check_weights, naming, prepare, prepare_layer
from nsvd.model.report import Clock, peak_memory, relative_errors, versions


@dataclass(frozen=True)
class Report:
    """What ``compress_`` did. Parameters and bytes count the target layers' weights, biases left out."""

    method: str
    options: dict
    allocation: str  # of ALLOCATIONS, or "given"
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
    table: pd.DataFrame  # a row a layer; errors are those of the float64 factors, before the cast to the model's dtype
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
    windows: Tensor | None = None,
    prepared: Mapping[str, Decomposition] | None = None,
    progress: bool = False,
    **options: float | str,
) -> Report:
    """Replace every target layer by rank-k factors, in place, and report.

    All layers are decomposed, in float64, before the first is exchanged: when something raises, the model is unchanged.
    A layer whose factors would not be smaller than its weight stays dense and is reported so; the model's dtype is kept.

    Args:
        model: a model with ``nn.Linear`` layers.
        stats: moments from ``calibrate`` (not needed for ``svd``).
        method: a name of ``METHODS``; ``options`` are its own (``k1``, ``alpha``, ``mu``; for ``sola`` those of
            ``nsvd.linalg.sola.PUBLISHED`` and of its ``inner`` method).
        ratio: fraction of the target layers' parameters to remove, in [0, 1); 0 leaves all dense.
        ranks: in place of ``ratio``, the rank of each layer to compress; layers that are not named stay dense.
        allocation: how ``ratio`` is shared out: ``uniform``, the default, the same for every layer; ``strs``, the ASVD paper's rank
            search, some nine passes over ``windows`` a layer; ``spectrum``, from the singular values. The last two hold
            all decompositions in memory at once. See ``nsvd.linalg.allocation``. For ``sola``: ``sola``, the default, or
            ``uniform`` or ``spectrum`` over the layers that it compresses.
        windows: token ids to search on with ``strs``, and to calibrate on when ``stats`` is not given.
        prepared: what ``prepare`` returned for this model, statistics, outer step and options.

    Raises:
        ValueError: unknown method, option, allocation or layer; ratio or k1 out of range or rounding to nothing (the layer
            is named); NaN or Inf in a weight (the layer is named); statistics that do not fit; a model compressed before.
        FloatingPointError: NaN or Inf in an activation, from ``calibrate``, or in a loss of the search.
    """
    chosen, settings = by_name(method), by_name(method).resolve(options)
    splits = isinstance(chosen, SplitMethod)
    allocation = allocation or ("sola" if splits and ranks is None else "uniform")
    check_allocation(allocation, ratio, ranks, windows, among=sola.ALLOCATIONS if splits else ALLOCATIONS)
    if is_compressed(model):
        raise ValueError("this model is compressed already; dequantize() it first")
    layers, clock, tokens = targets(model), Clock(), 0
    search = allocation != "uniform" and ratio > 0 and not splits
    wanted = _given(layers, ranks) if ranks is not None else {} if search or splits else uniform(model, ratio)
    check_weights(layers)
    if stats is None and windows is not None and chosen.needs_moments:
        stats = calibrate(model, windows, progress=progress)
        clock.lap("calibrate")
    check_statistics(layers if search or splits else {name: layers[name] for name in wanted}, stats, chosen)
    if search:
        if prepared is None:
            prepared = prepare(model, stats, method, progress=progress, **options)
            clock.lap("decompose")
        wanted, tokens = searched(
            model, stats, prepared, ratio, allocation, windows, method=method, progress=progress, **options
        )
        clock.lap("search")

    if splits:
        table, new, moves = sola.split(
            model, layers, stats, chosen, options, ratio=ratio, ranks=ranks, allocation=allocation, prepared=prepared,
            clock=clock, progress=progress,
        )  # fmt: skip
    else:
        table, factors = _factor(layers, wanted, prepared, stats, chosen, options, clock, progress)
        new, moves = {name: LowRankLinear.from_factors(layers[name], value) for name, value in factors.items()}, []
    for name, layer in new.items():
        model.set_submodule(name, layer)
    clock.lap("exchange")

    before, after = int((table.d_out * table.d_in).sum()), int(table.params.sum())
    size = next(iter(layers.values())).weight.element_size()
    report = Report(
        method, settings, allocation if ranks is None else "given", tokens, ratio, 1 - after / before, before, after,
        before * size, after * size, clock.seconds, peak_memory(), versions(), table, moves,
    )  # fmt: skip
    if new:
        told = ("method", "options", "allocation", "ratio", "ratio_reached")
        details = {name: getattr(report, name) for name in told}
        mark_compressed(model, [name for name in new if isinstance(new[name], CompressedLayer)], **details)
    return report


def _given(layers: dict[str, nn.Linear], ranks: Mapping[str, int]) -> dict[str, int]:
    for name, k in ranks.items():
        if name not in layers:
            raise ValueError(f"no layer {name!r} to compress; the model has {', '.join(list(layers)[:3])}, …")
        if not 1 <= k <= min(layers[name].weight.shape):
            raise ValueError(f"layer {name}: rank {k} is not in 1 … {min(layers[name].weight.shape)}")
    return dict(ranks)


def _factor(
    layers: dict[str, nn.Linear],
    wanted: Mapping[str, int],
    prepared: Mapping[str, Decomposition] | None,
    stats: Statistics | None,
    method: Method,
    options: dict,
    clock: Clock,
    progress: bool,
) -> tuple[pd.DataFrame, dict[str, LowRank]]:
    """A row a layer for the report, and the factors, in the model's dtype, of those that become smaller."""
    rows, factors = [], {}
    for name, layer in tqdm(layers.items(), "compress", disable=not progress, leave=False):
        d_out, d_in, k = *layer.weight.shape, wanted.get(name)
        row = {"layer": name, "d_out": d_out, "d_in": d_in, "rank": k, "dense": True, "params": d_out * d_in}
        if k is not None and saves_parameters(d_out, d_in, k):
            have = None if prepared is None else prepared[name].to(layer.weight.device)
            one = have or prepare_layer(layer, name, stats, method, options)
            clock.lap("decompose")
            with naming(name):
                value = method.cut(one, k, **options)
            factors[name] = value.to(layer.weight.dtype)
            clock.lap("cut")
            row |= {"dense": False, "params": value.n_params} | relative_errors(layer, value, stats, name)
            clock.lap("errors")
        rows.append(row)
    return pd.DataFrame(rows).astype({"rank": "Int64"}), factors
