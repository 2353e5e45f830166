"""Rows and columns that the others are made of: exact, with small coefficients, and no more of them than are asked for."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsvd.linalg import pivots
from nsvd.linalg.pivots import BOUND, interpolative_decomposition, spanning_rows
from tests.linalg.reference import law


def growing(d: int) -> torch.Tensor:
    """Wilkinson's matrix, for which LU with partial pivoting takes the rows as they come, and one below that needs all of them."""
    A = torch.eye(d) - torch.ones(d, d).tril(-1)
    return torch.cat([A, torch.ones(1, d)])


@law
@given(d=st.integers(1, 40), data=st.data())
def test_the_other_rows_are_made_of_the_chosen_ones(d, data):
    """A[order[k:]] = T A[order[:k]] for a matrix of any rank, its columns of very different sizes; no coefficient is large."""
    k = data.draw(st.integers(1, d))
    r = data.draw(st.integers(0, k))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    A = torch.randn(d, r) @ torch.randn(r, k) * torch.logspace(0, data.draw(st.sampled_from([0, -6])), k)
    order, T = spanning_rows(A)
    assert sorted(order.tolist()) == list(range(d))
    assert (A[order[k:]] - T @ A[order[:k]]).norm() <= 1e-12 * (1 + A.norm())
    assert T.shape == (d - k, k)
    assert not T.numel() or T.abs().max() <= BOUND


def test_one_elimination_alone_may_leave_large_coefficients(monkeypatch):
    """Of Wilkinson's matrix they are near 2^(d − 2); the next turns exchange the rows."""
    A = growing(12)
    order, T = spanning_rows(A)
    assert T.abs().max() <= BOUND
    assert (A[order[12:]] - T @ A[order[:12]]).norm() <= 1e-12
    monkeypatch.setattr(pivots, "BOUND", float("inf"))
    assert spanning_rows(A)[1].abs().max() > 1000


def rounded(A: torch.Tensor, right: torch.Tensor, order: torch.Tensor, T: torch.Tensor) -> float:
    """Relative error of A · right on the chosen rows after these and T went through bfloat16."""
    rows = (A @ right)[order]
    C, T = (part.bfloat16().double() for part in (rows[: A.shape[1]], T))
    return ((torch.cat([C, T @ C]) - rows).norm() / rows.norm()).item()


def rows_by_qr(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What LAPACK's QR with column pivoting of the orthonormalised columns chooses."""
    k, Q = A.shape[1], torch.linalg.qr(A)[0]
    _, R, order = scipy.linalg.qr(Q.mT.numpy(), mode="economic", pivoting=True)
    return torch.from_numpy(order).long(), torch.from_numpy(scipy.linalg.solve_triangular(R[:k, :k], R[:k, k:])).mT


def test_the_rows_are_as_good_as_those_of_a_pivoted_qr(monkeypatch):
    """Through bfloat16 they lose a tenth more on the average of twelve draws; after one elimination alone a third more."""

    def ratio(k: int, fall: float) -> float:
        A = torch.linalg.qr(torch.randn(300, k))[0] * torch.logspace(0, fall, k)
        right = torch.logspace(0, -1 - fall, k)[:, None] * torch.randn(k, 200)
        return rounded(A, right, *spanning_rows(A)) / rounded(A, right, *rows_by_qr(A))

    draws = [(k, fall) for k in (20, 80, 160) for fall in (0, -3)] * 2
    assert sum(ratio(*draw) for draw in draws) / 12 < 1.2
    monkeypatch.setattr(pivots, "BOUND", float("inf"))
    assert sum(ratio(*draw) for draw in draws) / 12 > 1.25


def test_rows_with_nan_end_the_search():
    """They are for somebody else to refuse."""
    assert spanning_rows(torch.full((5, 2), float("nan")))[1].isnan().any()


def by_qr(A: torch.Tensor, k: int) -> list[int]:
    """The first k columns of LAPACK's QR with column pivoting, which is carried to its end."""
    return scipy.linalg.qr(A.numpy(), mode="r", pivoting=True)[1][:k].tolist()


@law
@given(
    m=st.integers(1, 30),
    n=st.integers(1, 30),
    seed=st.integers(0, 10**6),
    fall=st.sampled_from([0, -3, -10]),
    data=st.data(),
)
def test_an_interpolation_takes_the_columns_of_a_pivoted_qr(m, n, seed, fall, data):
    """Also where norms fall over ten orders, and subtraction has cancelled all digits of what is left of them."""
    k = data.draw(st.integers(1, min(m, n)))
    torch.manual_seed(seed)
    A = torch.randn(m, m) @ (torch.logspace(0, fall, m)[:, None] * torch.randn(m, n))
    columns, Z = interpolative_decomposition(A, k)
    assert columns.tolist() == by_qr(A, k)
    best = A[:, columns] @ torch.linalg.lstsq(A[:, columns], A, driver="gelsd").solution
    assert (A[:, columns] @ Z - best).norm() <= 1e-9 * A.norm()


def test_the_first_columns_are_not_what_a_pivoted_qr_takes():
    """A generic matrix tells the choices apart."""
    assert by_qr(torch.randn(8, 12), 4) != [0, 1, 2, 3]


@pytest.mark.parametrize("k", [1, 5])
def test_an_interpolation_ends_after_its_columns(k, monkeypatch):
    """k columns cost k products with the matrix, however many there are."""
    products, multiply = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append(b.shape) or multiply(a, b))
    A = torch.from_numpy(np.random.default_rng(0).normal(size=(30, 40)))
    interpolative_decomposition(A, k)
    assert products.count((30, 40)) == k
