"""Replace the linear layers of a model by low-rank ones, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, nn

from nsvd.linalg import METHODS, Decomposition, Method, by_name, saves_parameters
from nsvd.linalg.factors import check_factors
from nsvd.linalg.methods import SplitMethod
from nsvd.model import sola
from nsvd.model.allocation import ALLOCATIONS, check_allocation, searched, uniform
from nsvd.model.checkpoint import is_compressed, mark_compressed
from nsvd.model.exchange import Exchange, layer_table
from nsvd.model.fisher import fisher
from nsvd.model.layers import CompressedLayer, targets
from nsvd.model.moments import Statistics, calibrate, check_mixture, mix
from nsvd.model.prepare import check_statistics, check_weights, prepare
from nsvd.model.report import Clock, peak_memory, versions
from nsvd.model.sampling import own_text

RECIPES: dict[str, dict] = {  # what a name of several ingredients stands for; each can be overridden
    "best": {"method": "kfac", "allocation": "fisher", "factors": "pivoted", "shifted": True},
}
GRADIENTS_EVERY = 4  # every fourth window is enough for the gradients


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
        shifted: take the layers in order, each for the inputs it gets after those before it are compressed.
        refine: after a block's layers are exchanged, this many steps of gradient descent on their factors, towards what the
            dense block gave out; goes with ``shifted``. A hundred or two are what it takes.
        windows: token ids (count, length), or one such tensor for each of several domains: to calibrate on
            when ``stats`` is not given, to search on with ``strs``, to take gradients from, to follow with ``shifted``.
        weights: of the domains of ``windows`` where ``stats`` are taken from them: ``uniform``, ``worst-case`` or numbers, see
            ``mix``. Statistics that are given bring the weights they were mixed with.
        prepared: what ``prepare`` returned for this model, statistics, outer step and options.
        seed: of what is sampled.

    Raises:
        ValueError: unknown method, option, allocation or layer; ratio or k1 out of range or rounding to nothing (the layer
            is named); NaN or Inf in a weight (the layer is named); statistics that do not fit; a model compressed before.
        FloatingPointError: NaN or Inf in an activation, from ``calibrate``, or in a loss of the search.
    """
    chosen = base_method(method)
    splits = isinstance(chosen, SplitMethod)
    recipe = RECIPES.get(method, {"method": method, "allocation": "sola" if splits else "uniform"})
    settings = chosen.resolve(options)
    allocation = allocation or recipe.get("allocation" if ranks is None else "", "uniform")
    factors = factors or recipe.get("factors", "plain")
    shifted = recipe.get("shifted", False) if shifted is None else shifted
    domains = [windows] if isinstance(windows, Tensor) else list(windows or ())
    check_factors(factors)
    check_mixture(weights, max(1, len(domains)))
    if weights != "uniform" and stats is not None:
        raise ValueError("weights are those of windows to calibrate on; statistics that are given are mixed already")
    if weights == "worst-case" and ratio is None:
        raise ValueError("worst-case weights are found for a ratio; give it in place of ranks")
    check_allocation(allocation, ratio, ranks, domains, among=sola.ALLOCATIONS if splits else ALLOCATIONS)
    if splits and (factors != "plain" or shifted or refine):
        raise ValueError(f"{chosen.label} has no pivoted factors, shifted inputs or refinement")
    if is_compressed(model):
        raise ValueError("this model is compressed already; dequantize() it first")
    layers, clock, tokens = targets(model), Clock(), 0
    search = allocation != "uniform" and ratio > 0 and not splits
    wanted = _given(layers, ranks) if ranks is not None else {} if search or splits else uniform(model, ratio, factors)
    check_weights(layers)
    if method in RECIPES and not domains:
        domains = [own_text(model, seed=seed)]
        clock.lap("sample")
    judge = inner if splits and (inner := chosen.inner(options)[0]).needs_gradients else chosen
    stats = take_statistics(
        model, stats, domains, judge, allocation, clock, seed, progress, weights=weights, ratio=ratio
    )
    if shifted and not domains:
        raise ValueError("shifted inputs are followed on a text: pass windows=")
    if refine and not shifted:
        raise ValueError("refine goes with shifted=True: the blocks are fitted in order")
    check_statistics(layers if search or splits else {name: layers[name] for name in wanted}, stats, chosen)
    if search:
        if prepared is None:
            prepared = prepare(model, stats, recipe["method"], progress=progress, **options)
            clock.lap("decompose")
        how = {"method": recipe["method"], "factors": factors, "progress": progress, **options}
        text = torch.cat(domains) if allocation == "strs" else None
        wanted, tokens = searched(model, stats, prepared, ratio, allocation, text, **how)
        clock.lap("search")

    if splits:
        table, new, moves = sola.split(
            model, layers, stats, chosen, options, ratio=ratio, ranks=ranks, allocation=allocation, prepared=prepared,
            clock=clock, progress=progress,
        )  # fmt: skip
        for name, layer in new.items():
            model.set_submodule(name, layer)
        clock.lap("exchange")
        changed = [name for name, layer in new.items() if isinstance(layer, CompressedLayer)]
    else:
        smaller = {name: k for name, k in wanted.items() if saves_parameters(*layers[name].weight.shape, k, factors)}
        job = Exchange(layers, stats, chosen, settings, factors, clock)
        errors = (
            job.in_order(model, smaller, domains, refine, progress)
            if shifted
            else job.at_once(model, smaller, prepared, progress)
        )
        table = layer_table(layers, wanted, smaller, factors, errors)
        changed, moves = list(smaller), []

    before, after = int((table.d_out * table.d_in).sum()), int(table.params.sum())
    size = next(iter(layers.values())).weight.element_size()
    report = Report(
        method=method, options=settings, allocation=allocation if ranks is None else "given", factors=factors,
        shifted=shifted, refine=refine, search_tokens=tokens, ratio=ratio, ratio_reached=1 - after / before,
        params_before=before, params_after=after, bytes_before=before * size, bytes_after=after * size,
        seconds=clock.seconds, peak_memory=peak_memory(), versions=versions(), table=table, moves=moves,
    )  # fmt: skip
    if changed:
        told = ("method", "options", "allocation", "factors", "shifted", "refine", "ratio", "ratio_reached")
        mark_compressed(model, changed, **{name: getattr(report, name) for name in told})
    return report


def base_method(name: str) -> Method:
    """The method of that name, or the one that a recipe is built on; raises ``ValueError`` with the known names."""
    if name not in RECIPES and name not in METHODS:
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join((*METHODS, *RECIPES))}")
    return by_name(RECIPES.get(name, {"method": name})["method"])


def take_statistics(
    model: nn.Module,
    stats: Statistics | None,
    domains: Sequence[Tensor],
    method: Method,
    allocation: str,
    clock: Clock,
    seed: int,
    progress: bool = False,
    layers: Sequence[str] | None = None,
    weights: Sequence[float] | str = "uniform",
    ratio: float | None = None,
) -> Statistics | None:
    """The given ones, or those of the windows for these layers or all; with gradients where asked for and not there yet."""
    if stats is None and domains and (method.needs_moments or allocation == "fisher" or weights != "uniform"):
        each = [calibrate(model, ids, layers=layers, progress=progress) for ids in domains]
        stats = each[0] if len(each) == 1 else mix(each, weights, model=model, ratio=ratio)
        clock.lap("calibrate")
    if (method.needs_gradients or allocation == "fisher") and stats is not None and not stats.gradients and domains:
        each = [fisher(model, ids[::GRADIENTS_EVERY], layers=layers, seed=seed, progress=progress) for ids in domains]
        shares = stats.shares(len(domains))
        mean = {name: sum(w * H[name] for w, H in zip(shares, each, strict=True)) for name in each[0]}
        stats = stats.with_gradients(mean)
        clock.lap("gradients")
    return stats


def _given(layers: dict[str, nn.Linear], ranks: Mapping[str, int]) -> dict[str, int]:
    for name, k in ranks.items():
        if name not in layers:
            raise ValueError(f"no layer {name!r} to compress; the model has {', '.join(list(layers)[:3])}, …")
        if not 1 <= k <= min(layers[name].weight.shape):
            raise ValueError(f"layer {name}: rank {k} is not in 1 … {min(layers[name].weight.shape)}")
    return dict(ranks)
