"""The value every method returns, and how many parameters it costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
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

    def to(self, *args, **kwargs) -> LowRank:
        """Both factors moved or cast as ``Tensor.to`` does."""
        return LowRank(self.left.to(*args, **kwargs), self.right.to(*args, **kwargs))


def rank_for_ratio(d_out: int, d_in: int, ratio: float) -> int:
    """Largest k whose factors hold at most (1 − ratio) d_out d_in numbers: ⌊(1 − ratio) d_out d_in / (d_out + d_in)⌋.

    ``ratio`` is the fraction of parameters removed, in [0, 1). This is SVD-LLM's rule (arXiv 2403.07378).

    Raises:
        ValueError: if ``ratio`` is outside [0, 1), or removes so much that not even rank 1 is left.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}, but the fraction of parameters removed lies in [0, 1)")
    # 1 − 0.3 is not exactly 0.7: the rounding keeps a rank that is whole in exact arithmetic
    k = int(round(d_out * d_in * (1 - ratio) / (d_out + d_in), 9))
    if k == 0:
        raise ValueError(f"ratio {ratio} leaves rank 0 for a {d_out} × {d_in} matrix")
    return k


def saves_parameters(d_out: int, d_in: int, k: int) -> bool:
    """Whether rank-k factors are smaller than the dense matrix, k (d_out + d_in) < d_out d_in."""
    return k * (d_out + d_in) < d_out * d_in


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
