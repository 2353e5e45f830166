"""The pair of factors adds by stacking, and costs k (d_out + d_in) parameters."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsvd.linalg import LowRank, rank_for_ratio, saves_parameters, split_rank
from tests.linalg.reference import is_close, law, random_factors, unchecked

sizes = st.integers(1, 9)


@law
@given(d_out=sizes, d_in=sizes, k=st.integers(0, 9), j=st.integers(0, 9))
def test_addition_stacks_the_factors(d_out, d_in, k, j):
    """Matrices add, ranks add, parameters add."""
    A, B = random_factors(d_out, d_in, k), random_factors(d_out, d_in, j)
    total = A + B
    assert torch.allclose(total.dense(), A.dense() + B.dense(), rtol=0, atol=1e-12)
    assert (total.shape, total.rank, total.n_params) == ((d_out, d_in), k + j, (k + j) * (d_out + d_in))


def test_matrices_of_different_shapes_do_not_add():
    """(5, 4) + (5, 3) and (5, 4) + (4, 5) raise, also where the ranks agree."""
    for shape in ((5, 3), (4, 5), (4, 4)):
        with pytest.raises(ValueError, match=r"cannot add a \(5, 4\) and a "):
            random_factors(5, 4, 2) + random_factors(*shape, 2)


@pytest.mark.parametrize(("left", "right"), [((5, 2), (3, 4)), ((5,), (5, 4)), ((5, 2), (2,)), ((1, 5, 2), (2, 4))])
def test_factors_that_do_not_multiply_are_refused(left, right):
    """left (d_out, k) and right (k, d_in) share k."""
    with unchecked(), pytest.raises(ValueError, match="do not multiply"):
        LowRank(torch.ones(left), torch.ones(right))


def test_a_cast_reaches_both_factors():
    """``to`` is the border between float64 and the model's dtype."""
    A = random_factors(5, 4, 2)
    assert A.to(torch.float32).left.dtype == A.to(torch.float32).right.dtype == torch.float32
    assert is_close(A.to(torch.float32).dense().double(), A.dense(), 1e-6)


@law
@given(d_out=st.integers(1, 5000), d_in=st.integers(1, 5000), percent=st.integers(0, 99))
def test_the_rank_of_a_ratio_is_the_largest_that_fits(d_out, d_in, percent):
    """k (d_out + d_in) ≤ (1 − ratio) d_out d_in < (k + 1) (d_out + d_in), in exact arithmetic."""
    budget = Fraction(100 - percent, 100) * d_out * d_in
    if budget < d_out + d_in:
        with pytest.raises(ValueError, match=f"leaves rank 0 for a {d_out} × {d_in} matrix"):
            rank_for_ratio(d_out, d_in, percent / 100)
        return
    k = rank_for_ratio(d_out, d_in, percent / 100)
    assert k * (d_out + d_in) <= budget < (k + 1) * (d_out + d_in)
    assert saves_parameters(d_out, d_in, k) == (k * (d_out + d_in) < d_out * d_in)
    assert saves_parameters(d_out, d_in, k) or percent == 0


@pytest.mark.parametrize(
    ("d_out", "d_in", "ratio", "k"), [(4096, 4096, 0.2, 1638), (11008, 4096, 0.5, 1492), (1024, 4096, 0.2, 655)]
)
def test_the_rank_of_a_ratio_on_known_layers(d_out, d_in, ratio, k):
    """``ratio`` is what is removed: 20 % of a square layer leaves 0.4 n."""
    assert rank_for_ratio(d_out, d_in, ratio) == k


def test_a_whole_rank_survives_floating_point():
    """20 · 20 · 0.2 / 40 is 2; the formula typed as it stands gives 1."""
    assert int(20 * 20 * (1 - 0.8) / (20 + 20)) == 1
    assert rank_for_ratio(20, 20, 0.8) == 2


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_ratio_is_the_fraction_removed(ratio):
    """Outside [0, 1) nothing sensible remains."""
    with pytest.raises(ValueError, match=r"lies in \[0, 1\)"):
        rank_for_ratio(8, 8, ratio)


@law
@given(k=st.integers(2, 4096), data=st.data())
def test_a_split_is_the_nearest_whole_rank_and_sums_to_k(k, data):
    """k1 + k2 = k, both at least 1, k1 within half a rank of the fraction."""
    fraction = data.draw(st.floats(0.6 / k, 1 - 0.6 / k))
    k1, k2 = split_rank(k, fraction)
    assert k1 + k2 == k
    assert min(k1, k2) >= 1
    assert abs(k1 - fraction * k) <= 0.5 + 1e-9


def test_the_ends_of_a_split_are_the_plain_methods():
    """k1 = 1 spends all on the outer step, k1 = 0 all on the inner one."""
    assert split_rank(7, 1.0) == (7, 0)
    assert split_rank(7, 0.0) == (0, 7)


@pytest.mark.parametrize(
    ("k", "k1", "message"),
    [
        (10, -0.1, r"in \[0, 1\]"),
        (10, 1.1, r"in \[0, 1\]"),
        (10, float("nan"), r"in \[0, 1\]"),
        (9, 0.95, r"k1 = 0.95 of rank 9 rounds k2 to 0; choose k1 = 1.0 or a larger rank"),
        (9, 0.05, r"k1 = 0.05 of rank 9 rounds k1 to 0; choose k1 = 0.0 or a larger rank"),
        (1, 0.5, r"rounds k1 to 0"),
    ],
)
def test_a_split_that_loses_a_step_is_refused(k, k1, message):
    """Rounding must not turn NSVD into another method without a word."""
    with pytest.raises(ValueError, match=message):
        split_rank(k, k1)
