r"""Zero-sum selection: which terms of all decompositions go, by the sign of what they do to the loss (ZS-SVD, arXiv 2602.02848).

A layer W = Σ_i u_i c_iᵀ (the columns of ``U`` times the rows of ``right``) loses its last terms first. To first order the loss on a
text changes by

    δ_i = −u_iᵀ (∂L/∂W) c_i

when term i goes; for ASVD-I this is the paper's −σ_i u_iᵀ (∂L/∂W L⁻ᵀ) v_i. Some terms raise the loss and some lower it. Those are
taken that keep the sum of all changes near zero.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from nsvd.linalg.budget import Shapes, size
from nsvd.linalg.decomposition import Decomposition
from nsvd.linalg.factors import remaining, saves_parameters


def first_order(one: Decomposition, slope: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " k"]:
    """What the loss changes by, to first order, when a term of the decomposition goes; ``slope`` is ∂L/∂W."""
    return -((one.U.mT @ slope) * one.right).sum(1)


def zero_sum(
    changes: Mapping[str, Float[Tensor, " _"]], shapes: Shapes, ratio: float, factors: str = "plain", *, least: int = 1
) -> dict[str, int]:
    """Ranks that remove at least ``ratio`` of all parameters; layers that are not named stay dense.

    Of every layer only the last term that is left may go. Candidates lie in two heaps, by the sign of their predicted change (0
    counts as a fall), the smallest in size on top. While the sum of the changes made is not positive the next one is a rise,
    else a fall; where that heap is empty, it is taken from the other. So the sum stays within ± the largest change while both
    hold something. A layer saves nothing before its factors are smaller than the matrix; one that is not so far at the end
    stays dense. No layer gets a rank below ``least``.

    Raises:
        ValueError: if a change is NaN or Inf, or the terms that may go remove less.
    """
    for layer, values in changes.items():
        if not values.isfinite().all():
            raise ValueError(f"layer {layer}: a predicted change of the loss is NaN or Inf")
    known = {layer: values.tolist() for layer, values in changes.items()}
    ranks, before = {layer: len(values) for layer, values in known.items()}, sum(map(math.prod, shapes.values()))
    left, running, heaps = before, 0.0, {True: [], False: []}

    def offer(layer: str) -> None:
        if ranks[layer] > least:
            change = known[layer][ranks[layer] - 1]
            heapq.heappush(heaps[change > 0], (abs(change), layer, change))

    for layer in known:
        offer(layer)
    while left > remaining(before, ratio):
        heap = heaps[running <= 0] or heaps[running > 0]
        if not heap:
            raise ValueError(f"ratio {ratio} is out of reach: all terms that may go remove {1 - left / before:.4f}")
        _, layer, change = heapq.heappop(heap)
        running += change
        ranks[layer] -= 1
        left += size(shapes[layer], ranks[layer], factors) - size(shapes[layer], ranks[layer] + 1, factors)
        offer(layer)
    return {layer: k for layer, k in ranks.items() if saves_parameters(*shapes[layer], k, factors)}
