r"""The ASVD family: Ŵ = [W S]_k S⁻¹, of which only M = S Sᵀ differs (NSVD paper, arXiv 2503.17101, section 3).

Each function returns the ``Orthogonal`` decomposition of all ranks, or of those up to ``k``; ``.truncate(k)`` is the paper's Ŵ.

| name | M | minimises over rank k |
|---|---|---|
| svd | I | ‖W − Ŵ‖_F |
| asvd_0 | diag(mean abs)² | ‖(W − Ŵ) S‖_F, channels weighted by their size |
| asvd_1, asvd_2 | G | ‖(W − Ŵ) X‖_F |
| asvd_3 | γ² I | the same as svd, by Theorem 4's choice of S |
| asvd | diag((mean abs)^α + ε)² | as asvd_0 with damped weights (ASVD paper, arXiv 2312.05821) |
| ridge | G + μ mean(diag G) I | ‖(W − Ŵ) X‖² / n + μ mean(diag G) ‖W − Ŵ‖² |
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from nsvd.linalg.decomposition import Orthogonal, from_metric, from_whitener
from nsvd.linalg.moments import Moments
from nsvd.linalg.whiteners import cholesky as cholesky_factor
from nsvd.linalg.whiteners import scaled_rotation, spectral

Weight = Float[Tensor, "d_out d_in"]


def svd(W: Weight, moments: Moments | None = None, *, k: int | None = None) -> Orthogonal:
    """Plain truncated SVD: ‖W − Ŵ‖_F = √(Σ_{i>k} σ_i(W)²) (Theorem 1, Eckart–Young–Mirsky). Ignores the moments."""
    return from_metric(W, k=k)


def asvd_0(W: Weight, moments: Moments, *, k: int | None = None) -> Orthogonal:
    """S = diag(mean absolute value of each input channel); a channel that was always zero has no weight."""
    return from_metric(W, moments.scale() ** 2, k)


def asvd_1(W: Weight, moments: Moments, *, k: int | None = None) -> Orthogonal:
    """The minimiser of ‖(W − Ŵ) X‖_F: error √(Σ_{i>k} σ_i(W S)²), S Sᵀ = G up to the factor √n (Theorem 2).

    The paper takes S from Cholesky's factorisation; the projection form used here gives the same matrix without it,
    and an answer for singular G too. ``asvd_1_cholesky`` is the literal route.
    """
    return from_metric(W, moments.G, k)


def asvd_1_cholesky(W: Weight, moments: Moments, *, jitter: float = 0.0) -> Orthogonal:
    """ASVD-I as printed, S = cholesky(G + jitter · mean(diag G) · I); raises ``LinAlgError`` for a singular G."""
    return from_whitener(W, cholesky_factor(moments.G, jitter=jitter))


def asvd_2(W: Weight, moments: Moments, *, k: int | None = None) -> Orthogonal:
    """S = P Λ^{1/2}, G = P Λ Pᵀ, undone by the pseudo-inverse (Theorem 3).

    Loss and, for nonsingular G, matrix are those of ``asvd_1``. Directions that G has not seen are set to zero here
    and kept there.
    """
    return from_whitener(W, spectral(moments.G), k)


def asvd_3(W: Weight, moments: Moments, *, k: int | None = None) -> Orthogonal:
    """S = γ P, γ = max Λ^{1/2} (Theorem 4). S is a multiple of a rotation, so Ŵ is the plain truncated SVD of W."""
    return from_whitener(W, scaled_rotation(moments.G), k)


def asvd(W: Weight, moments: Moments, *, alpha: float = 0.5, eps: float = 1e-6, k: int | None = None) -> Orthogonal:
    """S = diag((mean abs)^α + ε) of the ASVD paper (arXiv 2312.05821, equation 8).

    α = 0 is the plain SVD, α = 1 is ASVD-0 but for ε. The published code splits √s between the factors; the product is
    the same.
    """
    return from_metric(W, (moments.scale() ** alpha + eps) ** 2, k)


def ridge(W: Weight, moments: Moments, *, mu: float = 0.1, k: int | None = None) -> Orthogonal:
    """The minimiser of ‖(W − Ŵ) X‖² / n + μ mean(diag G) ‖W − Ŵ‖² over rank k.

    As the exact minimiser of a weighted sum it is Pareto-optimal in calibration loss and weight error, the two errors
    that the nested methods trade. μ = 0 is ASVD-I, μ → ∞ the plain SVD.
    """
    return from_metric(W, moments.G, k, ridge=ridge_of(moments.G, mu))


def ridged(G: Tensor, mu: float, name: str = "mu") -> Tensor:
    """G + μ mean(diag G) I, for a matrix or the vector of a diagonal one; raises ``ValueError`` for a negative μ."""
    size = ridge_of(G, mu, name)
    if G.ndim == 1:
        return G + size
    with_ridge = G.clone()
    with_ridge.diagonal().add_(size)
    return with_ridge


def ridge_of(G: Tensor, mu: float, name: str = "mu") -> Tensor:
    """μ mean(diag G), a number; raises ``ValueError`` for a negative μ."""
    if not mu >= 0:
        raise ValueError(f"{name} is {mu}, but a ridge is not negative")
    return mu * (G if G.ndim == 1 else G.diagonal()).mean()


def oas(G: Float[Tensor, "d_in d_in"], n: int) -> float:
    r"""The μ of ``ridge`` that oracle-approximating shrinkage gives a second moment of n independent normal inputs.

    It answers for sampling noise only: G + μ mean(diag G) I is, up to a factor, the estimate (1 − ρ) G + ρ mean(diag G) I of least
    expected squared error, μ = ρ / (1 − ρ) (Chen, Wiesel, Eldar and Hero 2010, equation 23). A multiple of the
    identity is shrunk wholly: ρ = 1, μ = ∞. Text of another domain is another matter.
    """
    d, trace, square = len(G), G.trace().item(), G.square().sum().item()
    noise, spread = (1 - 2 / d) * square + trace**2, (n + 1 - 2 / d) * (square - trace**2 / d)  # ρ is their ratio, or 1
    return math.inf if noise >= spread else noise / (spread - noise)
