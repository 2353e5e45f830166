"""The value every method returns, the two ways to store it, and how many parameters each costs.

| factors | stored | parameters at rank k |
|---|---|---|
| ``plain`` | left (d_out, k), right (k, d_in) | k (d_out + d_in) |
| ``pivoted`` | k rows of the matrix itself, and how the others combine from them | k (d_out + d_in − k) |
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsvd.linalg.pivots import spanning_rows


@dataclass(frozen=True, repr=False)
class LowRank:
    """W ≈ left · right, kept as two thin factors.

    Adding two values of one shape stacks their factors: ranks add, matrices add, nothing is multiplied out.
    """

    left: Float[Tensor, "d_out k"]
    right: Float[Tensor, "k d_in"]

    def __post_init__(self):
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"factors {tuple(self.left.shape)} and {tuple(self.right.shape)} do not multiply: "
                "expected (d_out, k) and (k, d_in)"
            )

    def __add__(self, other: LowRank) -> LowRank:
        if self.shape != other.shape:
            raise ValueError(f"cannot add a {self.shape} and a {other.shape} matrix")
        return LowRank(torch.cat([self.left, other.left], dim=1), torch.cat([self.right, other.right], dim=0))

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the matrix represented."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """k, the width of the factors (an upper bound of the matrix rank)."""
        return self.left.shape[1]

    @property
    def n_params(self) -> int:
        """k (d_out + d_in)."""
        return self.left.numel() + self.right.numel()

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """left · right."""
        return self.left @ self.right

    def __repr__(self) -> str:
        (d_out, d_in), dtype = self.shape, str(self.left.dtype).removeprefix("torch.")
        share = f", {self.n_params / (d_out * d_in):.1%} of the dense" if d_out * d_in else ""
        return f"LowRank({d_out} × {d_in}, rank {self.rank}, {self.n_params:,} parameters{share}, {dtype})"

    def _repr_html_(self) -> str:
        """The matrix and its two factors, drawn to scale."""
        (d_out, d_in), k = self.shape, self.rank
        scale = 120 / max(d_out, d_in, 1)
        box = '<rect x="{:.1f}" y="1" width="{:.1f}" height="{:.1f}" fill="{}" stroke="#555"/>'
        sides, x, boxes = (d_in, d_out, "#ddd"), 1.0, []
        for width, height, fill in (sides, (k, d_out, "#2a6f97"), (d_in, k, "#61a5c2")):
            boxes.append(box.format(x, scale * width, scale * height, fill))
            x += scale * width + 14
        drawing = f'<svg width="{x:.0f}" height="{scale * d_out + 2:.0f}" role="img" aria-label="{self!r}">{"".join(boxes)}</svg>'
        return f"<div><div><b>{self!r}</b></div>{drawing}</div>"

    def to(self, *args, **kwargs) -> LowRank:
        """Both factors moved or cast as ``Tensor.to`` does."""
        return LowRank(self.left.to(*args, **kwargs), self.right.to(*args, **kwargs))


@dataclass(frozen=True)
class Pivoted:
    """The same rank-k matrix as k of its own rows, C, and T, the others in terms of them: rows [C; T C] in some order.

    Row i of the matrix is row ``order[i]`` of [C; T C]. Nothing is lost, and k² numbers of the plain factors, a square
    block that only chose a basis of the latent space, are not stored (PIFA, Zhao et al., ICML 2025).
    """

    C: Float[Tensor, "k d_in"]
    T: Float[Tensor, "rest k"]
    order: Int[Tensor, " d_out"]

    @property
    def rank(self) -> int:
        """k, the number of rows kept as they are."""
        return len(self.C)

    @property
    def n_params(self) -> int:
        """k (d_out + d_in − k); the d_out indices of ``order`` are not counted."""
        return self.C.numel() + self.T.numel()

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix, multiplied out."""
        return torch.cat([self.C, self.T @ self.C])[self.order]

    def to(self, *args, **kwargs) -> Pivoted:
        """Both factors moved or cast as ``Tensor.to`` does."""
        C, T = self.C.to(*args, **kwargs), self.T.to(*args, **kwargs)
        return Pivoted(C, T, self.order.to(C.device))


def pivoted(value: LowRank) -> Pivoted:
    """The pivoted form of a rank-k matrix, 1 ≤ k ≤ d_out; the same matrix up to rounding.

    The rows are chosen so that the entries of T are small, and rounding T and C to a short format costs about what rounding the
    plain factors does: see ``spanning_rows``.
    """
    if not 1 <= value.rank <= value.shape[0]:
        raise ValueError(f"rank {value.rank} of a {value.shape[0]} × {value.shape[1]} matrix has no pivoted form")
    order, T = spanning_rows(value.left)
    return Pivoted(value.left[order[: value.rank]] @ value.right, T, order.argsort())


FACTORS = ("plain", "pivoted")


def n_params(d_out: int, d_in: int, k: int, factors: str = "plain") -> int:
    """What factors of rank k hold: k (d_out + d_in), pivoted k (d_out + d_in − k)."""
    check_factors(factors)
    return k * (d_out + d_in - (k if factors == "pivoted" else 0))


def check_factors(factors: str) -> None:
    """Raise ``ValueError`` for a way of storing that there is not."""
    if factors not in FACTORS:
        raise ValueError(f"unknown factors {factors!r}; there are {', '.join(FACTORS)}")


def check_ratio(ratio: float | int) -> None:
    """Raise ``ValueError`` unless this can be the fraction of parameters removed."""
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}, but the fraction of parameters removed lies in [0, 1)")


def remaining(count: int, ratio: float | int) -> int:
    """⌊(1 − ratio) count⌋: how many of so many parameters may be left; raises ``ValueError`` for a ratio outside [0, 1).

    1 − 0.3 is not exactly 0.7 in floating point, so the product is rounded first: what is whole in exact arithmetic stays whole.
    """
    check_ratio(ratio)
    return math.floor(round(count * (1 - ratio), 6))


def rank_for_ratio(d_out: int, d_in: int, ratio: float, factors: str = "plain") -> int:
    """Largest k whose factors hold at most (1 − ratio) d_out d_in numbers.

    ``ratio`` is the fraction of parameters removed, in [0, 1). For plain factors this is SVD-LLM's rule (arXiv 2403.07378),
    k = ⌊(1 − ratio) d_out d_in / (d_out + d_in)⌋; for pivoted ones of a square matrix k ≈ n (1 − √ratio).

    Raises:
        ValueError: if ``ratio`` is outside [0, 1), or removes so much that not even rank 1 is left.
    """
    k = largest_rank(d_out, d_in, ratio, factors)
    if k == 0:
        raise ValueError(f"ratio {ratio} leaves rank 0 for a {d_out} × {d_in} matrix")
    return k


def largest_rank(d_out: int, d_in: int, ratio: float, factors: str = "plain") -> int:
    """The same, or 0 where not even rank 1 is left."""
    budget = remaining(d_out * d_in, ratio)
    check_factors(factors)
    return bisect_right(range(1, min(d_out, d_in) + 1), budget, key=lambda k: n_params(d_out, d_in, k, factors))


def saves_parameters(d_out: int, d_in: int, k: int, factors: str = "plain") -> bool:
    """Whether rank-k factors are smaller than the dense matrix."""
    return k < min(d_out, d_in) and n_params(d_out, d_in, k, factors) < d_out * d_in


def split_rank(k: int, k1: float) -> tuple[int, int]:
    """(k1, k2) with k1 + k2 = k for the fraction ``k1`` of the outer, activation-aware step.

    Raises:
        ValueError: if the fraction is outside [0, 1], or lies strictly between and rounds one of the two steps away.
    """
    _check_fraction(k1)
    outer = round(k1 * k)
    if 0 < k1 < 1 and outer in (0, k):
        lost = "k1" if outer == 0 else "k2"
        raise ValueError(f"k1 = {k1} of rank {k} rounds {lost} to 0; choose k1 = {float(outer == k)} or a larger rank")
    return outer, k - outer


def least_rank(k1: float) -> int:
    """The smallest rank that ``split_rank`` can split by the fraction ``k1``; it can split every larger one."""
    _check_fraction(k1)
    if k1 in (0, 1):
        return 1
    k = max(1, int(0.5 / min(k1, 1 - k1)))
    while round(k1 * k) in (0, k):
        k += 1
    return k


def _check_fraction(k1: float) -> None:
    if not 0 <= k1 <= 1:
        raise ValueError(f"k1 is {k1}, but it is the fraction of the rank for the outer step, in [0, 1]")
