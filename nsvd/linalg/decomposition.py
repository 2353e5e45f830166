r"""All ranks of one matrix under one metric.

Every method of the ASVD family is ``Ŵ = [W S]_k S⁻¹``. With the left singular vectors U of W S this is ``U_k U_kᵀ W``: an
orthogonal projection of the layer's outputs, in which S only appears through ``M = S Sᵀ``. So one eigendecomposition
``W M Wᵀ = U diag(s²) Uᵀ``, on the smaller side of W, gives the answer for every rank, and needs neither a factor nor an
inverse of M. ``from_metric`` is that route. ``from_whitener`` is the papers' literal one, through S.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nsvd.linalg.factors import LowRank
from nsvd.linalg.whiteners import Whitener, check_semidefinite


@dataclass(frozen=True)
class Spectrum:
    """What a search for ranks looks at of a decomposition: its singular values ``s`` (m,), falling."""

    s: Float[Tensor, " m"]


@dataclass(frozen=True)
class Decomposition:
    """W = U · coords, its terms in order: the first k of them are the rank-k answer.

    ``U`` (d_out, m), m = min(d_out, d_in), has columns of unit length; ``s`` (m,) falls, and Σ_{i>k} s_i² is the error of
    rank k in the method's own norm; ``coords`` (m, d_in) are the coordinates of W in the columns of U; ``right`` (m, d_in) are the
    right factors, ``coords`` itself unless the pseudo-inverse of a singular S has removed directions from them.

    What U is depends on the metric: see ``Orthogonal`` and ``Oblique``.
    """

    U: Float[Tensor, "d_out m"]
    s: Float[Tensor, " m"]
    coords: Float[Tensor, "m d_in"]
    right: Float[Tensor, "m d_in"]

    def truncate(self, k: int) -> LowRank:
        """The rank-k approximation U_k · right_k; k from 0 (the zero matrix) to min(d_out, d_in)."""
        self.check_rank(k)
        return LowRank(self.U[:, :k], self.right[:k])

    def residual(self, k: int) -> LowRank:
        """W − truncate(k), exactly, as columns of U times rows (no new large matrix)."""
        if self.right is self.coords:
            return LowRank(self.U[:, k:], self.coords[k:])
        return LowRank(self.U, torch.cat([self.coords[:k] - self.right[:k], self.coords[k:]]))

    def check_rank(self, k: int) -> None:
        """Raise ``ValueError`` unless k is the rank of some approximation of W, 0 to min(d_out, d_in)."""
        if not 0 <= k <= len(self.s):
            shape = (self.U.shape[0], self.right.shape[1])
            raise ValueError(f"rank {k} of a {shape[0]} × {shape[1]} matrix: expected 0 to {len(self.s)}")

    def to(self, *args, **kwargs) -> Decomposition:
        """All tensors moved or cast as ``Tensor.to`` does."""
        U, s, coords = (t.to(*args, **kwargs) for t in (self.U, self.s, self.coords))
        right = coords if self.right is self.coords else self.right.to(*args, **kwargs)
        return replace(self, U=U, s=s, coords=coords, right=right)


@dataclass(frozen=True)
class Orthogonal(Decomposition):
    """Under a metric of the inputs alone: Uᵀ U = I and ``coords`` = Uᵀ W, so ‖W − Ŵ‖ is the norm of the coordinates left out.

    ``s`` are the singular values of W S.
    """


@dataclass(frozen=True)
class Oblique(Decomposition):
    """Under metrics M of the inputs and N of the outputs: Uᵀ N U is diagonal, ``coords`` = (Uᵀ N U)⁻¹ Uᵀ N W.

    The columns of U are not orthogonal. ``s`` are the singular values of N^{1/2} W M^{1/2}.
    """


def from_metric(W: Float[Tensor, "d_out d_in"], M: Tensor | None = None) -> Orthogonal:
    r"""Minimise ‖(W − Ŵ) M^{1/2}‖_F at every rank: Ŵ = U_k U_kᵀ W, U the eigenvectors of W M Wᵀ.

    M is positive semidefinite: a matrix (d_in, d_in), the vector of a diagonal one, or None for the identity. For a
    singular M, where the minimiser is not unique, this is the limit of a vanishing ridge M + μI.

    Raises:
        torch.linalg.LinAlgError: if W M Wᵀ has a clearly negative eigenvalue.
    """
    Q, core = _smaller_side(W)
    weighted = core if M is None else core * M if M.ndim == 1 else core @ M
    eigenvalues, V = torch.linalg.eigh(_symmetric(weighted @ core.mT))
    check_semidefinite("W M Wᵀ", eigenvalues)
    eigenvalues, V = eigenvalues.flip(0), V.flip(1)
    seen = int((eigenvalues > max(W.shape) * torch.finfo(W.dtype).eps * eigenvalues[0]).sum())
    if seen < len(eigenvalues):  # where M is blind, W Wᵀ gives the order, as a vanishing ridge would
        blind = V[:, seen:]
        V = torch.cat([V[:, :seen], leading(LowRank(blind, blind.mT @ core), len(eigenvalues) - seen).left], dim=1)
    coords = V.mT @ core
    return Orthogonal(_times(Q, V), eigenvalues.clamp(min=0).sqrt(), coords, coords)


def from_whitener(W: Float[Tensor, "d_out d_in"], S: Whitener) -> Orthogonal:
    r"""Ŵ = [W S]_k S⁻¹ as the papers write it: SVD of W S, then undo S on the right."""
    Q, core = _smaller_side(W)
    U, s, Vh = torch.linalg.svd(S.apply(core), full_matrices=False)
    return Orthogonal(_times(Q, U), s, U.mT @ core, S.undo(s[:, None] * Vh))


def leading(residual: LowRank, k: int) -> LowRank:
    """Best rank-k approximation in the Frobenius norm of a matrix given as orthonormal columns times rows."""
    _, V = torch.linalg.eigh(_symmetric(residual.right @ residual.right.mT))
    V = V.flip(1)[:, :k]
    return LowRank(residual.left @ V, V.mT @ residual.right)


def _smaller_side(W: Tensor) -> tuple[Tensor | None, Tensor]:
    """W = Q · core with at most d_in rows left in the core; Q is None where nothing is to be gained."""
    return torch.linalg.qr(W) if W.shape[0] > W.shape[1] else (None, W)


def _times(Q: Tensor | None, V: Tensor) -> Tensor:
    return V if Q is None else Q @ V


def _symmetric(A: Tensor) -> Tensor:
    return (A + A.mT) / 2
