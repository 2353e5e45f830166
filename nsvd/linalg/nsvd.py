r"""Nested decompositions of the NSVD paper (arXiv 2503.17101, section 4).

Rank k = k1 + k2: the outer, activation-aware step takes k1; the inner step spends k2 on the residual W − Ŵ₁, by its SVD
(NSVD) or by an interpolative decomposition (NID). The factors stack into one pair of rank k.

After ASVD-I the residual lies in the trailing eigenvectors of W G Wᵀ, so the inner step is a decomposition of the last
m − k1 coordinates only, and a sweep over k1 repeats nothing large. The inner step needs the outer one's columns to be
orthonormal, so it takes an ``Orthogonal`` decomposition only.
"""

from __future__ import annotations

from nsvd.linalg.decomposition import Orthogonal, leading
from nsvd.linalg.factors import LowRank, interpolative_decomposition, split_rank


def nsvd(outer: Orthogonal, k: int, *, k1: float = 0.95) -> LowRank:
    """Outer step to rank k1 · k, then the best rank-k2 approximation of what is left, in the plain Frobenius norm.

    NSVD-I with ``outer = asvd_1(…)``, NSVD-II with ``asvd_2``. k1 = 1 is the outer method, k1 = 0 the plain SVD. At equal k the
    weight error is at most, the calibration loss at least, that of the outer method (for ``asvd_1``).
    """
    first, second = _steps(outer, k, k1)
    return outer.truncate(first) + leading(outer.residual(first), second)


def nid(outer: Orthogonal, k: int, *, k1: float = 0.95) -> LowRank:
    """As ``nsvd`` with k2 columns of the residual times an interpolation matrix (NID-I, NID-II)."""
    first, second = _steps(outer, k, k1)
    residual = outer.residual(first)
    if second == 0:
        return outer.truncate(first)
    columns, Z = interpolative_decomposition(residual.right, second)
    return outer.truncate(first) + LowRank(residual.left @ residual.right[:, columns], Z)


def _steps(outer: Orthogonal, k: int, k1: float) -> tuple[int, int]:
    outer.check_rank(k)  # with a small k1, k may exceed what W has although k1 · k does not
    return split_rank(k, k1)
