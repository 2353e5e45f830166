"""``compress_`` by a method that factors whole layers: find ranks where they are not known, exchange the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from nsvd.compression.exchange import Exchange
from nsvd.compression.measure import check_gradients, decompositions, mean_gradients
from nsvd.compression.ranks import searched
from nsvd.compression.recipes import recipe
from nsvd.linalg import Decomposition
from nsvd.walk.hooks import exchanged
from nsvd.walk.moments import Statistics
from nsvd.walk.soundness import check_exchanged


class Result(NamedTuple):
    """What was exchanged, by whichever way."""

    table: pd.DataFrame  # a row a layer
    changed: list[str]  # layers that are compressed now
    tokens: int = 0  # that went through the model to find the ranks
    losses: list | tuple = ()  # at every step of the distillation
    moves: list | tuple = ()  # of SoLA's search


def factor(
    job: Exchange, ranks: Mapping[str, int] | None, prepared: Mapping[str, Decomposition] | None, before: Tensor
) -> Result:
    """Exchange every layer that becomes smaller, for ranks that are given or found; when something raises, none.

    ``before`` is what the dense model said to the tokens that it is tried on afterwards.
    """
    ask, tokens, losses = job.ask, 0, []
    if ranks is None:
        ranks, prepared, tokens = _search(job, prepared)
        if ask.shifted and ask.method.needs_gradients:
            job = replace(job, stats=_both_ends(job, ranks, prepared))
            prepared = None  # of a large model a great deal of memory
            ranks, prepared, again = _search(job, None)
            tokens += again
    smaller = job.smaller(ranks)
    try:
        if ask.shifted:
            prepared = None
            job.in_order(smaller)
        else:
            job.at_once(smaller, prepared)
        if ask.distill:
            losses = job.distill(list(smaller))
        check_exchanged(job.model, {name: job.layers[name] for name in smaller}, before)
    except BaseException:
        job.undo(smaller)
        raise
    return Result(job.table(ranks, smaller), list(smaller), tokens, losses)


def _search(
    job: Exchange, prepared: Mapping[str, Decomposition] | None
) -> tuple[dict[str, int], Mapping[str, Decomposition], int]:
    """Ranks, the decompositions that they come from, and the tokens that went through the model for them."""
    ask = job.ask
    how = {"method": recipe(ask.name).method, "progress": ask.progress, **ask.options}
    if ask.allocation == "fisher":
        check_gradients(job.layers, job.stats, "allocation 'fisher'")
    if prepared is None:
        prepared = decompositions(job.model, job.layers, job.stats, ask.method, ask.options, ask.progress)
        job.clock.lap("decompose")
    text = torch.cat([ids[: ask.search_count] for ids in ask.domains]) if ask.allocation == "strs" else None
    how |= {"factors": ask.factors}
    ranks, tokens = searched(job.model, job.stats, prepared, ask.ratio, ask.allocation, text, **how)
    job.clock.lap("search")
    return ranks, prepared, tokens


def _both_ends(job: Exchange, ranks: Mapping[str, int], prepared: Mapping[str, Decomposition]) -> Statistics:
    """The statistics, their gradients averaged with those of the model compressed without following the inputs.

    The loss bends differently at the two ends of the way from the dense to the compressed model: the mean is the trapezoid
    rule. The compressed model learns its labels from the dense one, so that directions in which it already errs weigh more:
    not the bending alone, but a little better on three of our models than its own labels (0.2 points of what ASVD-I loses).
    """
    ask, stats, known, smaller = job.ask, job.stats, job.stats.gradients, job.smaller(ranks)
    how = {"layers": known, "diagonal": next(iter(known.values())).ndim == 1}
    dense = {name: job.layers[name] for name in smaller}

    def teacher(ids: Tensor) -> Tensor:
        with exchanged(job.model, dense):
            return job.model(input_ids=ids, use_cache=False).logits

    how |= {"seed": ask.seed, "progress": ask.progress, "teacher": teacher}
    try:
        job.at_once(smaller, prepared)
        there = mean_gradients(job.model, ask.domains, stats.shares(len(ask.domains)), others=True, **how)
    finally:
        job.undo(smaller)
    job.clock.lap("gradients")
    return stats.with_gradients({name: there[name].add_(H.to(there[name])).div_(2) for name, H in known.items()})
