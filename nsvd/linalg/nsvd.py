r"""Nested decompositions of the NSVD paper (arXiv 2503.17101, section 4).

Rank k = k1 + k2: the outer, activation-aware step takes k1; the inner step spends k2 on the residual W − Ŵ₁, by its SVD
(NSVD) or by an interpolative decomposition (NID). The factors stack into one pair of rank k.

After ASVD-I the residual lies in the trailing eigenvectors of W G Wᵀ, so the inner step is a decomposition of the last
m − k1 coordinates only, and a sweep over k1 repeats nothing large. The inner step needs the outer one's columns to be
orthonormal, so it takes an ``Orthogonal`` decomposition only.
"""

from __future__ import annotations

from collections.abc import Callable

from nsvd.linalg.decomposition import Orthogonal, leading
from nsvd.linalg.factors import LowRank, split_rank
from nsvd.linalg.pivots import interpolative_decomposition


def nsvd(outer: Orthogonal, k: int, *, k1: float = 0.95) -> LowRank:
    """Outer step to rank k1 · k, then the best rank-k2 approximation of what is left, in the plain Frobenius norm.

    NSVD-I with ``outer = asvd_1(…)``, NSVD-II with ``asvd_2``. k1 = 1 is the outer method, k1 = 0 the plain SVD. At equal k the
    weight error is at most, the calibration loss at least, that of the outer method (for ``asvd_1``).
    """
    return _nested(outer, k, k1, leading)


def nid(outer: Orthogonal, k: int, *, k1: float = 0.95) -> LowRank:
    """As ``nsvd``, but the inner step is an interpolative decomposition of the residual R (NID-I, NID-II).

    k2 columns R_J of the residual are taken, each the largest of what those before leave, and Z minimises ‖R − R_J Z‖_F: the plain
    Frobenius norm of the weight, as in ``nsvd``. At equal k and k1 the weight error is at least that of ``nsvd``.
    """
    return _nested(outer, k, k1, _some_columns)


def _nested(outer: Orthogonal, k: int, k1: float, inner: Callable[[LowRank, int], LowRank]) -> LowRank:
    outer.check_rank(k)  # with a small k1, k may exceed what W has although k1 · k does not
    first, second = split_rank(k, k1)
    value = outer.truncate(first)
    return value + inner(outer.residual(first), second) if second else value


def _some_columns(residual: LowRank, k: int) -> LowRank:
    """k columns of the residual, orthonormal columns times rows, and how all the others combine from them."""
    columns, Z = interpolative_decomposition(residual.right, k)
    return LowRank(residual.left @ residual.right[:, columns], Z)
