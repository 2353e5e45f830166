"""Every method by its name is the formula of its paper, and refuses what it cannot answer."""

import math
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nsvd.linalg import METHODS, by_name, decompose
from nsvd.linalg.asvd import oas
from tests.linalg.reference import MATRIX, is_close, is_determined, law, layer, layers, naive, unchecked

NESTED = [name for name in MATRIX if METHODS[name].nest is not None]
OPTIONS = {name: {"k1": 0.5} if name in NESTED else {} for name in MATRIX}


@pytest.mark.parametrize("method", MATRIX)
@law
@given(data=st.data())
def test_every_method_is_the_formula_of_its_paper(method, data):
    """Ŵ = [W S]_k S⁻¹ with the method's S, kfac's with another root on the left; nested, k1 of that and k2 of the residual."""
    x = data.draw(layers(k_from=2 if method in NESTED else 1))
    k1 = data.draw(st.integers(1, x.k - 1)) if method in NESTED else 0
    assume(is_determined(method, x, x.k, k1))
    answer = x.decompose(method, **({"k1": k1 / x.k} if method in NESTED else {}))
    assert is_close(answer, naive(method, x, x.k, k1))


@pytest.mark.parametrize("method", ["asvd-2", "nsvd-2", "nid-2"])
@law
@given(data=st.data())
def test_the_pseudo_inverse_answers_for_fewer_tokens_than_channels(method, data):
    """S = P Λ^{1/2} is undone by its pseudo-inverse, where Cholesky's factor does not exist."""
    x = data.draw(layers(condition=1e4, few_tokens=True, k_from=2))
    k1 = data.draw(st.integers(1, x.k - 1)) if method in NESTED else 0
    assume(is_determined(method, x, x.k, k1))
    answer = x.decompose(method, **({"k1": k1 / x.k} if method in NESTED else {}))
    assert is_close(answer, naive(method, x, x.k, k1))


@pytest.mark.parametrize(
    ("method", "options"),
    [("asvd", {"alpha": 0.25}), ("ridge", {"mu": 3.0}), ("kfac", {"mu": 3.0}), ("kfac", {"eta": 3.0})],
)
def test_an_option_is_the_parameter_of_the_formula(method, options):
    """α of ASVD, μ of the ridge, μ and η of kfac reach the roots, and matter."""
    x = layer(9, 11, 4)
    answer = x.decompose(method, **options)
    assert is_close(answer, naive(method, x, 4, **options))
    assert not is_close(answer, x.decompose(method), 1e-3)


@pytest.mark.parametrize("method", MATRIX)
def test_one_decomposition_serves_every_rank(method):
    """Cutting one preparation at rank k is the method at rank k."""
    x = layer(7, 9, 0)
    prepared = METHODS[method].prepare(x.W, x.moments, **OPTIONS[method])
    for k in range(2, 8):
        cut = METHODS[method].cut(prepared, k, **OPTIONS[method])
        assert cut.rank == k
        assert is_close(cut.dense(), naive(method, x, k, round(k / 2) if method in NESTED else 0))


@pytest.mark.parametrize("method", NESTED)
def test_a_nested_method_shares_the_preparation_of_its_outer_one(method):
    """What ASVD prepared, NSVD and NID of the same number cut; ASVD-I and ASVD-II do not share on singular G."""
    x = layer(7, 9, 4, n=5)
    own, other = ("asvd-1", "asvd-2") if method.endswith("1") else ("asvd-2", "asvd-1")
    cuts = [METHODS[method].cut(METHODS[outer].prepare(x.W, x.moments), 4, k1=0.5).dense() for outer in (own, other)]
    assert torch.equal(cuts[0], x.decompose(method, k1=0.5))
    assert not is_close(cuts[1], cuts[0], 1e-3)


@pytest.mark.parametrize("method", MATRIX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_computed_in_float64_and_comes_back_in_the_weight_s_dtype(method, dtype):
    """One cast, at the border; at G of condition 1e6 the arithmetic of float32 would show."""
    x = layer(7, 9, 4, condition=1e6)
    W, moments = x.W.to(dtype), {"mean_abs": x.moments.mean_abs, "H": x.H, **OPTIONS[method]}
    cast, exact = (decompose(V, x.G, method=method, k=4, **moments) for V in (W, W.double()))
    assert cast.left.dtype == cast.right.dtype == dtype
    assert exact.left.dtype == torch.float64
    assert torch.equal(
        decompose(x.W, x.G, method=method, k=4, **moments).dense(), x.decompose(method, **OPTIONS[method])
    )
    assert torch.equal(cast.left, exact.left.to(dtype))
    assert torch.equal(cast.right, exact.right.to(dtype))


def test_svd_needs_no_moments_and_ignores_them():
    """Plain SVD looks at W only; every other method needs G."""
    x = layer(7, 9, 4)
    assert torch.equal(decompose(x.W, method="svd", k=4).dense(), decompose(x.W, x.G, method="svd", k=4).dense())
    assert [name for name in METHODS if not by_name(name).needs_moments] == ["svd"]


W, G = torch.ones(4, 6), torch.eye(6)
NAN = torch.tensor([float("nan")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "nsvd-3"}, "unknown method 'nsvd-3'; the methods are svd, asvd-0"),
        ({"method": "svd", "k1": 0.5}, r"SVD has no option k1 \(its options: none\)"),
        ({"alpha": 0.5, "mu": 1.0}, r"NSVD-I has no option alpha, mu \(its options: k1\)"),
        ({"method": "asvd-1", "k1": 0.5}, "ASVD-I has no option k1"),
        ({"W": W * NAN}, "W holds NaN or Inf"),
        ({"G": G / 0}, "G holds NaN or Inf"),
        ({"mean_abs": G[0] * NAN}, "mean_abs holds NaN or Inf"),
        ({"G": torch.eye(5)}, r"G is \(5, 5\), but W has 6 input channels"),
        ({"G": torch.ones(6, 4)}, r"G is \(6, 4\), but W has 6 input channels"),
        ({"mean_abs": torch.ones(4)}, r"mean_abs is \(4,\), but W has 6 input channels"),
        ({"H": torch.eye(6)}, r"H is \(6, 6\), but W has 4 output channels"),
        ({"H": torch.ones(4, 6)}, r"H is \(4, 6\), but W has 4 output channels"),
        ({"H": torch.ones(4) * NAN}, "H holds NaN or Inf"),
        ({"method": "kfac"}, r"needs H, from fisher\(\)"),
        ({"method": "kfac", "H": torch.eye(4), "mu": -1.0}, "mu is -1.0, but a ridge is not negative"),
        ({"method": "kfac", "H": torch.eye(4), "eta": -1.0}, "eta is -1.0, but a ridge is not negative"),
        ({"method": "kfac", "G": None}, "needs the second moment G"),
        ({"G": None}, "NSVD-I needs the second moment G"),
        ({"method": "asvd-0"}, "pass mean_abs beside G"),
        ({"method": "asvd"}, "pass mean_abs beside G"),
        ({"method": "ridge", "mu": -0.1}, "mu is -0.1, but a ridge is not negative"),
        ({"k1": 1.5}, r"k1 is 1.5, but it is the fraction .* in \[0, 1\]"),
        ({"k1": 0.95}, "k1 = 0.95 of rank 2 rounds k2 to 0"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(change, message):
    """No silent rescue: a ``ValueError`` says what was wrong."""
    arguments = {"W": W, "G": G, "k": 2, "k1": 0.5} | change
    if "method" in change or "alpha" in change:
        arguments = {name: value for name, value in arguments.items() if name != "k1" or "k1" in change}
    with unchecked(), pytest.raises(ValueError, match=message):
        decompose(arguments.pop("W"), arguments.pop("G"), **arguments)


OUTSIDE = {
    "k1": (-0.1, 1.1),
    "alpha": (-1000.0, -0.1, 2.1),
    "mu": (-1.0,),
    "eta": (-1.0,),
    "prime": (-0.1, 1.0),
    "grid": (0, 1.5),
    "floor": (-0.1, 1.1),
    "keep_outer": (-1, 0.5),
    "compress_v": (1, "yes"),
    "o_from": (-0.1, 1.1),
    "inner": (3, None),
}


@pytest.mark.parametrize("method", METHODS)
def test_no_option_takes_a_value_that_is_not_finite_or_out_of_range(method):
    """All options of all methods, in one table; a number is no text, and True no number."""
    options = METHODS[method].resolve({})
    for name in options:
        for value in (math.nan, math.inf, -math.inf, "much", *([True] if name != "compress_v" else []), *OUTSIDE[name]):
            if name == "inner" and value == "much":
                continue
            with pytest.raises(ValueError, match=rf"^{name} is {re.escape(str(value))}, but"):
                METHODS[method].resolve({name: value})
    assert METHODS[method].resolve(options) == options


@pytest.mark.parametrize("method", MATRIX)
def test_factors_can_be_saved_as_they_are(method, tmp_path):
    """Each is a tensor of its own, its rows one after the other."""
    x = layer(7, 9, 4)
    found = decompose(x.W, x.G, method=method, k=4, mean_abs=x.moments.mean_abs, H=x.H, **OPTIONS[method])
    save_file({"left": found.left, "right": found.right}, tmp_path / "factors.safetensors")
    assert load_file(tmp_path / "factors.safetensors")["left"].equal(found.left)
    assert all(f.is_contiguous() and f.untyped_storage().nbytes() == 8 * f.numel() for f in (found.left, found.right))


@pytest.mark.parametrize("method", MATRIX)
@pytest.mark.parametrize("k", [-1, 8, 14])
def test_a_rank_that_no_approximation_has_is_refused(method, k):
    """k lies in 0 … min(d_out, d_in); for nested methods the whole k counts, not k1."""
    x = layer(7, 9, k)
    with pytest.raises(ValueError, match=f"rank {k} of a 7 × 9 matrix: expected 0 to 7"):
        x.decompose(method, **OPTIONS[method])


@pytest.mark.parametrize("method", [name for name in MATRIX if name not in ("svd", "asvd-0", "asvd")])
def test_a_second_moment_that_is_not_semidefinite_is_refused(method):
    """A clearly negative eigenvalue raises; one of the size of rounding does not."""
    x = layer(9, 9, 4)
    flipped = torch.diag(torch.tensor([-1.0] + [1.0] * 8))
    with pytest.raises(torch.linalg.LinAlgError, match="not positive semidefinite"):
        decompose(x.W, flipped, method=method, k=4, H=x.H, **OPTIONS[method])
    flipped[0, 0] = -1e-15
    assert decompose(x.W, flipped, method=method, k=4, H=x.H, **OPTIONS[method]).dense().isfinite().all()


def test_shrinkage_asks_for_the_ridge_that_sampling_noise_needs():
    """Over many draws the shrunk moment is nearer to the truth than the sampled one, and a tenth or ten times its μ is worse."""
    truth, n = torch.diag(torch.logspace(0, -1, 20)), 15
    errors = dict.fromkeys((0.0, 0.1, 1.0, 10.0), 0.0)
    for _ in range(50):
        X = truth.sqrt() @ torch.randn(20, n)
        G = X @ X.mT / n
        for factor in errors:
            mu = factor * oas(G, n)
            shrunk = (G + mu * G.diagonal().mean() * torch.eye(20)) / (1 + mu)
            errors[factor] += (shrunk - truth).square().sum().item()
    assert errors[1.0] == min(errors.values())


def test_shrinkage_fades_with_the_number_of_tokens():
    """As 1 / n; a moment that differs from the identity by no more than noise is all noise."""
    G = layer(9, 11, 4).G
    assert oas(G, 10**6) == pytest.approx(oas(G, 10**3) / 1000, rel=0.05)
    assert oas(torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.1])), 3) == math.inf


def test_a_multiple_of_the_identity_is_shrunk_wholly():
    """The limit ρ = 1 where the estimate and its target are one; so with a single channel, and with nothing but zeros."""
    for G in (torch.eye(5), 7 * torch.eye(5), torch.eye(1), torch.zeros(3, 3)):
        assert oas(G, 100) == math.inf
    assert oas(torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 9.0])), 100) < 1
