"""How a target for the whole model becomes a rank for each layer, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor, nn

from nsvd.linalg import Decomposition, by_name, rank_for_ratio
from nsvd.linalg.allocation import cut, cut_where, spectrum_steps, strs_steps
from nsvd.model.layers import targets
from nsvd.model.moments import Statistics
from nsvd.model.prepare import naming
from nsvd.model.sensitivity import Sensitivity, losses_with, sensitivity

ALLOCATIONS = ("uniform", "strs", "spectrum")


def check_allocation(
    allocation: str,
    ratio: float | None,
    ranks: Mapping | None,
    windows: Tensor | None,
    *,
    among: tuple[str, ...] = ALLOCATIONS,
) -> None:
    """Raise ``ValueError`` unless these say in one way which rank each layer gets, with what that needs."""
    if (ratio is None) == (ranks is None):
        raise ValueError("give either ratio or ranks")
    if allocation not in among:
        raise ValueError(f"unknown allocation {allocation!r}; there are {', '.join(among)}")
    if ranks is not None and allocation != "uniform":
        raise ValueError(f"allocation {allocation!r} chooses the ranks; give ratio in place of ranks")
    if ratio is not None and not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}, but the fraction of parameters removed lies in [0, 1)")
    if allocation == "strs" and windows is None:
        raise ValueError("allocation 'strs' measures the model on a text: pass windows=")


def searched(
    model: nn.Module,
    stats: Statistics | None,
    prepared: Mapping[str, Decomposition],
    ratio: float,
    allocation: str,
    windows: Tensor | None,
    *,
    method: str,
    progress: bool = False,
    **options: float,
) -> tuple[dict[str, int], int]:
    """Ranks by ``strs`` or ``spectrum``, and the tokens that went through the model to find them."""
    if allocation == "spectrum":
        return spectrum(model, prepared, ratio, method=method, **options), 0
    measured = sensitivity(model, stats, windows, method=method, prepared=prepared, progress=progress, **options)
    return strs(model, measured, ratio), measured.tokens


def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every target layer."""
    return {name: tuple(layer.weight.shape) for name, layer in targets(model).items()}


def uniform(model: nn.Module, ratio: float) -> dict[str, int]:
    """The same fraction of parameters removed from every layer; none at ratio 0."""
    ranks = {}
    for name, shape in shapes(model).items() if ratio else ():
        with naming(name):
            ranks[name] = rank_for_ratio(*shape, ratio)
    return ranks


def strs(model: nn.Module, measured: Sensitivity, ratio: float) -> dict[str, int]:
    """The ASVD paper's rank search, from its table: see ``nsvd.linalg.allocation``."""
    sizes = shapes(model)
    return cut(strs_steps(measured.scores, sizes), sizes, ratio)


def spectrum(
    model: nn.Module, prepared: Mapping[str, Decomposition], ratio: float, *, method: str, **options: float
) -> dict[str, int]:
    """Equal relative truncation error per parameter at the margin, from the decompositions alone."""
    sizes, spectra = shapes(model), {name: one.s for name, one in prepared.items()}
    return cut(spectrum_steps(spectra, sizes, least=by_name(method).least_rank(options)), sizes, ratio)


@torch.no_grad()
def strs_within(
    model: nn.Module,
    measured: Sensitivity,
    prepared: Mapping[str, Decomposition],
    windows: Tensor,
    perplexity: float,
    *,
    method: str,
    **options: float,
) -> dict[str, int]:
    """STRS with the paper's other target: the most steps that keep the perplexity on ``windows`` at most this high.

    The model is measured about log₂(steps) times and left as it was.
    """
    chosen = by_name(method)

    def admissible(ranks: dict[str, int]) -> bool:
        factors = {name: chosen.cut(prepared[name], k, **options) for name, k in ranks.items()}
        return fmean(losses_with(model, factors, windows)) <= math.log(perplexity)

    return cut_where(strs_steps(measured.scores, shapes(model)), admissible)
