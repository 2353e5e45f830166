"""Bootstrap intervals of means over several groups: windows of texts, questions of tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_with_interval(
    groups: Sequence[Tensor], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean over groups of the mean of each, and its interval: (mean, low, high).

    Members of each group are drawn with replacement. Where they are differences of two models on the same texts or questions, what
    is left is the uncertainty of the difference on others of this kind. Without a group, all three are NaN.
    """
    if not groups:
        return (float("nan"),) * 3
    generator, total, mean = torch.Generator().manual_seed(seed), torch.zeros(draws, dtype=torch.float64), 0.0
    for values in groups:
        total += values[torch.randint(len(values), (draws, len(values)), generator=generator)].mean(1) / len(groups)
        mean += values.mean().item() / len(groups)
    edge = (1 - level) / 2
    low, high = torch.quantile(total, torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return mean, low, high
