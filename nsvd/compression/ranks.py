"""How a target for the whole model becomes a rank for each layer, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from nsvd.compression.measure import naming
from nsvd.compression.prepared import Prepared, check_step
from nsvd.compression.strs import measured, strs
from nsvd.linalg import Decomposition, matrix_method, rank_for_ratio
from nsvd.linalg.budget import cut, spectrum_steps
from nsvd.linalg.factors import check_ratio
from nsvd.walk.statistics import Statistics
from nsvd.walk.targets import shapes, targets

ALLOCATIONS = ("uniform", "strs", "spectrum", "fisher")
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
    if allocation == "strs" and ratio and len({ids.shape[1:] for ids in windows}) != 1:
        raise ValueError("allocation 'strs' measures the model on a text: pass windows=, of one length")


def searched(
    model: nn.Module,
    stats: Statistics | None,
    prepared: Mapping[str, Decomposition],
    ratio: float,
    allocation: str,
    windows: Tensor | None,
    *,
    method: str,
    factors: str = "plain",
    progress: bool = False,
    **options: float,
) -> tuple[dict[str, int], int]:
    """Ranks by ``strs``, ``spectrum`` or ``fisher``, and the tokens that went through the model to find them."""
    if allocation == "spectrum":
        return spectrum(model, prepared, ratio, method=method, factors=factors, **options), 0
    if allocation == "fisher":
        return by_loss(model, stats, prepared, ratio, method=method, factors=factors, **options), 0
    how = {"method": method, "factors": factors, "progress": progress}
    table = measured(model, stats, windows, prepared, **how, **options)
    return strs(model, table, ratio, factors), table.tokens


def uniform(model: nn.Module, ratio: float, factors: str = "plain") -> dict[str, int]:
    """The same fraction of parameters removed from every layer; none at ratio 0."""
    ranks = {}
    for name, shape in shapes(model).items() if ratio else ():
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
    sizes, spectra = shapes(model), _spectra(model, prepared, method, options)
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
    sizes, chosen = shapes(model), matrix_method(method)
    spectra = _spectra(model, prepared, method, options)
    if not chosen.needs_gradients:
        spectra = {name: s * _mean_square(stats[name].H).to(s) ** 0.5 for name, s in spectra.items()}
    steps = spectrum_steps(spectra, sizes, factors, least=chosen.least_rank(options), relative=False)
    return cut(steps, sizes, ratio, factors)


def _spectra(
    model: nn.Module, prepared: Mapping[str, Decomposition], method: str, options: Mapping
) -> dict[str, Tensor]:
    """The singular values of every layer; what was kept for another outer step or other weights is refused."""
    if isinstance(prepared, Prepared):
        check_step(prepared, targets(model), matrix_method(method), options)
    return {name: one.s for name, one in prepared.items()}


def _mean_square(H: Tensor) -> Tensor:
    return (H if H.ndim == 1 else H.diagonal()).mean()
