"""The pair of factors adds by stacking, and costs k (d_out + d_in) parameters; k² of them can be spared."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsvd.linalg import LowRank, Pivoted, pivoted, rank_for_ratio, saves_parameters, split_rank
from nsvd.linalg.factors import FACTORS, n_params, remaining
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


@law
@given(d_out=st.integers(1, 3000), d_in=st.integers(1, 3000), percent=st.integers(0, 99))
def test_the_pivoted_rank_of_a_ratio_is_the_largest_that_fits(d_out, d_in, percent):
    """k (d_out + d_in − k) ≤ (1 − ratio) d_out d_in, and k + 1 is no rank or too large; never less than plain factors get."""
    budget, least = Fraction(100 - percent, 100) * d_out * d_in, min(d_out, d_in)
    if budget < d_out + d_in - 1:
        with pytest.raises(ValueError, match=f"leaves rank 0 for a {d_out} × {d_in} matrix"):
            rank_for_ratio(d_out, d_in, percent / 100, "pivoted")
        return
    k = rank_for_ratio(d_out, d_in, percent / 100, "pivoted")
    assert 1 <= k <= least
    assert k * (d_out + d_in - k) <= budget
    assert k == least or (k + 1) * (d_out + d_in - k - 1) > budget
    assert saves_parameters(d_out, d_in, k, "pivoted") == (k < least)
    if budget >= d_out + d_in:
        assert k >= rank_for_ratio(d_out, d_in, percent / 100)


def test_pivoted_factors_buy_rank():
    """20 % removed of a square layer: n (1 − √0.2) = 0.553 n in place of 0.4 n; rank n − 1 still saves parameters."""
    assert rank_for_ratio(4096, 4096, 0.2, "pivoted") == int(4096 * (1 - 0.2**0.5)) == 2264
    assert saves_parameters(40, 60, 39, "pivoted")
    assert not saves_parameters(40, 60, 39)
    assert not saves_parameters(40, 60, 40, "pivoted")


def test_there_are_two_ways_to_store_factors():
    """Any other name is refused, with those there are."""
    assert FACTORS == ("plain", "pivoted")
    for refused in (lambda: n_params(8, 8, 2, "sparse"), lambda: rank_for_ratio(8, 8, 0.3, "sparse")):
        with pytest.raises(ValueError, match="unknown factors 'sparse'; there are plain, pivoted"):
            refused()


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
    assert int(100 * (1 - 0.9)) == 9
    assert remaining(100, 0.9) == 10


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_ratio_is_the_fraction_removed(ratio):
    """Outside [0, 1) nothing sensible remains."""
    with pytest.raises(ValueError, match=r"lies in \[0, 1\)"):
        rank_for_ratio(8, 8, ratio)
    with pytest.raises(ValueError, match=rf"ratio is {ratio}, but"):
        remaining(64, ratio)
    assert remaining(64, 0) == 64


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


def conditioned(d_out: int, d_in: int, k: int, condition: float = 1.0) -> LowRank:
    """Random factors, their inner bases stretched against each other: the same kind of matrix, worse factors."""
    plain, stretch = random_factors(d_out, d_in, k), condition ** torch.linspace(0, 1, k)
    return LowRank(plain.left * stretch, plain.right / stretch[:, None])


@law
@given(d_out=sizes, d_in=sizes, data=st.data())
def test_the_pivoted_form_is_the_same_matrix_with_fewer_numbers(d_out, d_in, data):
    """k of its rows as they are, the others as combinations of them: k (d_out + d_in − k) numbers, k² less."""
    k = data.draw(st.integers(1, min(d_out, d_in)))
    plain = conditioned(d_out, d_in, k, data.draw(st.sampled_from([1.0, 1e3, 1e6])))
    value = pivoted(plain)
    assert is_close(value.dense(), plain.dense(), 1e-10)
    assert value.rank == k
    assert value.n_params == n_params(d_out, d_in, k, "pivoted") == plain.n_params - k**2
    assert sorted(value.order.tolist()) == list(range(d_out))
    kept = value.order < k
    assert torch.equal(value.dense()[kept], value.C[value.order[kept].long()])  # the identity block
    assert is_close(value.C, plain.dense()[value.order.argsort()[:k]], 1e-10)


@law
@given(d_out=sizes, d_in=sizes, data=st.data())
def test_the_pivoted_form_of_a_matrix_of_lower_rank(d_out, d_in, data):
    """Factors wider than the matrix's rank, in either factor, are no obstacle: also the zero matrix."""
    k = data.draw(st.integers(1, min(d_out, d_in)))
    r = data.draw(st.integers(0, k - 1))
    A, B = random_factors(d_out, d_in, r), random_factors(d_out, d_in, k - r)
    for plain in (
        LowRank(torch.cat([A.left, 0 * B.left], 1), torch.cat([A.right, B.right])),
        LowRank(torch.cat([A.left, B.left], 1), torch.cat([A.right, 0 * B.right])),
    ):
        value = pivoted(plain)
        assert (value.dense() - plain.dense()).norm() <= 1e-10 * (1 + plain.dense().norm())
        assert value.T.isfinite().all()


@pytest.mark.parametrize("k", [0, 6])
def test_a_rank_without_a_pivoted_form_is_refused(k):
    """No row at all, or more rows than there are."""
    with pytest.raises(ValueError, match=f"rank {k} of a 5 × 9 matrix has no pivoted form"):
        pivoted(LowRank(torch.ones(5, k), torch.ones(k, 9)))


def with_rows(value: LowRank, rows: torch.Tensor) -> Pivoted:
    """The pivoted form on rows of one's own choice."""
    rest = torch.tensor([i for i in range(value.shape[0]) if i not in rows.tolist()])
    T = torch.linalg.solve(value.left[rows], value.left[rest], left=False)
    return Pivoted(value.left[rows] @ value.right, T, torch.cat([rows, rest]).argsort().int())


def rounded(value: LowRank | Pivoted, exact: torch.Tensor) -> float:
    """Relative error of the matrix after its numbers went through bfloat16."""
    return ((value.to(torch.bfloat16).to(torch.float64).dense() - exact).norm() / exact.norm()).item()


def nearly_dependent(k: int) -> LowRank:
    """Factors whose first two rows are almost one."""
    Q = torch.linalg.qr(torch.randn(48, k))[0]
    Q[1] = Q[0] + 1e-3 * torch.randn(k)
    return LowRank(Q, torch.logspace(0, -2, k)[:, None] * torch.randn(k, 64))


@law
@given(d_out=st.integers(20, 60), d_in=st.integers(20, 60), data=st.data())
def test_the_coefficients_of_the_other_rows_stay_small(d_out, d_in, data):
    """Entries of T below 4, however badly the factors are conditioned; in terms of the first k rows some are far larger."""
    k = data.draw(st.integers(2, 19))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    plain = conditioned(d_out, d_in, k, data.draw(st.sampled_from([1.0, 1e3, 1e6])))
    assert pivoted(plain).T.abs().max() < 4
    close = nearly_dependent(k)
    assert pivoted(close).T.abs().max() < 4
    assert with_rows(close, torch.arange(k)).T.abs().max() > 20


def test_rounding_the_pivoted_form_costs_about_what_rounding_plain_factors_does():
    """Through bfloat16: at most three times their error on 30 draws; on the first k rows it is out of all proportion."""
    ours, first = [], []
    for k in (4, 12, 24) * 10:
        plain = nearly_dependent(k)
        exact, least = plain.dense(), rounded(plain, plain.dense())
        ours.append(rounded(pivoted(plain), exact) / least)
        chosen = with_rows(plain, torch.arange(k))
        assert is_close(chosen.dense(), exact)  # the same matrix before it is rounded
        first.append(rounded(chosen, exact) / least)
    assert max(ours) < 3
    assert min(first) > 4
