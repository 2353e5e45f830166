r"""All ranks of one matrix under one metric, or those up to a given one.

Every method of the ASVD family is ``Ŵ = [W S]_k S⁻¹``. With the left singular vectors U of W S this is ``U_k U_kᵀ W``: an
orthogonal projection of the layer's outputs, in which S only appears through ``M = S Sᵀ``. So one eigendecomposition
``W M Wᵀ = U diag(s²) Uᵀ``, on the smaller side of W, gives the answer for every rank, and needs neither a factor nor an
inverse of M. ``from_metric`` is that route. ``from_whitener`` is the papers' literal one, through S.

Where the rank is known, no more than its ``k`` terms are made; k = 0 asks for the singular values alone, which cost far less
than vectors. All of it is exact but for rounding: fewer terms are the first of all terms, not an estimate of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from scipy.linalg import lapack as _lapack
from torch import Tensor

from nsvd.linalg.factors import LowRank
from nsvd.linalg.whiteners import Whitener, check_semidefinite

lapack: Any = _lapack  # compiled: it has no types
STRIP = 512  # rows of a product of which half is wanted


@dataclass(frozen=True)
class Spectrum:
    """What a search for ranks looks at of a decomposition: its singular values ``s`` (m,), falling."""

    s: Float[Tensor, " m"]


@dataclass(frozen=True)
class Decomposition:
    """The first k terms of W = U · coords, in order: the first of them up to j are the rank-j answer. m = min(d_out, d_in).

    ``U`` (d_out, k) has columns of unit length; ``s`` falls, and Σ_{i>j} s_i² is the error of rank j in the method's own
    norm; ``coords`` (k, d_in) are the coordinates of W in the columns of U; ``right`` (k, d_in) are the right factors, ``coords``
    itself unless the pseudo-inverse of a singular S has removed directions from them. ``s`` (m,) has all its values for any k.

    What U is depends on the metric: see ``Orthogonal`` and ``Oblique``.
    """

    U: Float[Tensor, "d_out k"]
    s: Float[Tensor, " m"]
    coords: Float[Tensor, "k d_in"]
    right: Float[Tensor, "k d_in"]

    def truncate(self, k: int) -> LowRank:
        """The rank-k approximation U_k · right_k; k from 0 (the zero matrix) to the number of terms."""
        self.check_rank(k)
        return LowRank(self.U[:, :k], self.right[:k])

    def residual(self, k: int) -> LowRank:
        """W − truncate(k), exactly, as columns of U times rows (no new large matrix). It takes all the terms.

        Raises:
            ValueError: if there are fewer.
        """
        self.check_rank(min(len(self.U), self.right.shape[1]))
        if self.right is self.coords:
            return LowRank(self.U[:, k:], self.coords[k:])
        return LowRank(self.U, torch.cat([self.coords[:k] - self.right[:k], self.coords[k:]]))

    def check_rank(self, k: int) -> None:
        """Raise ``ValueError`` unless k is the rank of some approximation of W, 0 to min(d_out, d_in), and has its terms here."""
        _check_rank(k, self.U.shape[0], self.right.shape[1])
        if k > self.U.shape[1]:
            raise ValueError(f"rank {k} of a decomposition that was asked for no more than {self.U.shape[1]} terms")

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


def from_metric(
    W: Float[Tensor, "d_out d_in"], M: Tensor | None = None, k: int | None = None, *, ridge: float | Tensor = 0.0
) -> Orthogonal:
    r"""Minimise ‖(W − Ŵ) M^{1/2}‖_F at every rank up to k (None: at every rank): Ŵ = U_k U_kᵀ W, U the eigenvectors of W M Wᵀ.

    M is positive semidefinite: a matrix (d_in, d_in), the vector of a diagonal one, or None for the identity. A ``ridge`` is
    added to its diagonal, without a copy of it. For a singular M, where the minimiser is not unique, this is the limit of
    a vanishing ridge M + μI.

    Raises:
        ValueError: if k is no rank of W.
        torch.linalg.LinAlgError: if W M Wᵀ has a clearly negative eigenvalue.
    """
    Q, core, k = *_smaller_side(W), _terms(W, k)
    weighted = core if M is None else core * M if M.ndim == 1 else core @ M
    if isinstance(ridge, Tensor) or ridge:
        weighted = weighted + ridge * core
    eigenvalues, V = _leading_pairs(_upper(weighted, core), k)
    check_semidefinite("W M Wᵀ", eigenvalues.flip(0))
    seen = int((eigenvalues > max(W.shape) * torch.finfo(W.dtype).eps * eigenvalues[0]).sum())
    if k > seen:  # where M is blind, W Wᵀ gives the order, as a vanishing ridge would
        V = V[:, :seen]
        blind = torch.linalg.qr(V, mode="complete").Q[:, seen:]
        V = torch.cat([V, leading(LowRank(blind, blind.mT @ core), k - seen).left], dim=1)
    coords = V.mT @ core
    return Orthogonal(_times(Q, V), eigenvalues.clamp(min=0).sqrt(), coords, coords)


def from_whitener(W: Float[Tensor, "d_out d_in"], S: Whitener, k: int | None = None) -> Orthogonal:
    r"""Ŵ = [W S]_k S⁻¹ as the papers write it: SVD of W S, then undo S on the right. ``k`` is as for ``from_metric``."""
    Q, core, k = *_smaller_side(W), _terms(W, k)
    whitened = S.apply(core)
    if k == 0:
        U, s, Vh = core[:, :0], torch.linalg.svdvals(whitened), core[:0]
    else:
        U, s, Vh = torch.linalg.svd(whitened, full_matrices=False)
    U = U[:, :k]
    return Orthogonal(_times(Q, U), s, U.mT @ core, S.undo(s[:k, None] * Vh[:k]))


def leading(residual: LowRank, k: int) -> LowRank:
    """Best rank-k approximation in the Frobenius norm of a matrix given as orthonormal columns times rows."""
    _, V = _leading_pairs(_upper(residual.right, residual.right), k)
    return LowRank(residual.left @ V, V.mT @ residual.right)


def _leading_pairs(A: Float[Tensor, "m m"], k: int) -> tuple[Float[Tensor, " m"], Float[Tensor, "m k"]]:
    """All eigenvalues and k eigenvectors of a symmetric matrix, the largest first; its upper triangle is read, and used up."""
    m = len(A)
    if k == 0:
        return torch.linalg.eigvalsh(A, UPLO="U").flip(0), A[:, :0]
    if A.device.type == "cpu" and A.dtype == torch.float64 and k <= _few(m) and not A.requires_grad:
        eigenvalues, V = map(torch.from_numpy, _few_pairs(A.numpy().T, k))
    else:
        eigenvalues, V = torch.linalg.eigh(A, UPLO="U")
    return eigenvalues.flip(0), V[:, V.shape[1] - k :].flip(1)


def _few(m: int) -> float:
    """Up to so many of m eigenvectors ``_few_pairs`` takes no longer than LAPACK's evd for all; measured on a CPU.

    A fifth for m = 1000, more than half for m = 4000, where evd waits for the memory.
    """
    return min(0.1 + m / 8192, 0.6) * m


def _few_pairs(A: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All eigenvalues and the eigenvectors of the k largest, ascending, of a symmetric matrix of which the lower triangle is read.

    A is in Fortran's order, and used up. Of its tridiagonal form MRRR (LAPACK's stemr) makes these vectors and no others, in k m
    operations, and they are turned back.
    """
    m = len(A)
    work = int(lapack.dsytrd_lwork(m, lower=1)[0])
    reflectors, diagonal, beside, tau, _ = lapack.dsytrd(A, lower=1, lwork=work, overwrite_a=1)
    eigenvalues: Any = scipy.linalg.eigvalsh_tridiagonal(diagonal, beside, lapack_driver="sterf")
    some: dict[str, Any] = {"select": "i", "select_range": (m - k, m - 1), "lapack_driver": "stemr"}
    _, V = scipy.linalg.eigh_tridiagonal(diagonal, beside, **some)
    how = ("L", "N", np.asfortranarray(reflectors[1:, :-1]), tau, np.asfortranarray(V[1:]))  # the first row stays
    V[1:] = lapack.dormqr(*how, int(lapack.dormqr(*how, -1)[1][0]))[0]
    return eigenvalues, V


def _upper(A: Float[Tensor, "m n"], B: Float[Tensor, "m n"]) -> Float[Tensor, "m m"]:
    """The upper triangle of A Bᵀ, a symmetric matrix, strip by strip; what is below it is not to be read."""
    product = A.new_zeros(len(A), len(A))
    for first in range(0, len(A), STRIP):
        product[first : first + STRIP, first:] = A[first : first + STRIP] @ B[first:].mT
    return product


def _terms(W: Tensor, k: int | None) -> int:
    """How many terms k asks for; None asks for all."""
    if k is None:
        return min(W.shape)
    _check_rank(k, *W.shape)
    return k


def _check_rank(k: int, d_out: int, d_in: int) -> None:
    if not 0 <= k <= min(d_out, d_in):
        raise ValueError(f"rank {k} of a {d_out} × {d_in} matrix: expected 0 to {min(d_out, d_in)}")


def _smaller_side(W: Tensor) -> tuple[Tensor | None, Tensor]:
    """W = Q · core with at most d_in rows left in the core; Q is None where nothing is to be gained."""
    return torch.linalg.qr(W) if W.shape[0] > W.shape[1] else (None, W)


def _times(Q: Tensor | None, V: Tensor) -> Tensor:
    return V if Q is None else Q @ V
