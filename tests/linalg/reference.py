"""Layers with inputs of a known spectrum, and every method written out literally: slow, short, and independent of nsvd."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jaxtyping
import scipy.linalg
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from nsvd.linalg import METHODS, LowRank, Method, Moments

MATRIX = [name for name, method in METHODS.items() if isinstance(method, Method)]  # of one matrix and its inputs
law = settings(max_examples=25, deadline=None, derandomize=True)  # the same examples in every run


@dataclass(frozen=True)
class Layer:
    """A weight, its inputs (a column per token) and a rank."""

    W: Tensor
    X: Tensor
    k: int

    @property
    def m(self) -> int:
        return min(self.W.shape)

    @property
    def G(self) -> Tensor:
        return self.X @ self.X.mT / self.X.shape[1]

    @property
    def moments(self) -> Moments:
        return Moments(self.G, self.X.abs().mean(1), self.X.shape[1], self.H)

    @property
    def H(self) -> Tensor:
        """A second moment of output gradients, of condition 100: the same for all layers of as many outputs."""
        rng = torch.Generator().manual_seed(len(self.W))
        P = torch.linalg.qr(torch.randn(len(self.W), len(self.W), generator=rng, dtype=torch.float64))[0]
        return (P * 100 ** -torch.linspace(0, 1, len(self.W), dtype=torch.float64)) @ P.mT

    def loss(self, approximation: Tensor) -> float:
        """‖(W − Ŵ) X‖²_F / n."""
        return (((self.W - approximation) @ self.X).square().sum() / self.X.shape[1]).item()

    def weight_error(self, approximation: Tensor) -> float:
        """‖W − Ŵ‖²_F."""
        return (self.W - approximation).square().sum().item()

    @property
    def s(self) -> Tensor:
        """σ_i(W S), which are those of W X / √n; zeros where tokens are fewer."""
        return spectrum(self.W @ self.X / self.X.shape[1] ** 0.5, self.m)

    @property
    def optimum(self) -> float:
        """Σ_{i>k} σ_i(W S)²."""
        return self.s[self.k :].square().sum().item()

    @property
    def slack(self) -> float:
        """What rounding may do to a loss: 20 eps ‖W‖² ‖G‖, of the size of eps ‖W S‖² unless W avoids the inputs.

        G is known to eps ‖G‖, so W G Wᵀ, from which the singular vectors come, to eps ‖W‖² ‖G‖ however G is conditioned; a loss
        is the trace of a part of that matrix, and 20 allows for the number of terms.
        """
        return (
            20 * torch.finfo(torch.float64).eps * self.W.square().sum() * torch.linalg.matrix_norm(self.G, 2)
        ).item()

    def decompose(self, method: str, k: int | None = None, **options: float) -> Tensor:
        """The method's Ŵ, multiplied out, at the layer's rank unless another is given."""
        return METHODS[method](self.W, self.moments, self.k if k is None else k, **options).dense()


def layer(d_out: int, d_in: int, k: int, *, condition: float = 100.0, n: int | None = None, seed: int = 0) -> Layer:
    """Random W, and n tokens (default 3 d_in) for which the nonzero eigenvalues of G fall from 4 to 4 / condition."""
    rng = torch.Generator().manual_seed(seed)
    n = 3 * d_in if n is None else n
    W, A, B = (
        torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((d_out, d_in), (d_in, d_in), (n, d_in))
    )
    P, Q = torch.linalg.qr(A)[0], torch.linalg.qr(B)[0]
    eigenvalues = 4 * condition ** -torch.linspace(0, 1, Q.shape[1], dtype=torch.float64)
    return Layer(W, (n**0.5 * P[:, : Q.shape[1]] * eigenvalues.sqrt()) @ Q.mT, k)


@st.composite
def layers(
    draw, *, condition: float = 1e6, few_tokens: bool = False, k_from: int = 1, below_full: bool = False
) -> Layer:
    """Wide, tall, square, one-row and one-column layers; ``condition`` is the largest of G that is drawn.

    ``few_tokens``: fewer tokens than channels, so that G is singular. ``below_full``: k < min(d_out, d_in).
    """
    least = k_from + below_full
    small = draw(st.integers(least, least + 5))
    large = small + draw(st.integers(1, 6))
    shapes = [(small, large), (large, small), (large, large)] + [(1, large), (large, 1)] * (least == 1)
    d_out, d_in = draw(st.sampled_from([(d_out, d_in) for d_out, d_in in shapes if d_in > few_tokens]))
    return layer(
        d_out,
        d_in,
        draw(st.integers(k_from, min(d_out, d_in) - below_full)),
        condition=draw(st.sampled_from([c for c in (1.0, 1e2, 1e4, 1e6, 1e9, 1e12) if c <= condition])),
        n=draw(st.integers(1, d_in - 1)) if few_tokens else None,
        seed=draw(st.integers(0, 10**6)),
    )


def spectrum(A: Tensor, m: int) -> Tensor:
    """The first m singular values of A, with zeros where it has fewer."""
    return torch.cat([torch.linalg.svdvals(A), torch.zeros(m)])[:m]


def truncate(A: Tensor, k: int) -> Tensor:
    """[A]_k."""
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    return (U[:, :k] * s[:k]) @ Vh[:k]


def interpolate(R: Tensor, k: int) -> Tensor:
    """k columns of R, by pivoted QR, times the least-squares coefficients of all its columns in them."""
    C = R[:, scipy.linalg.qr(R.numpy(), pivoting=True)[2][:k].tolist()]
    return C @ torch.linalg.lstsq(C, R, driver="gelsd").solution


def square_root(method: str, x: Layer, alpha: float = 0.5, mu: float | None = None, eta: float = 0.03) -> Tensor:
    """The S of a method, as its paper builds it."""
    mu = {"kfac": 0.01}.get(method, 0.1) if mu is None else mu
    eye = torch.eye(x.W.shape[1])
    P, root, _ = torch.linalg.svd(x.X / x.X.shape[1] ** 0.5)  # G = P Λ Pᵀ, root = Λ^{1/2}
    return {
        "svd": lambda: eye,
        "asvd-0": lambda: torch.diag(x.moments.mean_abs),
        "asvd-1": lambda: torch.linalg.cholesky(x.G),
        "asvd-2": lambda: P[:, : len(root)] * root,
        "asvd-3": lambda: P * root.max(),
        "asvd": lambda: torch.diag(x.moments.mean_abs**alpha + 1e-6),
        "ridge": lambda: torch.linalg.cholesky(x.G + mu * x.G.diagonal().mean() * eye),
        "kfac": lambda: torch.linalg.cholesky(x.G + mu * x.G.diagonal().mean() * eye),
    }[method]()


def output_root(method: str, x: Layer, eta: float = 0.03, **_: float) -> Tensor:
    """What a method multiplies W by on the left: a square root of H_η, or nothing."""
    eye = torch.eye(x.W.shape[0])
    return torch.linalg.cholesky(x.H + eta * x.H.diagonal().mean() * eye).mT if method == "kfac" else eye


def naive(method: str, x: Layer, k: int, k1: int = 0, **options: float) -> Tensor:
    """Ŵ = R⁻¹ [R W S]_k S⁻¹; for a nested method that at rank k1, and the rest of the rank for its residual."""
    if METHODS[method].nest is None:
        S, R = square_root(method, x, **options), output_root(method, x, **options)
        return torch.linalg.solve(R, truncate(R @ x.W @ S, k) @ torch.linalg.pinv(S))
    outer = naive(outer_of(method), x, k1)
    return outer + (truncate if method.startswith("nsvd") else interpolate)(x.W - outer, k - k1)


def outer_of(method: str) -> str:
    """nsvd-1 → asvd-1, nid-2 → asvd-2."""
    return method if METHODS[method].nest is None else "asvd" + method[-2:]


def is_determined(method: str, x: Layer, k: int, k1: int = 0) -> bool:
    """Whether rounding leaves the answer alone to 1e-8: it is unique up to eps σ_1² / (σ_k² − σ_{k+1}²), here at most 2e-10."""

    def separated(A: Tensor, k: int) -> bool:
        s = spectrum(A, x.m + 1)
        return k in (0, x.m) or bool(s[k - 1] ** 2 - s[k] ** 2 > 1e-6 * s[0] ** 2)

    whitened = output_root(method, x) @ x.W @ square_root(outer_of(method), x)
    if METHODS[method].nest is None:
        return separated(whitened, k)
    return separated(whitened, k1) and separated(x.W - naive(outer_of(method), x, k1), k - k1)


def is_close(A: Tensor, B: Tensor, tolerance: float = 1e-8) -> bool:
    """‖A − B‖ ≤ tolerance · ‖B‖."""
    return ((A - B).norm() <= tolerance * B.norm()).item()


def random_factors(d_out: int, d_in: int, k: int) -> LowRank:
    return LowRank(torch.randn(d_out, k), torch.randn(k, d_in))


@contextmanager
def unchecked() -> Iterator[None]:
    """Annotations are not executed, so that a function's own message is seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
