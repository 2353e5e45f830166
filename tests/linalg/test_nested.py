"""Nested decompositions: what they trade, what their parts are, and where they end."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nsvd.linalg import METHODS, Moments
from nsvd.linalg.pivots import interpolative_decomposition
from tests.linalg.reference import is_close, is_determined, law, layer, layers, random_factors, spectrum

GENERIC = layer(9, 12, 6, condition=1e3)
NESTED = ["nsvd-1", "nsvd-2", "nid-1", "nid-2"]


@st.composite
def splits(draw, **kwargs):
    """A layer and k1, 1 ≤ k1 < k."""
    x = draw(layers(k_from=2, **kwargs))
    return x, draw(st.integers(1, x.k - 1))


@pytest.mark.parametrize("method", NESTED)
@law
@given(x=layers())
def test_nested_with_nothing_inside_is_its_outer_method(method, x):
    """k1 = 1 is ASVD-I or ASVD-II, to the bit."""
    assert torch.equal(x.decompose(method, k1=1.0), x.decompose("asvd" + method[-2:]))


@law
@given(x=layers())
def test_nested_with_nothing_outside_is_the_plain_svd(x):
    """k1 = 0 is the SVD of W; a NID of W is an interpolative decomposition, and in general worse."""
    assume(is_determined("svd", x, x.k))
    for method in ("nsvd-1", "nsvd-2"):
        assert is_close(x.decompose(method, k1=0.0), x.decompose("svd"))
    least = GENERIC.weight_error(GENERIC.decompose("svd"))
    assert GENERIC.weight_error(GENERIC.decompose("nid-1", k1=0.0)) > 1.01 * least


@law
@given(case=splits(condition=1.0))
def test_nested_with_white_inputs_is_the_plain_svd(case):
    """G = 4 I: both steps work in the same norm, and nothing is traded."""
    x, k1 = case
    assume(is_determined("svd", x, x.k) and is_determined("svd", x, k1))
    assert is_close(x.decompose("nsvd-1", k1=k1 / x.k), x.decompose("svd"))


@pytest.mark.parametrize("number", ["1", "2"])
@pytest.mark.parametrize("few_tokens", [False, True])
@law
@given(data=st.data())
def test_nesting_trades_calibration_loss_for_weight_error(number, few_tokens, data):
    """At equal k: weight error at most, calibration loss at least, those of the outer method; NID's are at least NSVD's."""
    x, k1 = data.draw(splits(condition=1e4, few_tokens=few_tokens))
    outer = x.decompose(f"asvd-{number}")
    nsvd, nid = (x.decompose(f"{name}-{number}", k1=k1 / x.k) for name in ("nsvd", "nid"))
    rounding = 1e-12 * x.W.square().sum()
    assert x.weight_error(nsvd) <= x.weight_error(outer) + rounding
    assert x.weight_error(nsvd) <= x.weight_error(nid) + rounding
    assert min(x.loss(nsvd), x.loss(nid)) >= x.loss(outer) - x.slack


def test_a_rank_strictly_inside_has_a_price_and_a_gain():
    """In a generic case both inequalities are strict, and shifting rank inside moves both errors one way."""
    x = GENERIC
    pairs = [(x.loss(W), x.weight_error(W)) for W in (x.decompose("nsvd-1", k1=k1 / 6) for k1 in (6, 5, 3, 1))]
    for (loss, error), (more_loss, less_error) in pairwise(pairs):
        assert more_loss > 1.001 * loss
        assert less_error < 0.999 * error


@law
@given(case=splits())
def test_nsvd_1_is_a_projection_of_the_outputs_too(case):
    """Ŵ = U Uᵀ W with orthonormal U = [U_k1, U_2]; NID's left factor is not orthonormal."""
    x, k1 = case
    value = METHODS["nsvd-1"](x.W, x.moments, x.k, k1=k1 / x.k)
    assert value.rank == x.k
    assert is_close(value.left.mT @ value.left, torch.eye(x.k), 1e-12)
    assert is_close(value.dense(), value.left @ value.left.mT @ x.W, 1e-12)
    left = METHODS["nid-1"](GENERIC.W, GENERIC.moments, 6, k1=0.5).left
    assert not is_close(left.mT @ left, torch.eye(6), 1e-2)


def distance_to_columns(R, C) -> float:
    """How far the worst column of C is from every column of R."""
    return torch.cdist(C.mT, R.mT).min(1).values.max().item()


@pytest.mark.parametrize("outer", ["1", "2"])
@law
@given(case=splits(condition=1e4))
def test_nid_is_made_of_columns_of_the_residual(outer, case):
    """The inner left factor is k2 columns of W − Ŵ₁; they are reproduced exactly; the error is at least the SVD's."""
    x, k1 = case
    k2 = x.k - k1
    residual = x.W - x.decompose(f"asvd-{outer}", k1)
    value = METHODS[f"nid-{outer}"](x.W, x.moments, x.k, k1=k1 / x.k)
    columns, rounding = value.left[:, k1:], 1e-9 * x.W.norm()
    inner = columns @ value.right[k1:]
    assert distance_to_columns(residual, columns) <= rounding
    exact = (residual - inner).norm(dim=0) <= rounding
    assert exact.sum() >= k2
    assert (residual - inner).square().sum() >= spectrum(residual, x.m)[k2:].square().sum() - rounding**2


def test_nsvd_is_not_made_of_columns_of_the_residual():
    """Its inner left factor is a rotation of them."""
    residual = GENERIC.W - GENERIC.decompose("asvd-1", 3)
    left = METHODS["nsvd-1"](GENERIC.W, GENERIC.moments, 6, k1=0.5).left[:, 3:]
    assert distance_to_columns(residual, left / left.norm(dim=0) * residual.norm(dim=0).mean()) > 0.1


@law
@given(d_out=st.integers(1, 9), d_in=st.integers(1, 9), data=st.data())
def test_an_interpolation_is_exact_from_the_rank_on(d_out, d_in, data):
    """A = A[:, columns] Z, Z the identity on k distinct columns, those beyond the rank of A standing for themselves only."""
    r = data.draw(st.integers(0, min(d_out, d_in)))
    k = data.draw(st.integers(max(r, 1), max(r, min(d_out, d_in))))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    A = random_factors(d_out, d_in, r).dense()
    columns, Z = interpolative_decomposition(A, k)
    assert len(set(columns.tolist())) == k
    assert torch.equal(Z[:, columns], torch.eye(k))
    assert torch.equal(Z[r:].abs().sum(1), torch.ones(k - r))
    assert torch.allclose(A[:, columns] @ Z, A, atol=1e-9 * (1 + A.norm().item()))


@pytest.mark.parametrize("method", NESTED)
@pytest.mark.parametrize(("r", "k1"), [(3, 2), (3, 3), (3, 5), (1, 1), (0, 2)])
@pytest.mark.parametrize("shape", [(8, 10), (10, 8)])
def test_a_residual_of_deficient_rank_is_reproduced(method, r, k1, shape):
    """W of rank r ≤ k comes back whole, whether the residual has rank below k2, or is zero."""
    x = layer(*shape, 6)
    x = type(x)(random_factors(*shape, r).dense(), x.X, 6)
    value = METHODS[method](x.W, x.moments, 6, k1=k1 / 6)
    assert (value.dense() - x.W).norm() <= 1e-9 * x.W.norm()
    assert (value.rank, value.shape) == (6, shape)
    assert value.left.isfinite().all()
    assert value.right.isfinite().all()


def test_the_defaults_leave_five_percent_of_the_rank_inside():
    """k1 = 0.95: of rank 20, 19 outside; of rank 9 the rounding would leave nothing inside and is refused."""
    x = layer(24, 26, 20)
    assert torch.equal(x.decompose("nsvd-1"), x.decompose("nsvd-1", k1=19 / 20))
    with pytest.raises(ValueError, match="rounds k2 to 0"):
        x.decompose("nsvd-1", 9)
    assert METHODS["nsvd-1"](x.W, Moments(x.G), 20).rank == 20
