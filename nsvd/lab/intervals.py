"""Bootstrap intervals of means over several groups: windows of texts, questions of tasks.

Few documents say less of their spread than their draws show. So deviations of a group of n documents are stretched by √(n/(n − 1)),
and the percentiles are those of Student's t in place of the normal distribution (the expanded percentile interval of Hesterberg,
arXiv 1411.5279, section 5.4). Of a single document nothing is known of other ones: both ends are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor

# Of every group, the document that each member is from. None: every member is one of its own.
Documents = Sequence[Sequence[int] | None]


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
    known, generator = _numbered(groups, documents), torch.Generator().manual_seed(seed)
    found = [resampled(values[:, None], which, draws, generator) for values, which in zip(groups, known, strict=True)]
    mean = sum(values.mean().item() for values in groups) / len(groups) if groups else math.nan
    return mean, *_ends(found, known, level)


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
    known, generator, found = _numbered(losses, documents), torch.Generator().manual_seed(seed), []
    sides = (losses, reference) if dense is None else (losses, reference, dense)
    for *each, which in zip(*sides, known, strict=True):
        ours, theirs, *base = resampled(torch.stack(each, dim=1), which, draws, generator).unbind(1)
        if base:
            found.append(1 - (ours - base[0]) / (theirs - base[0]))
        else:
            found.append(1 - (ours - theirs).exp())
    return _ends(found, known, level)


def resampled(values: Tensor, which: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Means (draws, m) of values (n, m) over members that are drawn anew: as many documents, each with all its members.

    ``which`` (n,) numbers the documents from 0. Windows of one are alike, so drawn one by one they would promise more than they
    know (cluster bootstrap, Davison and Hinkley, 1997, section 3.8).
    """
    sizes = torch.bincount(which).double()
    sums = torch.zeros(len(sizes), values.shape[1], dtype=torch.float64).index_add_(0, which, values.double())
    index = torch.randint(len(sizes), (draws, len(sizes)), generator=generator)
    means, mean = sums[index].sum(1) / sizes[index].sum(1, keepdim=True), values.double().mean(0)
    stretch = math.sqrt(len(sizes) / (len(sizes) - 1)) if len(sizes) > 1 else math.nan
    return mean + stretch * (means - mean)


def _numbered(groups: Sequence[Tensor], documents: Documents | None) -> list[Tensor]:
    told = [None] * len(groups) if documents is None else documents
    return [
        torch.arange(len(values)) if which is None else torch.tensor(which).unique(return_inverse=True)[1]
        for values, which in zip(groups, told, strict=True)
    ]


def _ends(found: Sequence[Tensor], which: Sequence[Tensor], level: float) -> tuple[float, float]:
    """Both ends of the interval of the mean of several groups, of each its draws."""
    mean = torch.stack([values.flatten() for values in found]).mean(0) if found else torch.tensor([math.nan])
    if mean.isnan().any():
        return math.nan, math.nan
    freedom = sum(int(numbers.max()) for numbers in which)  # documents, less one a group
    edge = float(ndtr(stdtrit(freedom, (1 - level) / 2)))
    low, high = torch.quantile(mean, torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return low, high
