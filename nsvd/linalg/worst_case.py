r"""One metric for several domains, weighed so that the domain it serves worst is served as well as can be.

Over rank-k Ŵ of every layer we look for

    min_Ŵ max_d L_d(Ŵ),    L_d = Σ_layers ‖(W − Ŵ) X_d‖² / (n mean(diag G_d)),

each layer's term in units of its output energy, averaged over domains. Averages Σ_d w_d L_d have an exact minimiser: the truncation
in the metric Σ_d w_d G_d / mean(diag G_d), layer by layer. So q(w) = min_Ŵ Σ_d w_d L_d is known for every w ≥ 0 of sum 1, it is
concave, and never above the worst case of any Ŵ whatever:

    q(w) ≤ min_Ŵ max_d L_d.

The largest q(w) is the minimum over relaxed projections Ŵ = P W, 0 ≤ P ≤ I, tr P = k, a convex set on which both sides meet.
Matrices of rank k are no convex set: a gap may remain between the sides, and no w need attain the right one. (Tantipongpipat,
Samadi, Singh, Morgenstern and Vempala 2019, arXiv 1902.11281, ask the same of principal components, and bound the gap.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nsvd.linalg.decomposition import from_metric
from nsvd.linalg.errors import calibration_loss
from nsvd.linalg.moments import mixing
from nsvd.linalg.precision import double

Layer = tuple[Tensor, Sequence[Tensor], int]  # W (d_out, d_in), G_d (d_in, d_in) of every domain, k


@dataclass(frozen=True)
class WorstCase:
    """Weights of sum 1, the losses L_d under them, and the largest q(w) seen: no Ŵ has a worst case below ``bound``."""

    weights: list[float]
    losses: Float[Tensor, " domains"]
    bound: float


def worst_case_weights(layers: Sequence[Layer], *, rounds: int = 16, step: float = 8.0) -> WorstCase:
    r"""One w for all layers, by multiplicative weights (Arora, Hazan and Kale 2012): w_d ← w_d exp(step (L_d / Σ w L − 1)).

    Each round is one decomposition of every layer; the step falls as 1 / √round.
    A domain that is hard at any rank draws weight, too. Uniform weights are the first to be tried, and those of the
    smallest largest L_d are returned, so the worst case is never above that of uniform weights; nor is it further from the
    best possible than from ``bound``. A multiple of a domain's G changes nothing. Computed in float64.

    Raises:
        ValueError: if there is no layer or no domain.
    """
    if not layers or not layers[0][1]:
        raise ValueError("worst-case weights need a layer and a domain at least")
    count = len(layers[0][1])
    w, bound = torch.full((count,), 1 / count, dtype=torch.float64), 0.0
    tried: list[WorstCase] = []
    for turn in range(rounds):
        losses = torch.stack([_losses(*layer, w.tolist()) for layer in layers]).sum(0)
        average = (w @ losses).item()
        bound = max(bound, average)
        tried.append(WorstCase(w.tolist(), losses, bound))
        if count == 1 or average <= 0:
            break
        w = (w.log() + step / (1 + turn) ** 0.5 * (losses / average - 1)).softmax(0)
    best = min(tried, key=lambda one: one.losses.max().item())
    return replace(best, bound=bound)


def _losses(W: Tensor, G: Sequence[Tensor], k: int, w: Sequence[float]) -> Tensor:
    """The layer's part of every L_d, Ŵ its truncation under the weights w; on the CPU."""
    W = double(W)
    scales = mixing([g.diagonal().mean() for g in G], [1 / len(G)] * len(G))
    G = [a * g.to(W) for a, g in zip(scales, G, strict=True)]  # of one size
    metric = sum((share * g for share, g in zip(w, G, strict=True)), torch.zeros_like(G[0]))
    approximation = from_metric(W, metric, k).truncate(k).dense()
    energy = sum(calibration_loss(W, torch.zeros_like(W), g) for g in G) / len(G)
    losses = [calibration_loss(W, approximation, g) for g in G]
    return torch.tensor(losses, dtype=torch.float64) / max(energy, torch.finfo(torch.float64).tiny)
