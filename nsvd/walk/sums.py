"""Sums over tokens: second moments of inputs and gradients, in float32 products and float64 totals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.backends import cuda, mkldnn

from nsvd.linalg import Moments
from nsvd.linalg.precision import double, home
from nsvd.walk.processes import gathered, summed

# So many tokens at a time, or fewer, are taken in float64: they leave directions open, and rounding would make these negative.
FEW = 256
CHUNK, PIECE = 4096, 256  # tokens whose products are one sum in float32; whose absolute values are
STRIPS, NARROWEST = 8, 128  # strips of rows that a product is taken in, and rows of a strip at least


class Sums:
    """Σ x xᵀ, Σ y xᵀ where y is given, and Σ |x| over tokens.

    Products are in float32, in float64 where the inputs are, of ``CHUNK`` tokens at a time. They are added up in float64 on the
    device of the inputs, or on the CPU where that has no float64. ``cross`` and ``absolute`` are None before the first input.
    """

    def __init__(self) -> None:
        self.n = 0
        self.cross: Float[Tensor, "d_out d_in"] | None = None
        self.absolute: Float[Tensor, " d_in"] | None = None
        self._upper: Float[Tensor, "d_in d_in"] | None = None  # what lies below the diagonal is stale

    @property
    def outer(self) -> Float[Tensor, "d_in d_in"] | None:
        """Σ x xᵀ, exactly symmetric; None before the first input."""
        return None if self._upper is None else mirror_(self._upper)

    @property
    def squares(self) -> Float[Tensor, " d_in"]:
        """Σ x², of every channel: NaN or Inf where an input is, or a product too large."""
        return self._upper.diagonal()

    def add(self, x: Float[Tensor, "... d_in"], y: Float[Tensor, "... d_out"] | None = None) -> None:
        """Take in inputs, and what goes with each of them."""
        x = x.reshape(-1, x.shape[-1])
        if y is not None:
            common = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(common), y.reshape(-1, y.shape[-1]).to(common)
        place = {"dtype": torch.float64, "device": home(x)}
        if self._upper is None:
            self._upper = torch.zeros(x.shape[1], x.shape[1], **place)
            self.absolute = torch.zeros(x.shape[1], **place)
        if self.cross is None and y is not None:
            self.cross = torch.zeros(y.shape[1], x.shape[1], **place)
        for part, beside in zip(_chunks(x), x.split(CHUNK) if y is None else _chunks(y), strict=True):
            _add_product_(self._upper, part, part, half=True)
            pieces = [piece.abs().sum(0, dtype=_least(part)) for piece in part.split(PIECE)]
            self.absolute += double(torch.stack(pieces)).sum(0)
            if y is not None:
                _add_product_(self.cross, beside, part)
        self.n += len(x)

    def join(self) -> None:
        """Take in the sums of all processes."""
        self._upper, self.cross, self.absolute = summed(self._upper), summed(self.cross), summed(self.absolute)
        self.n = sum(gathered(self.n))

    def result(self) -> Moments:
        """Averages per token, on the CPU. The sums are given up for them."""
        G, mean_abs = self.outer.cpu().div_(self.n), self.absolute.cpu().div_(self.n)
        self._upper = self.cross = self.absolute = None
        return Moments(G, mean_abs, self.n)


def finite(x: Tensor) -> Tensor:
    """Whether no number is NaN or Inf, as a tensor on the device of x: told by the sum, in one pass."""
    return x.sum(dtype=_least(x)).isfinite()


def add_outer_(total: Float[Tensor, "d d"], x: Float[Tensor, "n d"], weight: float = 1.0) -> None:
    """Add weight · Σ x xᵀ to the upper half of a float64 matrix; ``mirror_`` makes it whole."""
    for part in _chunks(x):
        _add_product_(total, part, part, weight, half=True)


def add_cross_(
    total: Float[Tensor, "d_out d_in"], y: Float[Tensor, "n d_out"], x: Float[Tensor, "n d_in"], weight: float = 1.0
) -> None:
    """Add weight · Σ y xᵀ to a float64 matrix."""
    for beside, part in zip(_chunks(y), _chunks(x), strict=True):
        _add_product_(total, beside, part, weight)


def mirror_(A: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Copy what lies above the diagonal to below it."""
    for first, last in _strips(len(A)):
        A[last:, first:last] = A[first:last, last:].mT
        corner = A[first:last, first:last]
        corner.copy_(corner.triu() + corner.triu(1).mT)
    return A


def _add_product_(total: Tensor, a: Tensor, b: Tensor, weight: float = 1.0, half: bool = False) -> None:
    """Add weight · aᵀ b, some rows at a time; with ``half`` only from the diagonal on."""
    how = {} if a.dtype == _least(a) else {"out_dtype": torch.float32}
    with _full_precision(a.device):
        for first, last in _strips(len(total)):
            left = first if half else 0
            product = torch.mm(a[:, first:last].mT, b[:, left:], **how)
            total[first:last, left:].add_(product.to(total.device), alpha=weight)


def _chunks(x: Tensor) -> Iterator[Tensor]:
    """Some tokens at a time, in float32 at least, few in float64.

    On CUDA they stay as they are, which sums products of coarser numbers in float32.
    """
    for part in x.split(CHUNK):
        if len(x) <= FEW:
            yield double(part)
        else:
            yield part if part.is_cuda else part.to(_least(part))


def _least(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _strips(d: int) -> Iterator[tuple[int, int]]:
    """Where strips of rows of a matrix begin and end."""
    step = max(NARROWEST, -(-d // STRIPS))
    return ((first, min(first + step, d)) for first in range(0, d, step))


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """In the context products of float32 are what they say, whatever the user has allowed: no TF32, bfloat16 or autocast."""
    places = (cuda.matmul, mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
