r"""SVD-LLM V2's ratios: within a type of layer, more is removed where truncation costs less (arXiv 2503.12340, algorithm 1).

With L_l the least truncation error ‖(W_l − Ŵ_l) X‖_F of layer l at the common ratio R, summed over tokens and not averaged, the N
layers of one type get

    R_l = N R (1 / log L_l) / Σ_j (1 / log L_j).

Their mean is R, so every type loses as much as with uniform ranks.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping


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
    return {
        layer: ratio * len(group) * weight / sum(group.values())
        for group in weights.values()
        for layer, weight in group.items()
    }
