"""How a target for the whole model becomes a rank for each layer, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nsvd.compression.lems import Probes, probes
from nsvd.compression.measure import is_mine, naming, owners
from nsvd.compression.prepared import Prepared, check_step
from nsvd.compression.strs import measured, strs
from nsvd.linalg import Decomposition, matrix_method, rank_for_ratio
from nsvd.linalg.budget import cut, spectrum_steps
from nsvd.linalg.factors import check_ratio
from nsvd.linalg.lems import MULTIPLE, lems_ranks
from nsvd.linalg.precision import double
from nsvd.linalg.svd_llm_v2 import log_ratios
from nsvd.linalg.zs_svd import first_order, zero_sum
from nsvd.walk.gradients import weight_gradients_into
from nsvd.walk.processes import gathered
from nsvd.walk.roles import places
from nsvd.walk.shelf import Shelf
from nsvd.walk.statistics import Statistics
from nsvd.walk.targets import among, shapes

ALLOCATIONS = ("uniform", "strs", "spectrum", "fisher", "lems", "zero-sum", "svd-llm-v2")
TRYING = ("strs", "lems")  # these try one layer after the other, on windows of one length
SEARCHING = (*TRYING, "zero-sum")  # these look at whole decompositions, and at what the model says to a text
SOLA_ALLOCATIONS = ("sola", "uniform", "spectrum")


def check_allocation(
    allocation: str,
    ratio: float | None,
    ranks: Mapping | None,
    windows: Sequence[Tensor],
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
    if ratio is not None:
        check_ratio(ratio)
    if allocation in TRYING and ratio and len({ids.shape[1:] for ids in windows}) != 1:
        raise ValueError(f"allocation {allocation!r} measures the model on a text: pass windows=, of one length")
    if allocation == "zero-sum" and ratio and not windows:
        raise ValueError("allocation 'zero-sum' takes the gradient of the loss on a text: pass windows=")


def searched(
    model: nn.Module,
    stats: Statistics | None,
    prepared: Mapping[str, Decomposition],
    ratio: float,
    allocation: str,
    domains: Sequence[Tensor],
    *,
    method: str,
    factors: str = "plain",
    shelf: Shelf | None = None,
    progress: bool = False,
    **options: float,
) -> tuple[dict[str, int], int]:
    """Ranks by an allocation that looks at decompositions, and the tokens that went through the model to find them.

    ``domains`` are the windows that those of ``SEARCHING`` read.
    """
    how: dict[str, Any] = {"method": method, "factors": factors, **options}
    if allocation == "spectrum":
        return spectrum(model, prepared, ratio, **how), 0
    if allocation == "fisher":
        return by_loss(model, stats, prepared, ratio, **how), 0
    if allocation == "svd-llm-v2":
        return svd_llm_v2(model, stats, prepared, ratio, **how), 0
    if allocation == "zero-sum":
        changes = zero_sum_changes(model, stats, prepared, domains, shelf=shelf, progress=progress)
        least = matrix_method(method).least_rank(options)
        return zero_sum(changes, shapes(model, prepared), ratio, factors, least=least), sum(
            ids.numel() for ids in domains
        )
    windows = torch.cat(list(domains))
    if allocation == "lems":
        found = probes(model, windows, prepared, progress=progress, **how)
        return lems(model, found, prepared, ratio, **how), found.tokens
    table = measured(model, stats, windows, prepared, progress=progress, **how)
    return strs(model, table, ratio, factors), table.tokens


def uniform(
    model: nn.Module, ratio: float, factors: str = "plain", *, layers: Iterable[str] | None = None
) -> dict[str, int]:
    """The same fraction of parameters removed from every target layer, or from those named; none at ratio 0."""
    ranks = {}
    for name, shape in shapes(model, layers).items() if ratio else ():
        with naming(name):
            ranks[name] = rank_for_ratio(*shape, ratio, factors)
    return ranks


def spectrum(
    model: nn.Module,
    prepared: Mapping[str, Decomposition],
    ratio: float,
    *,
    method: str,
    factors: str = "plain",
    **options: float,
) -> dict[str, int]:
    """Equal relative truncation error per parameter at the margin, from the decompositions alone."""
    sizes, spectra = shapes(model, prepared), _spectra(model, prepared, method, options)
    steps = spectrum_steps(spectra, sizes, factors, least=matrix_method(method).least_rank(options))
    return cut(steps, sizes, ratio, factors)


def by_loss(
    model: nn.Module,
    stats: Statistics | None,
    prepared: Mapping[str, Decomposition],
    ratio: float,
    *,
    method: str,
    factors: str = "plain",
    **options: float,
) -> dict[str, int]:
    """Equal rise of the model's loss per parameter at the margin, as the output gradients predict it to second order.

    The squared singular values of ``kfac`` are twice that rise, in nats a token; those of the other methods are errors of
    the layer's output and are multiplied by mean(diag H), which ``stats`` then have to hold.
    """
    sizes, chosen = shapes(model, prepared), matrix_method(method)
    spectra = _spectra(model, prepared, method, options)
    if not chosen.needs_gradients:
        known = cast(Statistics, stats)  # see ``check_gradients``
        spectra = {name: s * _mean_square(known[name].slopes()).to(s) ** 0.5 for name, s in spectra.items()}
    steps = spectrum_steps(spectra, sizes, factors, least=chosen.least_rank(options), relative=False)
    return cut(steps, sizes, ratio, factors)


def lems(
    model: nn.Module,
    found: Probes,
    prepared: Mapping[str, Decomposition],
    ratio: float,
    *,
    method: str,
    factors: str = "plain",
    multiple: int = MULTIPLE,
    **options: float,
) -> dict[str, int]:
    """The integer program of LEMS, from its measurements: see ``nsvd.linalg.lems``. Ranks are multiples of ``multiple``."""
    spectra, least = _spectra(model, prepared, method, options), matrix_method(method).least_rank(options)
    return lems_ranks(found.measured, spectra, shapes(model, prepared), ratio, factors, multiple=multiple, least=least)


def zero_sum_changes(
    model: nn.Module,
    stats: Statistics | None,
    prepared: Mapping[str, Decomposition],
    domains: Sequence[Tensor],
    *,
    shelf: Shelf | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """What the loss on the text changes by, to first order, when a term of a layer's decomposition goes.

    See ``nsvd.linalg.zs_svd``. The gradients lie on the ``shelf`` until they are used. Several processes deal the windows, and
    then the layers.
    """
    layers, shelf = among(model, prepared), Shelf() if shelf is None else shelf
    slopes, owner, found = shelf.kept("weight-gradients-whole"), owners(model, layers), {}
    shares = stats.shares(len(domains)) if stats else [1 / len(domains)] * len(domains)
    weight_gradients_into(slopes, model, domains, shares, layers=list(layers), shelf=shelf, progress=progress)
    for name in layers:
        if is_mine(owner, name):
            found[name] = first_order(prepared[name], slopes[name].to(prepared[name].U))
    found = {name: changes for some in gathered(found) for name, changes in some.items()}
    for name in layers:
        del slopes[name]
    return {name: found[name] for name in layers}


def svd_llm_v2(
    model: nn.Module,
    stats: Statistics | None,
    prepared: Mapping[str, Decomposition],
    ratio: float,
    *,
    method: str,
    factors: str = "plain",
    **options: float,
) -> dict[str, int]:
    """SVD-LLM V2's ratios, see ``nsvd.linalg.svd_llm_v2``: a type of layer are those of one name in their blocks, and one shape.

    Errors are means over tokens here, and sums over the tokens of the calibration in the paper, which gives the logarithm its unit.
    """
    sizes, losses, ranks = shapes(model, prepared), {}, {}
    inner = {name: place for name, (_, place) in places(model, sizes).items()}
    for name, s in _spectra(model, prepared, method, options).items():
        tokens = 1 if stats is None else cast(int, stats[name].n)
        with naming(name):
            k = rank_for_ratio(*sizes[name], ratio, factors)
        losses[name] = (tokens * double(s)[k:].square().sum().item()) ** 0.5
    types = {name: (inner.get(name, name), sizes[name]) for name in losses}
    for name, share in log_ratios(losses, types, ratio).items():
        with naming(name):
            ranks[name] = rank_for_ratio(*sizes[name], share, factors)
    return ranks


def _spectra(model: nn.Module, prepared: Mapping[str, Decomposition], method: str, options: dict) -> dict[str, Tensor]:
    """The singular values of every layer; what was kept for another outer step or other weights is refused."""
    if isinstance(prepared, Prepared):
        check_step(prepared, among(model, prepared), matrix_method(method), options)
    return {name: one.s for name, one in prepared.items()}


def _mean_square(H: Tensor) -> Tensor:
    return (H if H.ndim == 1 else H.diagonal()).mean()
