"""What the decompositions know of a layer's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Second moment G = X Xᵀ / n and mean absolute value of every input channel, over n tokens.

    H, where a method asks for it, is the second moment of the loss's gradient with respect to the layer's outputs, a
    matrix or its diagonal.
    """

    G: Float[Tensor, "d_in d_in"]
    mean_abs: Float[Tensor, " d_in"] | None = None
    n: int | None = None
    H: Float[Tensor, "d_out ..."] | None = None

    def to(self, *args, **kwargs) -> Moments:
        """Moved or cast as ``Tensor.to`` does."""
        mean_abs, H = (t if t is None else t.to(*args, **kwargs) for t in (self.mean_abs, self.H))
        return Moments(self.G.to(*args, **kwargs), mean_abs, self.n, H)

    def scale(self) -> Float[Tensor, " d_in"]:
        """The mean absolute values, for the methods that scale channels by them.

        Raises:
            ValueError: if they were not recorded.
        """
        if self.mean_abs is None:
            raise ValueError("this method scales channels by their mean absolute value: pass mean_abs beside G")
        return self.mean_abs

    def slopes(self) -> Float[Tensor, "d_out ..."]:
        """H, for the methods that weigh outputs by the loss.

        Raises:
            ValueError: if it was not recorded.
        """
        if self.H is None:
            raise ValueError("this method weighs outputs by the loss: it needs H, from fisher()")
        return self.H


def mixing(sizes: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """The coefficients of one metric of several domains: a_d = c w_d / mean(diag G_d), the metric Σ_d a_d G_d.

    ``sizes`` are the mean(diag G_d). The weights w have the sum 1, so that each domain counts by its weight and not by its size;
    c = Σ_d w_d mean(diag G_d) gives the average size back.
    """
    sizes = [size.clamp(min=torch.finfo(size.dtype).tiny) for size in sizes]
    c = sum(w * size for w, size in zip(weights, sizes, strict=True))
    return [w * c / size for w, size in zip(weights, sizes, strict=True)]
