"""Replace the linear layers of a model by low-rank ones, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.linalg import Decomposition, LowRank, Method, Moments, by_name, saves_parameters
from nsvd.linalg.factors import check_factors, n_params
from nsvd.model.allocation import check_allocation, searched, uniform
from nsvd.model.checkpoint import is_compressed, mark_compressed
from nsvd.model.fisher import fisher
from nsvd.model.layers import CompressedLayer, stand_in, targets
from nsvd.model.moments import Statistics, calibrate, mix
from nsvd.model.prepare import check_statistics, check_weights, naming, prepare, prepare_layer
from nsvd.model.report import Clock, peak_memory, relative_errors, versions
from nsvd.model.sampling import sample
from nsvd.model.shifted import replace_in_order_

RECIPES: dict[str, dict] = {  # what a name of several ingredients stands for; each can be overridden
    "best": {"method": "kfac", "allocation": "fisher", "factors": "pivoted", "shifted": True},
}
GRADIENTS_EVERY, FOLLOW_EVERY = 4, 2  # of the windows, that is enough for the gradients and for the two streams


@dataclass(frozen=True)
class Report:
    """What ``compress_`` did. Parameters and bytes count the target layers' weights, biases left out."""

    method: str
    options: dict
    allocation: str  # of ALLOCATIONS, or "given"
    factors: str  # of FACTORS
    shifted: bool
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

    def as_dict(self) -> dict:
        """Everything but the table, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name != "table"}


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
    windows: Tensor | Sequence[Tensor] | None = None,
    prepared: Mapping[str, Decomposition] | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: float,
) -> Report:
    """Replace every target layer by rank-k factors, in place, and report.

    All layers are decomposed, in float64, before the first is exchanged (with ``shifted`` those already exchanged are put
    back): when something raises, the model is unchanged. A layer whose factors would not be smaller than its weight stays
    dense and is reported so; the model's dtype is kept.

    Args:
        model: a model with ``nn.Linear`` layers.
        stats: moments from ``calibrate`` (not needed for ``svd``).
        method: a name of ``METHODS``; ``options`` are its own (``k1``, ``alpha``, ``mu``, ``eta``). Or ``best``: ``kfac``
            with the allocation ``fisher``, pivoted factors and shifted inputs, on text that the model samples from itself
            where no ``windows`` are given.
        ratio: fraction of the target layers' parameters to remove, in [0, 1); 0 leaves all dense.
        ranks: in place of ``ratio``, the rank of each layer to compress; layers that are not named stay dense.
        allocation: how ``ratio`` is shared out: ``uniform`` (the default), the same for every layer; ``strs``, the ASVD
            paper's rank search, some nine passes over ``windows`` a layer; ``spectrum``, from the singular values; ``fisher``,
            from them and the gradients of the loss. The last three hold all decompositions in memory at once.
        factors: how they are stored: ``plain`` (the default), or ``pivoted``, which buys more rank for the same parameters.
        shifted: take the layers in order, each for the inputs it gets after those before it are compressed.
        windows: token ids (count, length), or one such tensor for each of several domains that count equally: to calibrate on
            when ``stats`` is not given, to search on with ``strs``, to take gradients from, to follow with ``shifted``.
        prepared: what ``prepare`` returned for this model, statistics, outer step and options.
        seed: of what is sampled.

    Raises:
        ValueError: unknown method, option, allocation or layer; ratio or k1 out of range or rounding to nothing (the layer
            is named); NaN or Inf in a weight (the layer is named); statistics that do not fit; a model compressed before.
        FloatingPointError: NaN or Inf in an activation, from ``calibrate``, or in a loss of the search.
    """
    recipe = RECIPES.get(method, {"method": method})
    chosen = by_name(recipe["method"])
    settings = chosen.resolve(options)
    allocation = allocation or recipe.get("allocation" if ranks is None else "", "uniform")
    factors = factors or recipe.get("factors", "plain")
    shifted = recipe.get("shifted", False) if shifted is None else shifted
    domains = [windows] if isinstance(windows, Tensor) else list(windows or ())
    check_factors(factors)
    check_allocation(allocation, ratio, ranks, windows)
    if is_compressed(model):
        raise ValueError("this model is compressed already; dequantize() it first")
    layers, clock, tokens = targets(model), Clock(), 0
    search = allocation != "uniform" and ratio > 0
    wanted = _given(layers, ranks) if ranks is not None else {} if search else uniform(model, ratio, factors)
    check_weights(layers)
    if method in RECIPES and not domains:
        domains = [own_windows(model, seed=seed)]
        clock.lap("sample")
    stats = take_statistics(model, stats, domains, chosen, allocation, clock, seed, progress)
    if shifted and not domains:
        raise ValueError("shifted inputs are followed on a text: pass windows=")
    check_statistics(layers if search else {name: layers[name] for name in wanted}, stats, chosen)
    if search:
        if prepared is None:
            prepared = prepare(model, stats, recipe["method"], progress=progress, **options)
            clock.lap("decompose")
        how = {"method": recipe["method"], "factors": factors, "progress": progress, **options}
        text = torch.cat(domains) if allocation == "strs" else None
        wanted, tokens = searched(model, stats, prepared, ratio, allocation, text, **how)
        clock.lap("search")

    smaller = {name: k for name, k in wanted.items() if saves_parameters(*layers[name].weight.shape, k, factors)}
    job = _Job(layers, stats, chosen, settings, factors, clock)
    errors = (
        job.in_order(model, smaller, domains, progress) if shifted else job.at_once(model, smaller, prepared, progress)
    )
    table = _table(layers, wanted, smaller, factors, errors)

    before, after = int((table.d_out * table.d_in).sum()), int(table.params.sum())
    size = next(iter(layers.values())).weight.element_size()
    report = Report(
        method, settings, allocation if ranks is None else "given", factors, shifted, tokens, ratio, 1 - after / before,
        before, after, before * size, after * size, clock.seconds, peak_memory(), versions(), table,
    )  # fmt: skip
    if smaller:
        told = ("method", "options", "allocation", "factors", "shifted", "ratio", "ratio_reached")
        mark_compressed(model, smaller, **{name: getattr(report, name) for name in told})
    return report


def own_windows(model: nn.Module, *, count: int = 128, seed: int = 0) -> Tensor:
    """Windows that the model samples from itself, half as long as it allows, 1024 tokens at most."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    return sample(model, count, max(2, min(longest // 2, 1024)), seed=seed)


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
) -> Statistics | None:
    """The given ones, or those of the windows for these layers or all; with gradients where asked for and not there yet."""
    if stats is None and domains and method.needs_moments:
        each = [calibrate(model, ids, layers=layers, progress=progress) for ids in domains]
        stats = each[0] if len(each) == 1 else mix(each)
        clock.lap("calibrate")
    if (method.needs_gradients or allocation == "fisher") and stats is not None and not stats.gradients and domains:
        each = [fisher(model, ids[::GRADIENTS_EVERY], layers=layers, seed=seed, progress=progress) for ids in domains]
        stats = stats.with_gradients({name: sum(H[name] for H in each) / len(each) for name in each[0]})
        clock.lap("gradients")
    return stats


def _given(layers: dict[str, nn.Linear], ranks: Mapping[str, int]) -> dict[str, int]:
    for name, k in ranks.items():
        if name not in layers:
            raise ValueError(f"no layer {name!r} to compress; the model has {', '.join(list(layers)[:3])}, …")
        if not 1 <= k <= min(layers[name].weight.shape):
            raise ValueError(f"layer {name}: rank {k} is not in 1 … {min(layers[name].weight.shape)}")
    return dict(ranks)


@dataclass
class _Job:
    """Factor layers by one method and put the factors in their place."""

    layers: Mapping[str, nn.Linear]
    stats: Statistics | None
    method: Method
    options: dict
    factors: str
    clock: Clock

    def cut(self, name: str, one: Decomposition, k: int) -> tuple[CompressedLayer, dict[str, float]]:
        """The stand-in of a layer, and its relative errors."""
        with naming(name):
            value: LowRank = self.method.cut(one, k, **self.options)
        new = stand_in(self.layers[name], value, self.factors)
        self.clock.lap("cut")
        errors = relative_errors(self.layers[name], value, self.stats, name)
        self.clock.lap("errors")
        return new, errors

    def at_once(
        self, model: nn.Module, ranks: Mapping[str, int], prepared: Mapping[str, Decomposition] | None, progress: bool
    ) -> dict[str, dict[str, float]]:
        """Every layer for the inputs of the dense model; all factored before the first is exchanged."""
        new, errors = {}, {}
        for name, k in tqdm(ranks.items(), "compress", disable=not progress, leave=False):
            layer = self.layers[name]
            have = None if prepared is None else prepared[name].to(layer.weight.device)
            one = have or prepare_layer(layer, name, self.stats, self.method, self.options)
            self.clock.lap("decompose")
            new[name], errors[name] = self.cut(name, one, k)
        for name, layer in new.items():
            model.set_submodule(name, layer)
        self.clock.lap("exchange")
        return errors

    def in_order(
        self, model: nn.Module, ranks: Mapping[str, int], domains: Sequence[Tensor], progress: bool
    ) -> dict[str, dict[str, float]]:
        """Every layer for the inputs that the layers before it leave it, towards what the dense model has there."""
        errors = {}

        def replace(name: str, target: Tensor, moments: Moments) -> CompressedLayer:
            self.clock.lap("follow")
            H = None if self.stats is None else self.stats[name].H
            known = Moments(moments.G, self.stats[name].mean_abs if self.stats else None, H=H).to(target.device)
            with naming(name):
                one = self.method.prepare(target, known, **self.options)
            self.clock.lap("decompose")
            new, errors[name] = self.cut(name, one, ranks[name])
            return new

        mu = self.options.get("mu", 0.0)
        try:
            replace_in_order_(
                model, [ids[::FOLLOW_EVERY] for ids in domains], list(ranks), replace, mu=mu, progress=progress
            )
        except BaseException:
            for name in ranks:
                model.set_submodule(name, self.layers[name])
            raise
        return errors


def _table(
    layers: Mapping[str, nn.Linear],
    wanted: Mapping[str, int],
    smaller: Mapping[str, int],
    factors: str,
    errors: Mapping[str, dict],
) -> pd.DataFrame:
    """A row a layer for the report."""
    rows = []
    for name, layer in layers.items():
        d_out, d_in = layer.weight.shape
        params = n_params(d_out, d_in, smaller[name], factors) if name in smaller else d_out * d_in
        row = {"layer": name, "d_out": d_out, "d_in": d_in, "rank": wanted.get(name), "dense": name not in smaller}
        rows.append(row | {"params": params} | errors.get(name, {}))
    return pd.DataFrame(rows).astype({"rank": "Int64"})
