"""Every method by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from nsvd.linalg import asvd as family
from nsvd.linalg.decomposition import Decomposition
from nsvd.linalg.factors import LowRank, least_rank
from nsvd.linalg.kfac import kfac
from nsvd.linalg.moments import Moments
from nsvd.linalg.nsvd import nid, nsvd
from nsvd.linalg.options import checked
from nsvd.linalg.precision import double
from nsvd.linalg.sola import PUBLISHED


@dataclass(frozen=True)
class Method:
    """A rank-k approximation in two steps: ``prepare`` once for all ranks, or all that are wanted, ``cut`` for each rank.

    Calling it does both. ``options`` are the method's own parameters with their defaults; k1 belongs to ``cut``, the
    others to ``prepare``. Methods with the same ``outer`` and options share one preparation.
    """

    label: str  # the papers' spelling
    outer: Callable[..., Decomposition]
    nest: Callable[..., LowRank] | None = None
    options: dict[str, float | str] = field(default_factory=dict)

    @property
    def needs_moments(self) -> bool:
        """Whether the outer step looks at the inputs at all."""
        return self.outer is not family.svd

    @property
    def needs_gradients(self) -> bool:
        """Whether the outer step weighs the outputs by the loss (``Moments.H``)."""
        return self.outer is kfac

    def resolve(self, options: dict) -> dict:
        """All options, the given ones in place of the defaults; raises ``ValueError`` for one it has not, or out of range."""
        return _resolved(self.label, self.options, options)

    def outer_step(self, options: dict) -> dict:
        """The outer step and its options: methods that agree in them share one preparation."""
        return {"step": self.outer.__name__} | {n: v for n, v in self.resolve(options).items() if n != "k1"}

    def least_rank(self, options: dict) -> int:
        """The smallest rank with these options: 1, or what k1 leaves two steps of."""
        chosen = self.resolve(options)
        return least_rank(chosen["k1"]) if "k1" in chosen else 1

    def prepare(
        self, W: Float[Tensor, "d_out d_in"], moments: Moments | None, *, k: int | None = None, **options
    ) -> Decomposition:
        """The outer step, to be cut at every rank, or up to ``k``; with k = 0 no more than its singular values.

        An inner step looks at all that the outer one leaves, so where there is one all terms are made for any k but 0.
        """
        chosen = self.resolve(options)
        terms = k if k == 0 or chosen.get("k1", 1) == 1 else None
        return self.outer(W, moments, k=terms, **{name: value for name, value in chosen.items() if name != "k1"})

    def cut(self, prepared: Decomposition, k: int, **options) -> LowRank:
        """The rank-k answer."""
        if self.nest is None:
            self.resolve(options)
            return prepared.truncate(k)
        return self.nest(prepared, k, k1=self.resolve(options)["k1"])

    def __call__(self, W: Float[Tensor, "d_out d_in"], moments: Moments | None, k: int, **options) -> LowRank:
        return self.cut(self.prepare(W, moments, k=k, **options), k, **options)


@dataclass(frozen=True)
class SplitMethod:
    """A way to divide a model: it splits the feed-forwards, and leaves the blocks it factors to an ``inner`` method.

    It is no ``Method``: there is nothing it could do with a single matrix. Its options are its own and those of the inner
    method. ``nsvd.compression.sola`` carries it out.
    """

    label: str  # the paper's spelling
    options: dict[str, float | str]
    needs_moments = True  # the mean absolute values of the neurons
    needs_gradients = False  # but the inner method may

    def inner(self, options: dict) -> tuple[Method, dict]:
        """The method of the blocks, and its part of the options; raises ``ValueError`` if it is no method of matrices."""
        name = str(checked("inner", options.get("inner", self.options["inner"])))
        chosen = by_name(name)
        if not isinstance(chosen, Method):
            raise ValueError(f"inner is {name!r}, but it has to be a method of single matrices")
        return chosen, {name: value for name, value in options.items() if name not in self.options}

    def resolve(self, options: dict) -> dict:
        """All options, also those of the inner method; raises ``ValueError`` as ``Method.resolve``."""
        return _resolved(self.label, self.options | self.inner(options)[0].options, options)

    def outer_step(self, options: dict) -> dict:
        """That of the inner method, and what decides on the blocks."""
        (inner, rest), chosen = self.inner(options), self.resolve(options)
        return inner.outer_step(rest) | {name: chosen[name] for name in ("prime", "keep_outer", "compress_v")}


def _resolved(label: str, known: dict, options: dict) -> dict:
    unknown = set(options) - set(known)
    if unknown:
        names = ", ".join(known) or "none"
        raise ValueError(f"{label} has no option {', '.join(sorted(unknown))} (its options: {names})")
    return known | {name: checked(name, value) for name, value in options.items()}


METHODS: dict[str, Method | SplitMethod] = {
    "svd": Method("SVD", family.svd),
    "asvd-0": Method("ASVD-0", family.asvd_0),
    "asvd-1": Method("ASVD-I", family.asvd_1),
    "asvd-2": Method("ASVD-II", family.asvd_2),
    "asvd-3": Method("ASVD-III", family.asvd_3),
    "nsvd-1": Method("NSVD-I", family.asvd_1, nsvd, {"k1": 0.95}),
    "nsvd-2": Method("NSVD-II", family.asvd_2, nsvd, {"k1": 0.95}),
    "nid-1": Method("NID-I", family.asvd_1, nid, {"k1": 0.95}),
    "nid-2": Method("NID-II", family.asvd_2, nid, {"k1": 0.95}),
    "asvd": Method("ASVD", family.asvd, None, {"alpha": 0.5}),
    "ridge": Method("Ridge", family.ridge, None, {"mu": 0.1}),
    "kfac": Method("K-FAC", kfac, None, {"mu": 0.01, "eta": 0.03}),
    "sola": SplitMethod("SoLA", PUBLISHED),
}


def by_name(name: str) -> Method | SplitMethod:
    """The method of that name; raises ``ValueError`` with the known names."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    return METHODS[name]


def matrix_method(name: str) -> Method:
    """The method of matrices of that name; raises ``ValueError`` for an unknown one, or one that divides a model."""
    chosen = by_name(name)
    if not isinstance(chosen, Method):
        raise ValueError(
            f"{chosen.label} splits the feed-forwards of a model and has no answer for a single matrix: "
            f"give the model to compress_, or take a method of matrices such as {chosen.options['inner']}"
        )
    return chosen


def decompose(
    W: Float[Tensor, "d_out d_in"],
    G: Float[Tensor, "d_in d_in"] | None = None,
    *,
    method: str = "nsvd-1",
    k: int,
    mean_abs: Float[Tensor, " d_in"] | None = None,
    H: Float[Tensor, "d_out ..."] | None = None,
    **options: float | str,
) -> LowRank:
    """Rank-k factors of W by a named method, computed in float64 and returned in W's dtype.

    Args:
        W: the weight, (d_out, d_in).
        G: second moment of the inputs, (d_in, d_in); only ``svd`` works without.
        method: a name of ``METHODS``.
        k: rank of the result.
        mean_abs: mean absolute value of each input channel, (d_in,), for ``asvd-0`` and ``asvd``.
        H: second moment of the loss's gradient with respect to the outputs, (d_out, d_out) or its diagonal, for ``kfac``.
        options: the method's own (``k1``, ``alpha``, ``mu``, ``eta``).

    Raises:
        ValueError: unknown method or option, wrong shape, rank out of range, NaN or Inf in W, G, mean_abs or H.
        torch.linalg.LinAlgError: G is clearly not positive semidefinite.
    """
    chosen = matrix_method(method)
    check_finite("W", W)
    if G is None and chosen.needs_moments:
        raise ValueError(f"{chosen.label} needs the second moment G of the inputs")
    moments = None
    if G is not None:
        if G.shape != (W.shape[1], W.shape[1]):
            raise ValueError(f"G is {tuple(G.shape)}, but W has {W.shape[1]} input channels")
        check_finite("G", G)
        if mean_abs is not None:
            if mean_abs.shape != (W.shape[1],):
                raise ValueError(f"mean_abs is {tuple(mean_abs.shape)}, but W has {W.shape[1]} input channels")
            check_finite("mean_abs", mean_abs)
        if H is not None:
            if set(H.shape) != {W.shape[0]}:
                raise ValueError(f"H is {tuple(H.shape)}, but W has {W.shape[0]} output channels")
            check_finite("H", H)
        sizes, slopes = (t if t is None else double(t) for t in (mean_abs, H))
        moments = Moments(double(G), sizes, H=slopes)
    found = chosen(double(W), moments, k, **options).to(W)
    return LowRank(*(factor.clone(memory_format=torch.contiguous_format) for factor in (found.left, found.right)))


def check_finite(name: str, values: Tensor) -> None:
    """Raise ``ValueError`` naming what holds NaN or Inf."""
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or Inf")
