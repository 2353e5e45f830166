r"""SVD-LLM V2's ratios: within a type of layer, more is removed where truncation costs less (arXiv 2503.12340, algorithm 1).

With L_l the least truncation error ‖(W_l − Ŵ_l) X‖_F of layer l at the common ratio R, summed over tokens and not averaged, the N
layers of one type get

    R_l = N R (1 / log L_l) / Σ_j (1 / log L_j).

Their mean is R, so every type loses as much as with uniform ranks. Where a logarithm is close to zero this asks for more than
a layer has: no layer loses more than ``MOST``, and the others of its type share what is left.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

MOST = 0.9  # of a layer's parameters; the common ratio where that is higher


def log_ratios(losses: Mapping[str, float], types: Mapping[str, Hashable], ratio: float) -> dict[str, float]:
    """The fraction of its parameters that every layer loses, from its truncation error at the common ratio.

    Raises:
        ValueError: for an error of 1 or less, whose logarithm is no weight; the layer is named.
    """
    weights: dict[Hashable, dict[str, float]] = {}
    for layer, loss in losses.items():
        if not loss > 1:
            raise ValueError(
                f"layer {layer}: the truncation error is {loss:.3g}, but allocation 'svd-llm-v2' divides by its logarithm: "
                "take a method that measures errors on inputs, on more tokens"
            )
        weights.setdefault(types[layer], {})[layer] = 1 / math.log(loss)
    return {layer: share for group in weights.values() for layer, share in _capped(group, ratio).items()}


def _capped(weights: Mapping[str, float], ratio: float) -> dict[str, float]:
    """Ratios in proportion to weights, of that mean, none above the cap."""
    most, free, full = max(MOST, ratio), dict(weights), {}
    while free:
        left = ratio * len(weights) - most * len(full)
        shares = {layer: left * weight / sum(free.values()) for layer, weight in free.items()}
        over = [layer for layer, share in shares.items() if share > most]
        if not over:
            return full | shares
        full |= dict.fromkeys(over, most)
        free = {layer: weight for layer, weight in free.items() if layer not in full}
    return full
