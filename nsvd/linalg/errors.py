r"""What a truncation costs: the formulas of the NSVD paper's Theorems 1–4, and the errors measured directly.

Losses are per token: calibration loss = ‖(W − Ŵ) X‖²_F / n = tr(E G Eᵀ), E = W − Ŵ. For the papers' ‖·‖_F take √(n · loss).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Weight = Float[Tensor, "d_out d_in"]


def weight_error(W: Weight, approximation: Weight) -> float:
    """‖W − Ŵ‖²_F."""
    return (W - approximation).square().sum().item()


def calibration_loss(W: Weight, approximation: Weight, G: Float[Tensor, "d_in d_in"]) -> float:
    """‖(W − Ŵ) X‖²_F / n = tr(E G Eᵀ)."""
    return output_energy(W - approximation, G)


def output_energy(W: Weight, G: Float[Tensor, "d_in d_in"]) -> float:
    """‖W X‖²_F / n = tr(W G Wᵀ)."""
    return (W @ G).mul_(W).sum().item()


def tail(s: Float[Tensor, " m"], k: int) -> float:
    """Σ_{i>k} s_i²: the squared error of the best rank-k approximation (Theorem 1; Theorems 2 and 3 with s = σ(W S))."""
    return s[k:].square().sum().item()


def drop_loss_rotation(
    s: Float[Tensor, " m"], v: Float[Tensor, "m d_in"], G: Float[Tensor, "d_in d_in"], gamma: float
) -> Tensor:
    r"""Theorem 4 for S = γ P: loss of dropping one singular term j of W S, for every j: s_j² v̂_jᵀ Λ v̂_j / γ², (m,).

    ``v`` holds the right singular vectors of W (rows; v̂_j = Pᵀ v_j, so v̂_jᵀ Λ v̂_j = v_jᵀ G v_j), ``s`` the singular values of
    W S, ``gamma`` = max Λ^{1/2}. These are squared losses: the norm of Theorem 4(a) is their square root, which the
    paper's formula lacks. Losses of different terms add up, so a tail costs their sum, at most Σ s_j².
    """
    return s.square() * ((v @ G) * v).sum(1) / gamma**2


def effective_rank(s: Float[Tensor, " m"]) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007)."""
    p = s / s.sum()
    return torch.special.entr(p).sum().exp().item()


def stable_rank(s: Float[Tensor, " m"]) -> float:
    """‖·‖²_F / ‖·‖²₂ = Σ s² / max s²."""
    return (s.square().sum() / s.square().max()).item()


def condition_number(G: Float[Tensor, "d d"]) -> float:
    """λ_max / λ_min of a positive semidefinite matrix; inf when the smallest is zero within rounding."""
    eigenvalues = torch.linalg.eigvalsh(G)
    if eigenvalues[0] <= len(G) * torch.finfo(G.dtype).eps * eigenvalues[-1]:
        return float("inf")
    return (eigenvalues[-1] / eigenvalues[0]).item()


def principal_cosines(A: Float[Tensor, "d k"], B: Float[Tensor, "d k2"]) -> Tensor:
    """Cosines of the principal angles between the spans of two sets of orthonormal columns, descending."""
    return torch.linalg.svdvals(A.mT @ B).clamp(max=1)
