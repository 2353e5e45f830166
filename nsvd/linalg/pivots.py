"""Rows and columns of a matrix that the others are made of. Nothing leaves the device that the matrix is on."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsvd.linalg.precision import double

BOUND = 1.5  # of the coefficients of ``spanning_rows``; QR with column pivoting leaves them as large


def spanning_rows(A: Float[Tensor, "d k"]) -> tuple[Int[Tensor, " d"], Float[Tensor, "rest k"]]:
    """(order, T): A[order[k:]] = T A[order[:k]], k ≤ d, no entry of T larger than ``BOUND`` in magnitude.

    LU with partial pivoting of A gives k rows, also where the rank of A is below k. LU of [I; T], the column with the largest
    entry first, exchanges rows for better ones: each time the volume of the chosen rows grows by that entry at least, so the
    search ends. One or two turns are what it takes.
    """
    d, k = A.shape
    order = torch.arange(d, device=A.device)
    while True:
        L, pivots, _ = torch.linalg.lu_factor_ex(A)
        order = order[_permutation(pivots.tolist(), d).to(order)]
        T = torch.linalg.solve_triangular(L[:k], L[k:], upper=False, left=False, unitriangular=True)
        largest = T.abs().amax(0) if len(T) else T.new_zeros(k)
        if not (largest > BOUND).any():  # NaN ends it, too
            return order, T
        A = torch.cat([torch.eye(k, dtype=T.dtype, device=T.device), T])[:, largest.argsort(descending=True)]


def _permutation(pivots: list[int], d: int) -> Tensor:
    """The order of rows that LAPACK's exchanges leave: row i with row pivots[i], counted from 1, one after the other."""
    order = list(range(d))
    for i, j in enumerate(pivots):
        order[i], order[j - 1] = order[j - 1], order[i]
    return torch.tensor(order)


def interpolative_decomposition(A: Float[Tensor, "m n"], k: int) -> tuple[Int[Tensor, " k"], Float[Tensor, "k n"]]:
    """(columns, Z): A ≈ A[:, columns] Z with k columns of A, by QR with column pivoting; Z is the identity on them.

    Columns beyond the numerical rank of A stand for themselves only. The QR ends after k columns, at 2 m n operations each.
    """
    values = double(A.detach())
    columns, R = _greedy(values, k)
    r, others = len(columns), torch.ones(A.shape[1], dtype=torch.bool, device=columns.device)
    others[columns] = False
    rest = others.nonzero()[:, 0]
    Z = values.new_zeros(k, A.shape[1])
    Z[:r, rest] = torch.linalg.solve_triangular(R[:, columns], R[:, rest], upper=True)
    columns = torch.cat([columns, rest[: k - r]])
    Z[:, columns] = torch.eye(k, dtype=Z.dtype, device=Z.device)
    return columns.to(A.device), Z.to(A)


def _greedy(A: Float[Tensor, "m n"], k: int) -> tuple[Int[Tensor, " r"], Float[Tensor, "r n"]]:
    """At most k columns, each the largest in norm of what those before leave of A, and R: A ≈ Q R with orthonormal Q.

    There are fewer than k where nothing but rounding is left. Squared norms are brought up to date by subtraction, and counted
    again once that has cancelled half of their digits.
    """
    Q, R, columns = A.new_zeros(len(A), k), A.new_zeros(k, A.shape[1]), []
    left = A.square().sum(0)
    first, counted = left.max().sqrt(), left.max()
    eps = torch.finfo(A.dtype).eps
    for i in range(k):
        if left.max() <= eps**0.5 * counted:
            left = (A - Q[:, :i] @ R[:i]).square().sum(0)
            counted = left.max()
        j = left.argmax()
        q = A[:, j]
        for _ in range(2):  # once more is enough
            q = q - Q[:, :i] @ (Q[:, :i].mT @ q)
        length = q.norm()
        if length <= max(A.shape) * eps * first:
            break
        Q[:, i], columns = q / length, [*columns, j]
        R[i] = Q[:, i] @ A
        left = (left - R[i].square()).clamp(min=0)
        left[j] = 0
    found = torch.stack(columns) if columns else torch.zeros(0, dtype=torch.long, device=A.device)
    return found, R[: len(columns)]
