"""Theorems 1–4 of the NSVD paper (arXiv 2503.17101), the optimality behind them, and the ridge's."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nsvd.linalg import METHODS, LowRank, Moments, errors
from nsvd.linalg.asvd import asvd_1, asvd_1_cholesky, asvd_2, asvd_3, ridge, svd
from tests.linalg.reference import is_close, is_determined, law, layer, layers, random_factors, spectrum

OPTIMAL = {
    "asvd-1": asvd_1,
    "asvd-1 by Cholesky": asvd_1_cholesky,
    "asvd-2": asvd_2,
    "ridge of 0": lambda W, moments: ridge(W, moments, mu=0.0),
}
GENERIC = layer(9, 12, 4, condition=1e3)


def terms(d) -> list[LowRank]:
    """The rank-1 terms of a decomposition."""
    return [LowRank(d.U[:, [j]], d.right[[j]]) for j in range(len(d.s))]


@law
@given(x=layers())
def test_theorem_1_the_weight_error_of_svd_is_the_tail_of_the_spectrum(x):
    """Eckart–Young–Mirsky: ‖W − Ŵ‖² = Σ_{i>k} σ_i(W)²; no other method has less, and in general each has more."""
    tail = errors.tail(spectrum(x.W, x.m), x.k)
    rounding = 1e-13 * x.W.square().sum()
    assert abs(x.weight_error(x.decompose("svd")) - tail) <= rounding
    assert all(x.weight_error(x.decompose(method)) >= tail - rounding for method in ("asvd-0", "asvd-1", "ridge"))
    least = GENERIC.weight_error(GENERIC.decompose("svd"))
    assert all(GENERIC.weight_error(GENERIC.decompose(method)) > 1.01 * least for method in ("asvd-0", "asvd-1"))


@pytest.mark.parametrize("method", OPTIMAL)
@law
@given(x=layers(condition=1e12))
def test_theorem_2_dropping_a_singular_value_costs_exactly_it(method, x):
    """‖(σ_j u_j v_jᵀ S⁻¹) X‖_F / √n = σ_j for every j, and costs of several terms add up in the square."""
    d = OPTIMAL[method](x.W, x.moments)
    losses = [x.loss(x.W - term.dense()) for term in terms(d)]
    assert all(abs(loss - s**2) <= x.slack for loss, s in zip(losses, x.s, strict=True))
    assert abs(sum(losses) - x.s.square().sum()) <= x.slack


def test_theorem_2_does_not_hold_without_whitening():
    """The singular values of W itself, or of W times the channels' sizes, say little about the loss of dropping them."""
    for method in ("svd", "asvd-0"):
        d = METHODS[method].prepare(GENERIC.W, GENERIC.moments)
        relative = [GENERIC.loss(GENERIC.W - t.dense()) ** 0.5 / s - 1 for t, s in zip(terms(d), d.s, strict=True)]
        assert max(map(abs, relative)) > 0.1


@pytest.mark.parametrize("method", OPTIMAL)
@law
@given(x=layers(condition=1e12))
def test_theorems_2_and_3_the_calibration_loss_is_the_tail_of_the_whitened_spectrum(method, x):
    """‖(W − Ŵ) X‖² / n = Σ_{i>k} σ_i(W S)², the optimum, for either square root and any condition of G."""
    d = OPTIMAL[method](x.W, x.moments)
    assert abs(x.loss(d.truncate(x.k).dense()) - x.optimum) <= x.slack
    assert abs(errors.tail(d.s, x.k) - x.optimum) <= x.slack


@pytest.mark.parametrize("method", ["asvd-1", "asvd-2", "ridge of 0"])
@law
@given(x=layers(condition=1e4, few_tokens=True))
def test_theorem_3_holds_for_fewer_tokens_than_channels(method, x):
    """Singular G needs only the directions that were seen; Cholesky cannot say so."""
    assert abs(x.loss(OPTIMAL[method](x.W, x.moments).truncate(x.k).dense()) - x.optimum) <= x.slack
    with pytest.raises(torch.linalg.LinAlgError):
        asvd_1_cholesky(x.W, Moments(x.G - 1e-15 * torch.eye(len(x.G))))


@law
@given(x=layers(condition=1e4, below_full=True), few=layers(condition=1e4, few_tokens=True), step=st.floats(1e-6, 10))
def test_no_matrix_of_the_rank_beats_asvd_on_its_own_inputs(x, few, step):
    """Neither random factors nor factors near the answer's have a smaller calibration loss."""
    for layer_ in (x, few):
        best = METHODS["asvd-1"](layer_.W, layer_.moments, layer_.k)
        shift = random_factors(*layer_.W.shape, layer_.k)
        near = LowRank(best.left + step * shift.left, best.right + step * shift.right)
        for rival in (shift, near):
            assert layer_.loss(rival.dense()) >= layer_.loss(best.dense()) - layer_.slack


@pytest.mark.parametrize("method", ["svd", "asvd-0", "asvd-3", "asvd", "ridge"])
def test_another_metric_does_not_reach_the_optimum(method):
    """Only S Sᵀ = G does; the bound holds for all."""
    assert GENERIC.loss(GENERIC.decompose(method)) > 1.001 * GENERIC.optimum


@law
@given(x=layers())
def test_theorem_3_the_choice_of_the_square_root_does_not_matter(x):
    """ASVD-I and ASVD-II are one matrix for nonsingular G."""
    assume(is_determined("asvd-1", x, x.k))
    assert is_close(x.decompose("asvd-2"), x.decompose("asvd-1"))
    assert is_close(asvd_1_cholesky(x.W, x.moments).truncate(x.k).dense(), x.decompose("asvd-1"))


@law
@given(x=layers(condition=1e4, few_tokens=True))
def test_on_unseen_directions_asvd_1_keeps_what_asvd_2_sets_to_zero(x):
    """Up to the rank of G the losses agree, and the weight errors differ by ‖U_k U_kᵀ W (I − Π)‖², Π the seen directions."""
    x = type(x)(x.W, x.X, min(x.k, x.X.shape[1]))
    assume(is_determined("asvd-2", x, x.k))
    kept, zeroed = x.decompose("asvd-1"), x.decompose("asvd-2")
    unseen = torch.eye(len(x.G)) - x.X @ torch.linalg.pinv(x.X)
    gain = x.weight_error(zeroed) - x.weight_error(kept)
    assert abs(x.loss(kept) - x.loss(zeroed)) <= x.slack
    assert gain == pytest.approx((kept @ unseen).square().sum().item(), rel=1e-6)
    assert gain > 0
    assert not is_close(kept, zeroed, 1e-3)


@law
@given(x=layers(condition=1e4, few_tokens=True))
def test_rank_that_the_inputs_cannot_use_is_spent_on_the_weight(x):
    """With r < k directions in the outputs, ASVD-I is its rank-r answer and the best rank k − r of the residual."""
    r = min(x.m, x.X.shape[1])
    d = asvd_1(x.W, x.moments)
    left = spectrum(x.W - d.truncate(r).dense(), x.m)
    for k in range(r, x.m + 1):
        error = x.weight_error(d.truncate(k).dense())
        assert abs(error - errors.tail(left, k - r)) <= 1e-9 * x.W.square().sum()


@law
@given(x=layers(condition=1e12))
def test_asvd_3_is_the_plain_svd(x):
    """S = γ P is a multiple of a rotation: [W γ P]_k (γ P)⁻¹ = [W]_k, and its calibration loss is no better."""
    assume(is_determined("svd", x, x.k))
    assert is_close(x.decompose("asvd-3"), x.decompose("svd"))
    assert x.loss(x.decompose("asvd-3")) >= x.optimum - x.slack


@law
@given(x=layers())
def test_theorem_4_the_loss_of_a_term_of_asvd_3(x):
    """(a) One term costs σ̂_j (v̂_jᵀ Λ v̂_j)^{1/2} / γ, (b) terms add up in the square; neither exceeds Σ σ̂_j²."""
    d, gamma = asvd_3(x.W, x.moments), torch.linalg.matrix_norm(x.G, 2).item() ** 0.5
    Vh = torch.nn.functional.normalize(d.right, dim=1)
    losses = errors.drop_loss_rotation(d.s, Vh, x.G, gamma)
    rounding = 1e-12 * d.s.square().sum()
    for loss, term in zip(losses, terms(d), strict=True):
        assert abs(loss - x.loss(x.W - term.dense())) <= rounding
    assert abs(losses[x.k :].sum() - x.loss(d.truncate(x.k).dense())) <= rounding
    assert (losses <= d.s.square() + rounding).all()


def test_theorem_4_a_needs_the_square_root_that_the_paper_leaves_out():
    """σ̂_j v̂_jᵀ Λ v̂_j / γ, as printed, is not the norm of the loss."""
    x = GENERIC
    d, gamma = svd(x.W), torch.linalg.matrix_norm(x.G, 2) ** 0.5
    Vh, s = d.right / d.s[:, None], gamma * d.s
    quadratic = ((Vh @ x.G) * Vh).sum(1)
    true = torch.tensor([x.loss(x.W - term.dense()) ** 0.5 for term in terms(d)])
    assert is_close(s * quadratic.sqrt() / gamma, true)
    assert not is_close(s * quadratic / gamma, true, 0.1)


@law
@given(x=layers())
def test_the_ends_of_asvd_and_of_the_ridge_are_known_methods(x):
    """α = 0 is the SVD; μ = 0 is ASVD-I, a large μ the SVD."""
    assume(is_determined("svd", x, x.k) and is_determined("asvd-1", x, x.k))
    assert is_close(x.decompose("asvd", alpha=0.0), x.decompose("svd"))
    assert is_close(x.decompose("ridge", mu=0.0), x.decompose("asvd-1"))
    assert is_close(x.decompose("ridge", mu=1e13), x.decompose("svd"), 1e-5)


def test_between_their_ends_asvd_and_ridge_are_methods_of_their_own():
    """α = 1 is ASVD-0 but for ε; α = 0.5 and μ = 0.1 are none of their ends."""
    x = GENERIC
    assert is_close(x.decompose("asvd", alpha=1.0), x.decompose("asvd-0"), 1e-4)
    assert not is_close(x.decompose("asvd"), x.decompose("asvd-0"), 1e-2)
    assert not any(is_close(x.decompose("ridge"), x.decompose(end), 1e-2) for end in ("svd", "asvd-1"))


def weighted(x, approximation, mu: float) -> float:
    """‖(W − Ŵ) X‖² / n + μ mean(diag G) ‖W − Ŵ‖²."""
    return x.loss(approximation) + mu * x.G.diagonal().mean().item() * x.weight_error(approximation)


@law
@given(x=layers(k_from=2), mu=st.floats(1e-6, 1e3), k1=st.floats(0.3, 0.7))
def test_the_ridge_minimises_its_weighted_sum(x, mu, k1):
    """No method of the family, nested or not, nor random factors have a smaller one."""
    best = weighted(x, x.decompose("ridge", mu=mu), mu)
    rivals = [x.decompose("nsvd-1", k1=k1), *(x.decompose(name) for name in ("svd", "asvd-0", "asvd-1", "asvd-2"))]
    rivals.append(random_factors(*x.W.shape, x.k).dense())
    assert all(best <= weighted(x, rival, mu) + (1 + mu) * x.slack for rival in rivals)


@law
@given(x=layers(condition=1e4, k_from=2, below_full=True), k1=st.floats(0.3, 0.7))
def test_at_equal_calibration_loss_the_ridge_has_no_larger_weight_error_than_nsvd(x, k1):
    """Pareto: between μ = 0 and the SVD there is a ridge with NSVD's calibration loss, and it is closer to W."""
    nested = x.decompose("nsvd-1", k1=k1)
    low, high = -9.0, 9.0  # log10 μ: the ridge's calibration loss grows with it
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if x.loss(x.decompose("ridge", mu=10**middle)) < x.loss(nested) else (low, middle)
    equal = x.decompose("ridge", mu=10**low)
    assume(x.loss(equal) >= (1 - 1e-6) * x.loss(nested))  # the loss jumps where two eigenvalues cross
    assert x.weight_error(equal) <= (1 + 1e-6) * x.weight_error(nested)


def test_a_channel_that_was_always_zero_has_no_weight_in_asvd_0():
    """S is singular then; the answer is that of the other channels, and finite on this one."""
    X = GENERIC.X.clone()
    X[3] = 0
    x, others = type(GENERIC)(GENERIC.W, X, 4), [0, 1, 2, *range(4, 12)]
    rest = type(x)(x.W[:, others], X[others], 4)
    answer = x.decompose("asvd-0")
    assert answer.isfinite().all()
    assert is_close(answer[:, others], rest.decompose("asvd-0"))


@law
@given(x=layers(condition=1e12))
def test_the_errors_are_measured_as_the_inputs_would(x):
    """tr(E G Eᵀ) = ‖E X‖² / n without the inputs, and ‖E‖² without their metric."""
    approximation = x.decompose("asvd-0")
    assert abs(errors.calibration_loss(x.W, approximation, x.G) - x.loss(approximation)) <= x.slack
    assert errors.weight_error(x.W, approximation) == x.weight_error(approximation)


def test_the_summaries_of_a_spectrum_at_their_extremes():
    """Ranks: d for equal singular values, 1 for a single one; condition: inf if singular; cosines: 1 or 0."""
    flat, single = torch.ones(6), torch.tensor([3.0, 0, 0, 0, 0, 0])
    assert (errors.effective_rank(flat), errors.stable_rank(flat)) == pytest.approx((6, 6))
    assert (errors.effective_rank(single), errors.stable_rank(single)) == pytest.approx((1, 1))
    assert errors.condition_number(layer(5, 6, 3, condition=1e6).G) == pytest.approx(1e6, rel=1e-6)
    assert errors.condition_number(layer(5, 6, 3, n=4).G) == float("inf")
    Q = torch.linalg.qr(torch.randn(6, 6))[0]
    assert torch.allclose(
        errors.principal_cosines(Q[:, :3], Q[:, :3] @ torch.linalg.qr(torch.randn(3, 3))[0]), flat[:3]
    )
    assert errors.principal_cosines(Q[:, :3], Q[:, 3:5]).max() < 1e-12
