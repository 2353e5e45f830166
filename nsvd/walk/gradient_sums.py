"""What is summed of the gradients at the outputs of layers while a text is pulled back through a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from nsvd.linalg.precision import double, home
from nsvd.walk.processes import summed
from nsvd.walk.sums import Half, add_cross_, joined

EDGE, LEAST, MOST = 8, 0.1, 10.0  # an eighth of a window; norms, in their mean over the window


@dataclass(frozen=True)
class Kind:
    """Σ g gᵀ (d_out, d_out), or its ``diagonal``, or with ``weights`` Σ g xᵀ (d_out, d_in), the slope of the weight.

    ``clipped`` gradients are those of KFAC-SVD, see ``clipped_tokens``.
    """

    diagonal: bool = False
    weights: bool = False
    clipped: bool = False


MOMENTS = Kind()


class GradientSums:
    """Sums by name of layer, in float64."""

    def __init__(self, names: Iterable[str], kind: Kind):
        self.kind = kind
        self.totals: dict[str, Half | Tensor | None] = dict.fromkeys(names)

    def taking(self, weight: float, name: str, x: Tensor) -> Callable[[Tensor], None]:
        """What takes in the gradient at the output of a layer with input x (…, d_in), times a weight."""
        return partial(self._add, weight, name, x if self.kind.weights else None)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The sums of all processes, on the CPU, one by one: they are used up. Raises for one that nothing was added to, or that
        is not finite."""
        for name in list(self.totals):
            yield name, self._whole(name)

    def _add(self, weight: float, name: str, x: Tensor | None, gradient: Tensor) -> None:
        if self.kind.clipped:
            before = gradient.shape[:-1].numel()
            gradient = clipped_tokens(gradient)
            weight *= before / gradient.shape[:-1].numel()
        g = gradient.reshape(-1, gradient.shape[-1])
        total = self.totals[name]
        if total is None:
            shape = (g.shape[1],) if x is None else (g.shape[1], x.shape[-1])
            square = x is None and not self.kind.diagonal
            place = {"dtype": torch.float64, "device": home(g)}
            total = self.totals[name] = Half(g.shape[1], home(g)) if square else torch.zeros(shape, **place)
        if isinstance(total, Half):
            total.add_(g, weight)
        elif x is not None:
            add_cross_(total, g, x.reshape(-1, x.shape[-1]), weight)
        else:
            total += weight * double(g).square().sum(0)

    def _whole(self, name: str) -> Tensor:
        square = not (self.kind.diagonal or self.kind.weights)
        kept = self.totals.pop(name)
        total = joined(cast(Half | None, kept)) if square else summed(cast(Tensor | None, kept))
        del kept
        if total is None:
            raise ValueError(f"no gradient reached layer {name}")
        if not (total.diagonal if isinstance(total, Half) else total).isfinite().all():
            raise FloatingPointError(f"the gradient at layer {name} holds NaN or Inf")
        return (total.whole() if isinstance(total, Half) else total).cpu()


def clipped_tokens(gradient: Float[Tensor, "count length d"]) -> Float[Tensor, "count kept d"]:
    """KFAC-SVD's gradients (arXiv 2610.32878): no token speaks much louder than the others, and none of the edges of a window.

    The first and last eighth of the positions are left out; of the others the norm is clipped to [0.1, 10] times its mean over
    the window.

    Raises:
        ValueError: where the positions are not to be told, as in an expert's share of the tokens.
    """
    if gradient.ndim != 3:
        raise ValueError(f"clipped gradients are (count, length, d), but these are {tuple(gradient.shape)}")
    edge = gradient.shape[1] // EDGE
    g = gradient[:, edge : gradient.shape[1] - edge]
    norms = torch.linalg.vector_norm(g, dim=-1, keepdim=True, dtype=torch.promote_types(g.dtype, torch.float32))
    mean = norms.mean(1, keepdim=True)
    return g * (norms.clamp(min=LEAST * mean, max=MOST * mean) / norms.where(norms > 0, 1)).to(g.dtype)
