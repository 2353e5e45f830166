"""A metric on both sides: what ``kfac`` minimises, and the target that makes up for what is missing already."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nsvd.linalg import LowRank, Moments, from_metric
from nsvd.linalg.asvd import ridged
from nsvd.linalg.kfac import from_metrics, kfac, shift
from tests.linalg.reference import is_close, is_determined, law, layer, layers, random_factors, truncate

GENERIC = layer(9, 12, 4, condition=1e3)
ridges = st.sampled_from([0.0, 0.01, 1.0])


def shifted(W, G, E, *, mu: float):
    """B*, the target of the layer."""
    return W + shift(G, E, mu=mu)


def predicted(x, approximation, mu: float = 0.01, eta: float = 0.03) -> float:
    """tr(H_η (W − Ŵ) G_μ (W − Ŵ)ᵀ), twice the predicted rise of the loss."""
    E = x.W - approximation
    return torch.trace(ridged(x.H, eta) @ E @ ridged(x.G, mu) @ E.mT).item()


def slack(x) -> float:
    """What rounding may do to it: that of the calibration loss, once more with the norm and condition of H."""
    return 1e3 * x.slack


@law
@given(x=layers(condition=1e4), mu=ridges, eta=ridges)
def test_the_predicted_rise_is_the_tail_of_the_spectrum(x, mu, eta):
    """tr(H_η (W − Ŵ) G_μ (W − Ŵ)ᵀ) = Σ_{i>k} s_i² at every rank k, and s falls."""
    d = kfac(x.W, x.moments, mu=mu, eta=eta)
    assert (d.s.diff() <= 0).all()
    for k in range(x.m + 1):
        assert abs(predicted(x, d.truncate(k).dense(), mu, eta) - d.s[k:].square().sum().item()) <= slack(x)


@law
@given(x=layers(condition=1e4, below_full=True), mu=ridges, eta=ridges, step=st.floats(1e-6, 10))
def test_no_matrix_of_the_rank_has_a_smaller_predicted_rise(x, mu, eta, step):
    """Neither random factors, nor factors near the answer's, nor the ridge's."""
    best = kfac(x.W, x.moments, mu=mu, eta=eta).truncate(x.k)
    shift = random_factors(*x.W.shape, x.k)
    near = LowRank(best.left + step * shift.left, best.right + step * shift.right)
    for rival in (shift.dense(), near.dense(), x.decompose("ridge", mu=mu)):
        assert predicted(x, rival, mu, eta) >= predicted(x, best.dense(), mu, eta) - slack(x)


@pytest.mark.parametrize("method", ["svd", "asvd-0", "asvd-1", "ridge"])
def test_a_metric_of_the_inputs_alone_does_not_reach_it(method):
    """Outputs that the loss hardly sees are approximated as well as the others there."""
    assert predicted(GENERIC, GENERIC.decompose(method)) > 1.05 * predicted(GENERIC, GENERIC.decompose("kfac"))


@law
@given(x=layers(), c=st.floats(1e-3, 1e3), mu=ridges)
def test_where_all_outputs_count_the_same_it_is_the_ridge(x, c, mu):
    """H = c I: the ridge's matrix, √c (1 + η)^½ times its spectrum; any other H gives another."""
    assume(is_determined("ridge", x, x.k) and mu > 0)
    ours = kfac(x.W, Moments(x.G, H=c * torch.eye(len(x.W))), mu=mu)
    theirs = from_metric(x.W, ridged(x.G, mu))
    assume(theirs.s[x.k - 1] ** 2 - (0 if x.k == x.m else theirs.s[x.k] ** 2) > 1e-6 * theirs.s[0] ** 2)
    assert is_close(ours.truncate(x.k).dense(), theirs.truncate(x.k).dense())
    assert is_close(ours.s, (1.03 * c) ** 0.5 * theirs.s)
    assert not is_close(GENERIC.decompose("kfac", mu=0.1), GENERIC.decompose("ridge"), 1e-2)


@law
@given(x=layers(), eta=ridges)
def test_a_vector_is_a_diagonal_output_metric(x, eta):
    """Both forms of a diagonal H have one spectrum and, where that determines it, one answer."""
    h = x.H.diagonal()
    vector, matrix = (kfac(x.W, Moments(x.G, H=H), eta=eta) for H in (h, torch.diag(h)))
    assert torch.allclose(vector.s, matrix.s, atol=1e-7 * x.W.norm().item())
    gaps = torch.cat([vector.s, torch.zeros(1)]).square().diff().abs()
    assume(x.k == x.m or gaps[x.k - 1] > 1e-6 * vector.s[0] ** 2)
    assert is_close(vector.truncate(x.k).dense(), matrix.truncate(x.k).dense())


@law
@given(x=layers())
def test_the_answer_is_an_oblique_projection_of_the_outputs(x):
    """Ŵ = P W, P² = P, with columns of U at unit length, orthogonal in H_η and no longer by themselves."""
    N = ridged(x.H, 0.03)
    d = kfac(x.W, x.moments)
    U = d.U[:, : x.k]
    size = (U.mT @ N @ U).diagonal()
    P = (U / size) @ U.mT @ N
    assert is_close(U.norm(dim=0), torch.ones(x.k), 1e-12)
    assert is_close(U.mT @ N @ U, torch.diag(size), 1e-9)
    assert is_close(P @ P, P, 1e-9)
    assert is_close(d.truncate(x.k).dense(), P @ x.W, 1e-9)
    U = kfac(GENERIC.W, GENERIC.moments).U
    assert not is_close(U.mT @ U, torch.eye(9), 0.1)


@pytest.mark.parametrize("form", [lambda H: H, lambda H: H.diagonal()])
def test_an_output_that_the_loss_never_sees_needs_a_ridge(form):
    """H_η singular or negative raises, and says that it is the outputs' metric; any ridge makes H = 0 in a channel answerable."""
    for value in (0.0, -1.0):
        moments = Moments(GENERIC.G, H=form(torch.diag(torch.tensor([1.0] * 8 + [value]))))
        with pytest.raises(torch.linalg.LinAlgError, match="the output metric"):
            kfac(GENERIC.W, moments, eta=0.0)
    moments = Moments(GENERIC.G, H=form(torch.diag(torch.tensor([1.0] * 8 + [0.0]))))
    assert kfac(GENERIC.W, moments, eta=1e-6).truncate(4).dense().isfinite().all()


@pytest.mark.parametrize("form", [lambda H: H, lambda H: H.diagonal()])
def test_a_layer_that_the_loss_does_not_see_is_answered_by_the_ridge(form):
    """H = 0 is the limit of c I for small c: the ridge's matrix, and no rise at any rank."""
    d = kfac(GENERIC.W, Moments(GENERIC.G, H=form(torch.zeros(9, 9))), mu=0.1)
    assert is_close(d.truncate(4).dense(), GENERIC.decompose("ridge", 4, mu=0.1))
    assert not d.s.any()
    assert kfac(GENERIC.W, Moments(GENERIC.G, H=form(1e-9 * torch.eye(9))), mu=0.1).s.all()


def nearly_singular(size: int = 12, n: int = 11) -> torch.Tensor:
    """A second moment of one token less than channels: what is not zero in the last direction is rounding."""
    X = torch.randn(size, n)
    return X @ X.mT / n


def test_a_second_moment_that_is_singular_but_for_rounding_needs_a_ridge():
    """Without one its target is refused and not of any size; nor is such a metric of the outputs divided by."""
    for seed in range(20):
        torch.manual_seed(seed)
        G, D = nearly_singular(), torch.randn(9, 12)
        with pytest.raises(
            torch.linalg.LinAlgError, match=r"second moment of the inputs is singular.* \(from row 12 on\)"
        ):
            shifted(GENERIC.W, G, D @ G, mu=0.0)
        assert shifted(GENERIC.W, G, D @ G, mu=1e-6).norm() < 2 * (GENERIC.W.norm() + D.norm())
        with pytest.raises(torch.linalg.LinAlgError, match="the output metric is singular"):
            from_metrics(GENERIC.W, GENERIC.G, nearly_singular(9, 8))


def test_a_poor_condition_alone_is_no_singularity():
    """G of condition 1e10, and G in channels of very different sizes, have a target without a ridge."""
    x, D = layer(9, 12, 4, condition=1e10), torch.randn(9, 12)
    sizes = 10 ** -torch.linspace(0, 9, 12)
    for G in (x.G, sizes[:, None] * GENERIC.G * sizes):
        assert is_close(shifted(x.W, G, D @ G, mu=0.0), x.W + D, 1e-4)


def test_inputs_that_are_all_zero_leave_the_weight():
    """Nothing can be missing there, and any ridge gives W."""
    zeros = torch.zeros(12, 12)
    for mu in (0.0, 0.1):
        assert torch.equal(shifted(GENERIC.W, zeros, torch.zeros(9, 12), mu=mu), GENERIC.W)


def test_a_metric_without_the_loss_is_refused():
    """No H, no answer: not the ridge's in its place."""
    with pytest.raises(ValueError, match="needs H"):
        kfac(GENERIC.W, Moments(GENERIC.G))


def test_gradients_independent_of_the_inputs_make_the_prediction_exact():
    """E[(gᵀ E x)²] = tr(H E G Eᵀ) over all pairs of g and x; where g follows x it need not be."""
    E, X, g = torch.randn(9, 12), GENERIC.X, torch.randn(9, 36)
    H = g @ g.mT / g.shape[1]
    said = torch.trace(H @ E @ GENERIC.G @ E.mT)
    pairs = (g.mT @ E @ X).square()
    assert is_close(pairs.mean(), said, 1e-12)
    g = E @ X  # the output with the largest change has the largest gradient
    H = g @ g.mT / g.shape[1]
    assert (g * (E @ X)).sum(0).square().mean() > 1.2 * torch.trace(H @ E @ GENERIC.G @ E.mT)


@st.composite
def shifts(draw):
    """A layer, other inputs X' in place of its own, what is missing at its output, and μ."""
    x = draw(layers(condition=1e4))
    torch.manual_seed(draw(st.integers(0, 1000)))
    compressed = x.X + draw(st.sampled_from([0.0, 0.1, 1.0])) * torch.randn_like(x.X)
    return type(x)(x.W, compressed, x.k), x.W @ (x.X - compressed), draw(st.sampled_from([1e-3, 0.1, 1.0]))


def objective(x, D, mu: float, B):
    """‖W X' + D − B X'‖² / n + μ mean(diag G) ‖W − B‖²."""
    fit = (x.W @ x.X + D - B @ x.X).square().sum() / x.X.shape[1]
    return fit + mu * x.G.diagonal().mean() * (x.W - B).square().sum()


def target(x, D, mu: float):
    return shifted(x.W, x.G, D @ x.X.mT / x.X.shape[1], mu=mu)


@law
@given(case=shifts(), step=st.floats(1e-3, 10))
def test_the_target_is_the_minimiser_of_its_objective(case, step):
    """No gradient there, and any step Δ costs exactly tr(Δ (G + λI) Δᵀ)."""
    x, D, mu = case
    B = target(x, D, mu)
    gradient = torch.func.grad(lambda B: objective(x, D, mu, B))(B)
    size = (x.W.norm() + B.norm()) * torch.linalg.matrix_norm(x.G, 2)
    assert gradient.norm() <= 1e-11 * (1 + mu) * size
    delta = step * torch.randn_like(B)
    cost = torch.trace(delta @ ridged(x.G, mu) @ delta.mT)
    rise = objective(x, D, mu, B + delta) - objective(x, D, mu, B)
    assert rise > 0
    assert abs(rise - cost) <= 1e-9 * (objective(x, D, mu, B) + cost)


@law
@given(case=shifts())
def test_where_nothing_is_missing_the_target_is_the_weight(case):
    """E = 0, whatever the inputs; with something missing it is not."""
    x, _, mu = case
    assert torch.equal(shifted(x.W, x.G, torch.zeros_like(x.W), mu=mu), x.W)
    assert not is_close(target(GENERIC, torch.randn_like(GENERIC.W @ GENERIC.X), 0.1), GENERIC.W, 1e-2)


@law
@given(case=shifts())
def test_the_dense_output_as_target_is_a_regression_on_both_inputs(case):
    """D = W (X − X'): B* = W (C + λI) (G + λI)⁻¹, C = X X'ᵀ / n; without a ridge W C G⁻¹."""
    x, D, mu = case
    C = torch.linalg.lstsq(x.W, D + x.W @ x.X).solution @ x.X.mT / x.X.shape[1]  # X up to what W does not see
    A = ridged(x.G, mu)
    eye = A - x.G  # λI
    assert is_close(target(x, D, mu), x.W @ (C + eye) @ torch.linalg.inv(A), 1e-7)
    assert is_close(target(x, D, 0.0), x.W @ C @ torch.linalg.inv(x.G), 1e-5)


@law
@given(case=shifts())
def test_the_best_rank_k_is_the_truncated_target(case):
    """Reduced-rank regression: the target cut in the metric G + λI is what stacked least squares give, and no rival is better."""
    x, D, mu = case
    n, eye = x.X.shape[1], torch.eye(len(x.G))
    root = (mu * x.G.diagonal().mean()).sqrt()
    A = torch.cat([x.X / n**0.5, root * eye], dim=1)  # (d_in, n + d_in)
    Y = torch.cat([(x.W @ x.X + D) / n**0.5, root * x.W], dim=1)
    naive = truncate(Y @ torch.linalg.pinv(A) @ A, x.k) @ torch.linalg.pinv(A)
    d = from_metric(target(x, D, mu), ridged(x.G, mu))
    answer = d.truncate(x.k).dense()
    least = objective(x, D, mu, answer)
    assert abs(objective(x, D, mu, naive) - least) <= 1e-9 * Y.square().sum()
    near = LowRank(d.U[:, : x.k] + 0.1 * torch.randn(len(x.W), x.k), d.right[: x.k]).dense()
    for rival in (near, from_metric(x.W, ridged(x.G, mu)).truncate(x.k).dense()):
        assert objective(x, D, mu, rival) >= least - 1e-9 * Y.square().sum()
    if x.k == x.m or d.s[x.k - 1] ** 2 - d.s[x.k] ** 2 > 1e-4 * d.s[0] ** 2:
        assert is_close(answer, naive, 1e-6)


def test_the_truncated_weight_is_not_the_best_where_something_is_missing():
    """Nor is the target cut in another metric."""
    x = type(GENERIC)(GENERIC.W, GENERIC.X + 0.3 * torch.randn_like(GENERIC.X), 4)
    D = GENERIC.W @ (GENERIC.X - x.X)
    B, M = target(x, D, 0.03), ridged(x.G, 0.03)
    best = objective(x, D, 0.03, from_metric(B, M).truncate(4).dense())
    for rival in (from_metric(x.W, M), from_metric(B)):
        assert objective(x, D, 0.03, rival.truncate(4).dense()) > 1.02 * best


def test_one_metric_on_the_left_is_one_on_the_right_of_the_transpose():
    """Minimising ‖N^{1/2} (W − Ŵ) M^{1/2}‖ treats both sides alike."""
    x = GENERIC
    ours, theirs = from_metrics(x.W, x.G, x.H), from_metrics(x.W.mT, x.H, x.G)
    assert is_close(ours.s, theirs.s, 1e-9)
    assert is_close(ours.truncate(4).dense(), theirs.truncate(4).dense().mT)
