"""What the decompositions know of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

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
    H: Float[Tensor, d_out * d_out] | None = None

    def to(self, *args, **kwargs) -> Moments:
        """Moved or cast as ``Tensor.to`` does."""
        G, mean_abs, H = (t if t is None else t.to(*args, **kwargs) for t in (self.G, self.mean_abs, self.H))
        return Moments(G, mean_abs, self.n, H)

    def scale(self) -> Float[Tensor, " d_in"]:
        """The mean absolute values, for the methods that scale channels by them.

        Raises:
            ValueError: if they were not recorded.
        """
        if self.mean_abs is None:
            raise ValueError("this method scales channels by their mean absolute value: pass mean_abs beside G")
        return self.mean_abs
