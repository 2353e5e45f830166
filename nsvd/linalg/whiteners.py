"""Square roots S of the second moment, S Sᵀ = G, as the papers build them.

A whitener offers ``apply`` (M ↦ M S) and ``undo`` (M ↦ M S⁻¹, or the pseudo-inverse); nothing else of S is needed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


class NumericalWarning(RuntimeWarning):
    """A caller asked for a change to the numbers, and it was made."""


@dataclass(frozen=True)
class Diagonal:
    """S = diag(scale): channels weighted one by one (ASVD, ASVD-0). Needs scale > 0."""

    scale: Float[Tensor, " d"]

    def apply(self, M: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """M S."""
        return M * self.scale

    def undo(self, M: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """M S⁻¹."""
        return M / self.scale


@dataclass(frozen=True)
class Cholesky:
    """S = L, lower triangular (ASVD-I); undone by a triangular solve."""

    L: Float[Tensor, "d d"]

    def apply(self, M: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """M S."""
        return M @ self.L

    def undo(self, M: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """M S⁻¹."""
        return torch.linalg.solve_triangular(self.L, M, upper=False, left=False)


@dataclass(frozen=True)
class Spectral:
    """S = P diag(scale) with orthogonal P (ASVD-II, ASVD-III); where scale is 0 the undo gives 0, as the pseudo-inverse."""

    P: Float[Tensor, "d d"]
    scale: Float[Tensor, " d"]

    def apply(self, M: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """M S."""
        return (M @ self.P) * self.scale

    def undo(self, M: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """M S⁺."""
        inverse = torch.where(self.scale > 0, 1 / self.scale, torch.zeros_like(self.scale))
        return (M * inverse) @ self.P.mT


Whitener = Diagonal | Cholesky | Spectral


def cholesky(G: Float[Tensor, "d d"], *, jitter: float = 0.0) -> Cholesky:
    """S S ᵀ = G + jitter · mean(diag G) · I by Cholesky.

    Raises:
        torch.linalg.LinAlgError: if that matrix is not positive definite. Use ``spectral``, or the default routes of
            ``nsvd.linalg.asvd``, which need no factor of G, when G is singular.
    """
    if jitter:
        mu = jitter * G.diagonal().mean()
        warnings.warn(f"added {mu:.1e} to the diagonal of G", NumericalWarning, stacklevel=2)
        G = G + mu * torch.eye(len(G), dtype=G.dtype, device=G.device)
    return Cholesky(torch.linalg.cholesky(G))


def spectral(G: Float[Tensor, "d d"]) -> Spectral:
    """S = P Λ^{1/2} for G = P Λ Pᵀ; eigenvalues up to d · eps · λ_max count as zero, so G may be singular.

    Raises:
        torch.linalg.LinAlgError: if G has a clearly negative eigenvalue.
    """
    P, eigenvalues = _eigenbasis(G)
    seen = eigenvalues > len(G) * torch.finfo(G.dtype).eps * eigenvalues.max()
    return Spectral(P, torch.where(seen, eigenvalues, torch.zeros_like(eigenvalues)).sqrt())


def scaled_rotation(G: Float[Tensor, "d d"]) -> Spectral:
    """S = γ P with γ = max Λ^{1/2}: the square root of ASVD-III, which forgets all of G but its largest eigenvalue."""
    P, eigenvalues = _eigenbasis(G)
    return Spectral(P, eigenvalues.max().sqrt().expand(len(G)))


def check_semidefinite(name: str, eigenvalues: Float[Tensor, " d"]) -> None:
    """Raise ``LinAlgError`` if a symmetric matrix with these eigenvalues, ascending, has a clearly negative one.

    Below −1e-5 λ_max is clear: what rounding leaves of a zero is smaller, also in a G that was summed in float32, and where
    the weight cancels part of it.
    """
    if eigenvalues[0] < -1e-5 * eigenvalues.abs().max():
        spectrum = f"from {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g}"
        raise torch.linalg.LinAlgError(f"{name} is not positive semidefinite: its eigenvalues go {spectrum}")


def _eigenbasis(G: Tensor) -> tuple[Tensor, Tensor]:
    eigenvalues, P = torch.linalg.eigh(G)
    check_semidefinite("G", eigenvalues)
    return P, eigenvalues
