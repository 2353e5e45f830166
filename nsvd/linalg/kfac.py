r"""A metric on both sides of the weight: what the inputs look like, and what the loss makes of the outputs.

The ASVD family asks how far Ŵ X is from W X, every output channel counting the same. To second order the model's loss
changes by

    ½ E[(gᵀ (W − Ŵ) x)²]  ≈  ½ tr(H (W − Ŵ) G (W − Ŵ)ᵀ),    G = E[x xᵀ],  H = E[g gᵀ],

with g the gradient of the loss with respect to the layer's output and the expectation over labels drawn from the model
itself (the Fisher information; its Kronecker factors, as in K-FAC, Martens and Grosse 2015, arXiv 1503.05671). The right side
is again the truncation of one singular value decomposition. Its squared singular values are losses, in nats a token, of
whatever layer they come from, so one threshold on them shares out a budget over all layers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from nsvd.linalg.asvd import ridge_of, ridged
from nsvd.linalg.decomposition import Oblique, from_metric
from nsvd.linalg.moments import Moments

ROUNDING = 1e-12  # a pivot of Cholesky's below this share of its diagonal entry may be rounding, and so may what is divided by it


def kfac(
    W: Float[Tensor, "d_out d_in"], moments: Moments, *, mu: float = 0.01, eta: float = 0.03, k: int | None = None
) -> Oblique:
    """Minimise tr(H_η (W − Ŵ) G_μ (W − Ŵ)ᵀ) at every rank up to k, with ridges G_μ = G + μ mean(diag G) I and H_η likewise.

    The minimum is Σ_{i>k} s_i², half of it the predicted rise of the loss. H may be a matrix (d_out, d_out) or the
    vector of a diagonal one; a multiple of the identity gives ``ridge``. So does H = 0, of a layer that the loss does not see,
    as the limit of a small multiple; then s = 0.

    Raises:
        ValueError: if the moments carry no H, or a ridge is negative.
        torch.linalg.LinAlgError: if H_η is not positive definite, or so nearly singular that rounding decides.
    """
    H, ridge = moments.slopes(), ridge_of(moments.G, mu)
    if not H.any():
        unseen = from_metrics(W, moments.G, torch.ones_like(W[:, 0]), k, ridge=ridge)
        return replace(unseen, s=torch.zeros_like(unseen.s))
    return from_metrics(W, moments.G, ridged(H, eta, "eta"), k, ridge=ridge)


def from_metrics(
    W: Float[Tensor, "d_out d_in"],
    M: Float[Tensor, "d_in d_in"],
    N: Float[Tensor, "d_out ..."],
    k: int | None = None,
    *,
    ridge: float | Tensor = 0.0,
) -> Oblique:
    r"""Minimise ‖N^{1/2} (W − Ŵ) M^{1/2}‖_F at every rank up to k: Ŵ = N^{-1/2} [N^{1/2} W M^{1/2}]_k M^{-1/2}.

    As with one metric no root or inverse of M is needed: Ŵ = N^{-1/2} V_k V_kᵀ N^{1/2} W, with V the left singular vectors of
    N^{1/2} W M^{1/2}. This is a projection of the outputs, but an oblique one. The columns of ``U`` are those of N^{-1/2} V at
    unit length. A ``ridge`` is added to the diagonal of M. A matrix N is used up.
    """
    if N.ndim == 1:
        if not (N > 0).all():
            raise torch.linalg.LinAlgError("the output metric has an entry that is not positive")
        root = N.sqrt()
        weighted = from_metric(root[:, None] * W, M, k, ridge=ridge)
        U = weighted.U / root[:, None]
    else:
        L = cholesky(N, "the output metric")
        weighted = from_metric(L.mT @ W, M, k, ridge=ridge)
        U = torch.linalg.solve_triangular(L.mT, weighted.U, upper=True)
    length = U.norm(dim=0)
    coords = length[:, None] * weighted.coords
    return Oblique(U / length, weighted.s, coords, coords)


def shift(G: Float[Tensor, "d_in d_in"], E: Float[Tensor, "rows d_in"], *, mu: float) -> Float[Tensor, "rows d_in"]:
    r"""E (G + λI)⁻¹, λ = μ mean(diag G): what turns W into the full-rank minimiser B* of ‖W X' + D − B X'‖² / n + λ ‖W − B‖².

    X' (d_in, n) are the inputs that the layer gets once what lies before it is compressed, D (d_out, n) is what is missing at
    its output, G = X' X'ᵀ / n and E = D X'ᵀ / n; then B* = W + shift. With D = W (X − X') the target is the dense layer's output
    W X (AA-SVD, arXiv 2604.02119), and the shift is W times that of E = (X − X') X'ᵀ / n, one for all layers that read this input.
    With nothing missing it is 0. For any B the objective is tr((B − B*) (G + λI) (B − B*)ᵀ) plus a constant, so the best B of
    rank k is the truncation of B* in the metric G + λI. Where all inputs are zero, so is the shift.

    Raises:
        ValueError: if the ridge is negative.
        torch.linalg.LinAlgError: if G + λI is singular, or so nearly that rounding decides. A ridge μ > 0 mends this.
    """
    metric = ridged(G, mu)
    if not G.any():
        return torch.zeros_like(E)
    L = cholesky(metric, "the second moment of the inputs")
    half = torch.linalg.solve_triangular(L, E.mT, upper=False)  # cholesky_solve copies L
    return torch.linalg.solve_triangular(L.mT, half, upper=True).mT


def cholesky(A: Float[Tensor, "d d"], what: str) -> Float[Tensor, "d d"]:
    """L with L Lᵀ = A, in the place of A; raises ``LinAlgError`` unless A is positive definite, and clearly so."""
    least, L, failed = ROUNDING * A.diagonal(), A.mT, torch.empty((), dtype=torch.int32, device=A.device)
    torch.linalg.cholesky_ex(L, out=(L, failed))
    if failed:
        raise torch.linalg.LinAlgError(f"{what} is singular, not positive definite (from row {int(failed)} on)")
    small = L.diagonal().square() <= least
    if small.any():
        row = int(small.nonzero()[0]) + 1
        raise torch.linalg.LinAlgError(f"{what} is singular but for rounding (from row {row} on): a ridge mends this")
    return L
