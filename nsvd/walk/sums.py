"""Sums over tokens: second moments of inputs and gradients, in float32 products and float64 totals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.backends import cuda, mkldnn

from nsvd.linalg import Moments
from nsvd.linalg.precision import double, home
from nsvd.walk.processes import count, gathered, summed

# So many tokens at a time, or fewer, are taken in float64: they leave directions open, and rounding would make these negative.
FEW = 256
CHUNK, PIECE = 4096, 256  # tokens whose products are one sum in float32; whose absolute values are
STRIPS, NARROWEST = 8, 128  # strips of rows that a product is taken in, and rows of a strip at least


class Half:
    """A symmetric matrix (d, d) in float64 that products are added to: of each strip of its rows what lies from the diagonal on."""

    def __init__(self, d: int, device: torch.device, values: Tensor | None = None):
        self.d, places = d, list(_strips(d))
        sizes = [(last - first, d - first) for first, last in places]
        total = sum(rows * columns for rows, columns in sizes)
        self.values = torch.zeros(total, dtype=torch.float64, device=device) if values is None else values
        parts = self.values.split([rows * columns for rows, columns in sizes])
        self._strips = [(place, part.view(size)) for place, part, size in zip(places, parts, sizes, strict=True)]

    def add_(self, x: Float[Tensor, "n d"], weight: float = 1.0) -> None:
        """Add weight · Σ x xᵀ."""
        with _exact(x):
            for part in _chunks(x):
                for (first, last), strip in self._strips:
                    _add_product_(strip, part[:, first:last], part[:, first:], weight)

    @property
    def diagonal(self) -> Float[Tensor, " d"]:
        return torch.cat([strip.diagonal() for _, strip in self._strips])

    def whole(self) -> Float[Tensor, "d d"]:
        """The matrix, exactly symmetric."""
        A = self.values.new_empty(self.d, self.d)
        for (first, last), strip in self._strips:
            corner = strip[:, : last - first]
            A[first:last, first:last] = corner.triu() + corner.triu(1).mT
            A[first:last, last:] = strip[:, last - first :]
            A[last:, first:last] = strip[:, last - first :].mT
        return A


def joined(half: Half | None) -> Half | None:
    """The sum over all processes; one with nothing to add gives None."""
    if count() == 1:
        return half
    d = next(filter(None, gathered(None if half is None else half.d)), None)
    values = summed(None if half is None else half.values)
    return None if d is None or values is None else Half(d, values.device, values)


class Sums:
    """Σ x xᵀ, Σ y xᵀ where y is given, and Σ |x| over tokens.

    Products are in float32, in float64 where the inputs are, of ``CHUNK`` tokens at a time. They are added up in float64 on the
    device of the inputs, or on the CPU where that has no float64. ``cross`` and ``absolute`` are None before the first input.
    """

    def __init__(self) -> None:
        self.n = 0
        self.cross: Float[Tensor, "d_out d_in"] | None = None
        self.absolute: Float[Tensor, " d_in"] | None = None
        self._half: Half | None = None

    @property
    def outer(self) -> Float[Tensor, "d_in d_in"] | None:
        """Σ x xᵀ, exactly symmetric; None before the first input."""
        return None if self._half is None else self._half.whole()

    @property
    def squares(self) -> Float[Tensor, " d_in"]:
        """Σ x², of every channel: NaN or Inf where an input is, or a product too large."""
        return self._taken()[0].diagonal

    def add(self, x: Float[Tensor, "... d_in"], y: Float[Tensor, "... d_out"] | None = None) -> None:
        """Take in inputs, and what goes with each of them."""
        x = x.reshape(-1, x.shape[-1])
        if y is not None:
            common = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(common), y.reshape(-1, y.shape[-1]).to(common)
        place = {"dtype": torch.float64, "device": home(x)}
        if self._half is None or self.absolute is None:
            self._half = Half(x.shape[1], home(x))
            self.absolute = torch.zeros(x.shape[1], **place)
        self._half.add_(x)
        for part in _chunks(x):
            pieces = [piece.abs().sum(0, dtype=_least(part)) for piece in part.split(PIECE)]
            self.absolute += double(torch.stack(pieces)).sum(0)
        if y is not None:
            if self.cross is None:
                self.cross = torch.zeros(y.shape[1], x.shape[1], **place)
            add_cross_(self.cross, y, x)
        self.n += len(x)

    def join(self) -> None:
        """Take in the sums of all processes."""
        self._half, self.cross, self.absolute = joined(self._half), summed(self.cross), summed(self.absolute)
        self.n = sum(gathered(self.n))

    def result(self) -> Moments:
        """Averages per token, on the CPU. The sums are used up."""
        half, absolute = self._taken()
        G, mean_abs = half.whole().div_(self.n).cpu(), absolute.div_(self.n).cpu()
        self.forget()
        return Moments(G, mean_abs, self.n)

    def _taken(self) -> tuple[Half, Tensor]:
        """Σ x xᵀ and Σ |x|; raises ``ValueError`` before the first input."""
        if self._half is None or self.absolute is None:
            raise ValueError("nothing was summed: there was no input")
        return self._half, self.absolute

    def forget(self) -> None:
        """Give the memory of the sums back."""
        self._half = self.cross = self.absolute = None


def finite(x: Tensor) -> Tensor:
    """Whether no number is NaN or Inf, as a tensor on the device of x: told by the sum, in one pass."""
    return x.sum(dtype=_least(x)).isfinite()


def add_cross_(
    total: Float[Tensor, "d_out d_in"], y: Float[Tensor, "n d_out"], x: Float[Tensor, "n d_in"], weight: float = 1.0
) -> None:
    """Add weight · Σ y xᵀ to a float64 matrix."""
    with _exact(x, y):
        for beside, part in zip(_chunks(y), _chunks(x), strict=True):
            for first, last in _strips(len(total)):
                _add_product_(total[first:last], beside[:, first:last], part, weight)


def _add_product_(total: Tensor, a: Tensor, b: Tensor, weight: float = 1.0) -> None:
    """Add weight · aᵀ b."""
    how: dict[str, Any] = {} if a.dtype == _least(a) else {"out_dtype": torch.float32}
    total.add_(torch.mm(a.mT, b, **how).to(total.device), alpha=weight)


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
def _exact(*inputs: Tensor) -> Iterator[None]:
    """In the context products of numbers like these are exact and summed in float32, whatever the user has allowed.

    No TF32, no autocast. A processor may multiply in bfloat16 where the numbers come from it: that is as exact, and faster.
    """
    cpu: Any = mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]  # torch adds it to its own module when imported
    places = {cuda.matmul: "ieee", cpu: "bf16" if all(x.dtype == torch.bfloat16 for x in inputs) else "ieee"}
    before = {place: place.fp32_precision for place in places}
    for place, precision in places.items():
        place.fp32_precision = precision
    try:
        with torch.autocast(inputs[0].device.type, enabled=False):
            yield
    finally:
        for place, precision in before.items():
            place.fp32_precision = precision
