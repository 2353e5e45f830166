"""Bootstrap intervals of means over several groups: windows of texts, questions of tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Documents = Sequence[
    Sequence[int] | None
]  # of every group, the document that each member is from; None: members stand alone


def mean_with_interval(
    groups: Sequence[Tensor],
    documents: Documents | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The mean over groups of the mean of each, and its interval: (mean, low, high).

    Documents of each group are drawn with replacement, with all their members. Where members are differences of two models on
    the same texts or questions, what is left is the uncertainty of the difference on others of this kind. Without a group, all
    three are NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    known = _documents(documents, groups)
    found = [resampled(values[:, None], which, draws, generator) for values, which in zip(groups, known, strict=True)]
    mean = sum(values.mean().item() for values in groups) / len(groups) if groups else math.nan
    return mean, *_ends(found, level)


def paired_interval(
    losses: Sequence[Tensor],
    reference: Sequence[Tensor],
    dense: Sequence[Tensor] | None = None,
    documents: Documents | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of ``average_improvement`` over corpora, from losses per window; with ``dense`` of ``excess_closed``.

    Documents are drawn with replacement within each corpus, with all their windows, the same ones for all models: what is left
    is the uncertainty of the difference on this kind of text, not that of the perplexities. Of no corpus both ends are NaN.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    sides = (losses, reference) if dense is None else (losses, reference, dense)
    for *each, which in zip(*sides, _documents(documents, losses), strict=True):
        ours, theirs, *base = resampled(torch.stack(each, dim=1), which, draws, generator).unbind(1)
        if base:
            found.append(1 - (ours - base[0]) / (theirs - base[0]))
        else:
            found.append(1 - (ours - theirs).exp())
    return _ends(found, level)


def resampled(values: Tensor, documents: Sequence[int] | None, draws: int, generator: torch.Generator) -> Tensor:
    """Means (draws, m) of values (n, m) over members that are drawn anew: as many documents, each with all its members.

    Windows of one document are alike, so drawn one by one they would promise more than they know (cluster bootstrap, Davison
    and Hinkley, 1997, section 3.8). Without ``documents`` every member is one of its own.
    """
    which = torch.arange(len(values)) if documents is None else torch.tensor(documents).unique(return_inverse=True)[1]
    sizes = torch.bincount(which).double()
    sums = torch.zeros(len(sizes), values.shape[1], dtype=torch.float64).index_add_(0, which, values.double())
    index = torch.randint(len(sizes), (draws, len(sizes)), generator=generator)
    return sums[index].sum(1) / sizes[index].sum(1, keepdim=True)


def _documents(documents: Documents | None, groups: Sequence[Tensor]) -> Documents:
    return [None] * len(groups) if documents is None else documents


def _ends(found: Sequence[Tensor], level: float) -> tuple[float, float]:
    """Both ends of the interval of the mean of several groups, of each its draws."""
    if not found:
        return math.nan, math.nan
    edge = (1 - level) / 2
    mean = torch.stack([values.flatten() for values in found]).mean(0)
    low, high = torch.quantile(mean, torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return low, high
