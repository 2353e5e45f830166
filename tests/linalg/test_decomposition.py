"""Square roots of G, and the one decomposition that holds the answers of all ranks."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from nsvd.linalg import (
    METHODS,
    Decomposition,
    LowRank,
    NumericalWarning,
    Oblique,
    Orthogonal,
    cholesky,
    decompose,
    from_metric,
    from_whitener,
    scaled_rotation,
    spectral,
)
from nsvd.linalg.asvd import ridged
from nsvd.linalg.decomposition import leading
from nsvd.linalg.nsvd import nid, nsvd
from nsvd.linalg.whiteners import Diagonal
from tests.linalg.reference import MATRIX, is_close, law, layer, layers, naive, spectrum, truncate

OUTER = [name for name in MATRIX if METHODS[name].nest is None]


@pytest.mark.parametrize("whiten", [cholesky, spectral, lambda G: Diagonal(G.diagonal())])
@law
@given(x=layers())
def test_a_whitener_applies_and_undoes(whiten, x):
    """W S S⁻¹ = W S⁻¹ S = W."""
    S = whiten(x.G)
    assert is_close(S.undo(S.apply(x.W)), x.W)
    assert is_close(S.apply(S.undo(x.W)), x.W)


@pytest.mark.parametrize("whiten", [cholesky, spectral])
@law
@given(x=layers(condition=1e12))
def test_a_whitener_is_a_square_root_of_the_second_moment(whiten, x):
    """S Sᵀ = G, so ‖W S‖ = ‖W X‖ / √n; the scaled rotation has S Sᵀ = γ² I instead, γ² the largest eigenvalue."""
    eye = torch.eye(len(x.G))
    S = whiten(x.G).apply(eye)
    assert is_close(S @ S.mT, x.G, 1e-12)
    R = scaled_rotation(x.G).apply(eye)
    assert is_close(R @ R.mT, torch.linalg.matrix_norm(x.G, 2) * eye, 1e-12)


def test_the_scaled_rotation_is_no_square_root_of_the_second_moment():
    """ASVD-III's S forgets all eigenvalues but the largest."""
    x = layer(5, 6, 3)
    R = scaled_rotation(x.G).apply(torch.eye(6))
    assert not is_close(R @ R.mT, x.G, 0.1)


@law
@given(x=layers(condition=1e4, few_tokens=True))
def test_a_singular_square_root_is_undone_on_the_seen_directions_only(x):
    """S Sᵀ = G, and W S S⁺ = W Π, Π the projection on the columns of X."""
    S = spectral(x.G)
    Pi = x.X @ torch.linalg.pinv(x.X)
    root = S.apply(torch.eye(len(x.G)))
    assert is_close(root @ root.mT, x.G, 1e-12)
    assert is_close(S.undo(S.apply(x.W)), x.W @ Pi)
    assert not is_close(Pi, torch.eye(len(Pi)), 1e-3)


def test_cholesky_raises_where_the_second_moment_is_singular():
    """Five tokens, nine channels: no Cholesky factor, unless jitter is asked for, which warns and is exactly what it says."""
    G = layer(7, 9, 4, n=5).G
    with pytest.raises(torch.linalg.LinAlgError):
        cholesky(G - 1e-15 * torch.eye(9))  # whatever sign rounding gave the zero eigenvalues
    with pytest.warns(NumericalWarning, match="to the diagonal of G"):
        L = cholesky(G, jitter=1e-3).L
    assert is_close(L @ L.mT, G + 1e-3 * G.diagonal().mean() * torch.eye(9))


def test_cholesky_without_jitter_is_silent_and_exact():
    """The tests' configuration turns a warning into an error; none comes here."""
    G = layer(7, 9, 4).G
    L = cholesky(G).L
    assert is_close(L @ L.mT, G, 1e-14)
    assert torch.equal(L, L.tril())


@pytest.mark.parametrize("factor", [cholesky, spectral, scaled_rotation, lambda G: from_metric(torch.eye(len(G)), G)])
def test_a_metric_that_is_not_semidefinite_raises(factor):
    """An eigenvalue of −1e-3 is no rounding of zero."""
    P = torch.linalg.qr(torch.randn(6, 6))[0]
    with pytest.raises(torch.linalg.LinAlgError):
        factor((P * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1e-3])) @ P.mT)


@law
@given(x=layers(condition=1e12))
def test_the_answer_is_a_projection_of_the_outputs(x):
    """Ŵ = U_k U_kᵀ W with orthonormal U, whatever the metric; s are the singular values of W S."""
    for M in (None, x.moments.mean_abs, x.G):
        d = from_metric(x.W, M)
        U = d.U[:, : x.k]
        assert is_close(d.U.mT @ d.U, torch.eye(x.m), 1e-12)
        assert is_close(d.truncate(x.k).dense(), U @ U.mT @ x.W, 1e-12)
    # squared, since that is what the eigenvalues of W G Wᵀ are known to eps of
    assert (d.s**2 - x.s**2).abs().max() <= x.slack
    assert (d.s.diff() <= 0).all()


@law
@given(x=layers())
def test_a_vector_is_a_diagonal_metric(x):
    """``from_metric(W, v)`` = ``from_metric(W, diag(v))``, and no metric is the identity."""
    v = x.moments.mean_abs
    assert torch.allclose(from_metric(x.W, v).s, from_metric(x.W, torch.diag(v)).s, atol=1e-7 * x.W.norm())
    assert torch.equal(from_metric(x.W).s, from_metric(x.W, torch.ones_like(v)).s)
    assert torch.allclose(from_metric(x.W).s, spectrum(x.W, x.m))


@pytest.mark.parametrize("method", OUTER)
def test_one_decomposition_holds_all_ranks(method):
    """truncate(k) is the naive answer at every k, from the zero matrix to W."""
    for shape in ((6, 8), (8, 6)):
        x = layer(*shape, 0)
        d = METHODS[method].prepare(x.W, x.moments)
        assert torch.equal(d.truncate(0).dense(), torch.zeros(shape))
        assert is_close(d.truncate(6).dense(), x.W)
        assert all(is_close(d.truncate(k).dense(), naive(method, x, k)) for k in range(1, 7))


@pytest.mark.parametrize("method", OUTER)
@pytest.mark.parametrize("few_tokens", [False, True])
@law
@given(data=layers().flatmap(lambda x: layers(few_tokens=True).map(lambda y: (x, y))))
def test_the_residual_is_what_truncation_left(method, few_tokens, data):
    """residual(k) = W − truncate(k), also where the pseudo-inverse removed directions; on orthonormal columns, but for kfac."""
    x = data[few_tokens]
    d = METHODS[method].prepare(x.W, x.moments)
    for k in range(x.m + 1):
        residual = d.residual(k)
        assert (residual.dense() - (x.W - d.truncate(k).dense())).norm() <= 1e-10 * x.W.norm()
        orthonormal = torch.allclose(residual.left.mT @ residual.left, torch.eye(residual.rank), atol=1e-12)
        assert orthonormal or METHODS[method].needs_gradients


def keeps_its_promise(d: Decomposition, x) -> bool:
    """Whether d is what its class says of it; the output metric is that of ``kfac`` with its own ridge."""
    N = ridged(x.H, METHODS["kfac"].options["eta"]) if isinstance(d, Oblique) else torch.eye(len(x.W))
    metric = d.U.mT @ N @ d.U
    size = metric.diagonal()
    return (
        is_close(d.U @ d.coords, x.W, 1e-10)
        and is_close(d.U.norm(dim=0), torch.ones(x.m), 1e-12)
        and is_close(metric, torch.diag(size), 1e-9)
        and is_close(d.coords, d.U.mT @ N @ x.W / size[:, None], 1e-9)
    )


@pytest.mark.parametrize("method", OUTER)
@pytest.mark.parametrize("few_tokens", [False, True])
@law
@given(data=layers().flatmap(lambda x: layers(few_tokens=True).map(lambda y: (x, y))))
def test_a_decomposition_is_what_its_class_promises(method, few_tokens, data):
    """W = U · coords with unit columns: orthonormal and coords = Uᵀ W, or the same in the metric of the outputs."""
    x = data[few_tokens]
    d = METHODS[method].prepare(x.W, x.moments)
    assert type(d) is (Oblique if METHODS[method].needs_gradients else Orthogonal)
    assert keeps_its_promise(d, x)
    assert type(d.to(torch.float32)) is type(d)


def test_a_decomposition_of_the_other_class_breaks_the_promise():
    """Fields of K-FAC are not orthogonal, and those of ASVD-I are not oblique; nor is a matrix decomposed that W is not."""
    x = layer(6, 8, 3)
    kfac, asvd = (METHODS[method].prepare(x.W, x.moments) for method in ("kfac", "asvd-1"))
    assert not keeps_its_promise(Orthogonal(**vars(kfac)), x)
    assert not keeps_its_promise(Oblique(**vars(asvd)), x)
    assert not keeps_its_promise(METHODS["asvd-1"].prepare(1.01 * x.W, x.moments), x)


@pytest.mark.parametrize("nested", [nsvd, nid])
def test_an_inner_step_takes_orthonormal_columns_only(nested):
    """On the oblique columns of K-FAC the leading terms of the residual would not be its best approximation."""
    x = layer(6, 8, 3)
    assert nested(METHODS["asvd-1"].prepare(x.W, x.moments), 3, k1=0.5).rank == 3
    with pytest.raises(TypeCheckError):
        nested(METHODS["kfac"].prepare(x.W, x.moments), 3, k1=0.5)


@pytest.mark.parametrize("k", [-1, 7])
def test_a_rank_out_of_range_is_refused(k):
    """0 … min(d_out, d_in); the message says so."""
    with pytest.raises(ValueError, match=f"rank {k} of a 8 × 6 matrix: expected 0 to 6"):
        from_metric(torch.ones(8, 6)).truncate(k)


@law
@given(x=layers())
def test_the_route_through_a_whitener_is_the_route_through_the_metric(x):
    """[W S]_k S⁻¹ = U_k U_kᵀ W: equal losses, and equal coordinates of W at full rank."""
    for S in (cholesky(x.G), spectral(x.G)):
        d = from_whitener(x.W, S)
        assert abs(x.loss(d.truncate(x.k).dense()) - x.loss(from_metric(x.W, x.G).truncate(x.k).dense())) <= x.slack
        assert is_close(d.truncate(x.m).dense(), x.W)
        assert is_close(d.U @ d.coords, x.W, 1e-12)


@law
@given(x=layers(condition=1e2, few_tokens=True))
def test_a_singular_metric_is_answered_as_by_a_vanishing_ridge(x):
    """Also beyond the rank of W M Wᵀ, where the metric itself leaves the order of the directions open."""
    size = x.W.square().sum()
    eigenvalues = torch.cat([x.s[: x.X.shape[1]] ** 2, torch.zeros(1)])
    assume(eigenvalues.diff().abs().min() > 1e-4 * size)  # far above what the ridge adds, 1e-9, so that it is small
    ridge, plain = from_metric(x.W, x.G + 1e-9 * torch.eye(len(x.G))), from_metric(x.W, x.G)
    for k in range(x.m + 1):
        assert abs(x.weight_error(ridge.truncate(k).dense()) - x.weight_error(plain.truncate(k).dense())) <= 1e-4 * size


def test_a_metric_that_sees_nothing_is_answered_by_the_plain_svd():
    """M = 0 is the far end of that limit."""
    x = layer(6, 8, 3)
    assert is_close(from_metric(x.W, torch.zeros(8, 8)).truncate(3).dense(), naive("svd", x, 3))


def test_a_cast_keeps_what_is_shared():
    """``coords`` and ``right`` are one tensor for a metric, two for a whitener, also after ``to``."""
    x = layer(6, 8, 3)
    metric, whitener = from_metric(x.W, x.G), from_whitener(x.W, spectral(x.G))
    for d, shared in ((metric, True), (whitener, False)):
        cast = d.to(torch.float32)
        assert (cast.right is cast.coords) == (d.right is d.coords) == shared
        assert cast.truncate(3).dense().dtype == cast.s.dtype == torch.float32


@pytest.mark.parametrize("method", OUTER)
@pytest.mark.parametrize("few_tokens", [False, True])
@law
@given(data=layers().flatmap(lambda x: layers(few_tokens=True).map(lambda y: (x, y))), k=st.integers(0, 12))
def test_fewer_terms_are_the_first_of_all_terms(method, few_tokens, data, k):
    """The same singular values, one and all, the same subspaces and the same matrices at every rank up to k; no others."""
    x = data[few_tokens]
    k = min(k, x.m)
    all_terms, some = METHODS[method].prepare(x.W, x.moments), METHODS[method].prepare(x.W, x.moments, k=k)
    assert some.U.shape == (len(x.W), k)
    assert len(some.s) == x.m
    assert (some.s.square() - all_terms.s.square()).abs().max() <= 1e3 * x.slack
    for j in range(k + 1):
        assert is_close(some.truncate(j).dense(), all_terms.truncate(j).dense(), 1e-12)
    if k < x.m:
        with pytest.raises(
            ValueError, match=f"rank {k + 1} of a decomposition that was asked for no more than {k} term"
        ):
            some.truncate(k + 1)
        with pytest.raises(ValueError, match="was asked for no more than"):
            some.residual(k)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (10, 10)])
def test_ties_leave_the_loss_what_it_is(shape):
    """W of equal singular values and white inputs: any subspace is a best one, and all terms or some lose the same."""
    x = layer(*shape, 4, condition=1.0)
    x = type(x)(torch.linalg.qr(torch.randn(max(shape), min(shape)))[0].reshape(shape), x.X, 4)
    for method in ("svd", "asvd-1"):
        all_terms, some = METHODS[method].prepare(x.W, x.moments), METHODS[method].prepare(x.W, x.moments, k=4)
        losses = [x.loss(d.truncate(4).dense()) for d in (all_terms, some)]
        assert all(abs(loss - x.optimum) <= 1e-12 * x.loss(0 * x.W) for loss in losses)
        assert x.loss(some.truncate(3).dense()) > 1.1 * x.optimum  # one less is not enough


@pytest.mark.parametrize("method", OUTER)
def test_singular_values_alone_need_no_vectors(method, monkeypatch):
    """With k = 0 neither eigenvectors nor singular vectors of W S are made, and there is no rank but 0."""
    x = layer(6, 8, 3)
    wanted = METHODS[method].prepare(x.W, x.moments).s
    if method not in ("asvd-2", "asvd-3"):  # their S is an eigenbasis of G
        monkeypatch.setattr(torch.linalg, "eigh", None)
    monkeypatch.setattr(torch.linalg, "svd", None)
    alone = METHODS[method].prepare(x.W, x.moments, k=0)
    assert is_close(alone.s, wanted, 1e-9)
    assert torch.equal(alone.truncate(0).dense(), torch.zeros(6, 8))
    with pytest.raises(TypeError):
        METHODS[method].prepare(x.W, x.moments, k=1)


@pytest.mark.parametrize("shape", [(40, 50), (50, 40)])
def test_a_few_terms_are_made_without_the_others(shape, monkeypatch):
    """Of 40 four: the same matrix, orthonormal columns, and an indefinite metric is refused as well; five are not few."""
    x = layer(*shape, 4)
    all_terms = from_metric(x.W, x.G)
    wrong = torch.ones(shape[1])
    wrong[3] = -1e-3
    monkeypatch.setattr(torch.linalg, "eigh", None)
    some = from_metric(x.W, x.G, 4)
    assert is_close(some.truncate(4).dense(), all_terms.truncate(4).dense(), 1e-9)
    assert is_close(some.U.mT @ some.U, torch.eye(4), 1e-12)
    assert is_close(some.s, all_terms.s, 1e-9)
    with pytest.raises(torch.linalg.LinAlgError, match="W M Wᵀ is not positive semidefinite"):
        from_metric(torch.eye(*shape), wrong, 4)
    assert from_metric(torch.eye(*shape), wrong.abs(), 4).s.isfinite().all()
    with pytest.raises(TypeError):
        from_metric(x.W, x.G, 5)


def test_a_few_terms_of_a_matrix_of_lower_rank():
    """Rank 2, or zero, and four of 40 terms asked for: W comes back, and the rest is orthonormal."""
    x = layer(40, 50, 4)
    for r in (0, 2):
        W = torch.randn(40, r) @ torch.randn(r, 50)
        for M in (None, x.G, torch.zeros(50, 50)):
            some = from_metric(W, M, 4)
            assert (some.truncate(4).dense() - W).norm() <= 1e-12 * (1 + W.norm())
            assert is_close(some.U.mT @ some.U, torch.eye(4), 1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [0, 1, 4, 5, 40])
def test_the_leading_part_is_the_truncated_svd_whichever_way_it_is_found(k, tied, monkeypatch):
    """Few vectors are found without the others (4 of 40), many with them (5): the same error, on orthonormal columns."""
    rows = torch.linalg.qr(torch.randn(60, 40))[0].mT
    residual = LowRank(
        torch.linalg.qr(torch.randn(50, 40))[0], rows if tied else torch.logspace(0, -2, 40)[:, None] * rows
    )
    whole = residual.dense()
    if 0 < k <= 4:
        monkeypatch.setattr(torch.linalg, "eigh", None)
    value = leading(residual, k)
    least = spectrum(whole, 40)[k:].square().sum()
    assert abs((whole - value.dense()).square().sum() - least) <= 1e-12 * whole.square().sum()
    assert is_close(value.left.mT @ value.left, torch.eye(k), 1e-12)
    assert tied or is_close(value.dense(), truncate(whole, k), 1e-10)
    assert k in (0, 40) or (whole - value.dense()[:, torch.randperm(60)]).square().sum() > 1.01 * least


@pytest.mark.parametrize("k", [-1, 7])
def test_no_more_terms_can_be_asked_for_than_there_are(k):
    """As of a rank."""
    for refused in (lambda: from_metric(torch.ones(8, 6), k=k), lambda: METHODS["svd"](torch.ones(8, 6), None, k)):
        with pytest.raises(ValueError, match=f"rank {k} of a 8 × 6 matrix: expected 0 to 6"):
            refused()


def test_a_ridge_leaves_the_moment_as_it_was():
    """G + μ mean(diag G) I beside G, not in its place."""
    G = layer(6, 8, 3).G
    before = G.clone()
    assert torch.equal(ridged(G, 0.5), before + 0.5 * before.diagonal().mean() * torch.eye(8))
    assert torch.equal(G, before)


def test_a_weight_that_learns_has_few_terms_as_well():
    """With a graph or without: the same numbers, and a gradient where one is asked for."""
    W, G = torch.nn.Parameter(torch.randn(40, 24, dtype=torch.float64)), torch.eye(24, dtype=torch.float64)
    value = decompose(W, G, method="asvd-1", k=2).dense()
    torch.testing.assert_close(value, decompose(W.detach(), G, method="asvd-1", k=2).dense())
    value.square().sum().backward()
    assert W.grad.isfinite().all()
