"""``compress_`` by a method that factors whole layers: find ranks where they are not known, exchange the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from torch import Tensor

from nsvd.compression.exchange import Exchange
from nsvd.compression.measure import DRAFT, ENDS, averaged, check_gradients, decompositions, gradient_texts
from nsvd.compression.neurons import put_back, put_narrow, told_sizes, without_neurons
from nsvd.compression.ranks import SEARCHING, searched
from nsvd.compression.request import recipe
from nsvd.linalg import Decomposition
from nsvd.walk.gradient_sums import Kind
from nsvd.walk.gradients import drawn_labels, fisher_into
from nsvd.walk.processes import same
from nsvd.walk.soundness import check_exchanged, check_runs
from nsvd.walk.statistics import Statistics


class Result(NamedTuple):
    """What was exchanged, by whichever way."""

    rows: list[dict]  # one a layer
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
    ask, tokens, losses, touched = job.ask, 0, [], []
    try:
        if ranks is None:
            twice = ask.shifted and ask.method.needs_gradients
            if ask.neurons:
                job = without_neurons(job)
                put_narrow(job)
                check_runs(job.model, before)
            ranks, prepared, tokens = _search(job, prepared, "dense", only_ranks=ask.shifted and not twice)
            if twice:
                job = replace(job, stats=_both_ends(job, ranks, prepared))
                ranks, prepared, again = _search(job, None, "both", only_ranks=True)
                tokens += again
        smaller = job.smaller(ranks)
        touched = list(smaller)
        if ask.shifted and (smaller or job.originals):  # those that stay dense are fitted, too
            touched = list(ranks if ask.ranks is not None else job.layers)
        if ask.shifted:
            job.in_order(touched, smaller)
        else:
            job.at_once(smaller, prepared)
        if ask.distill:
            losses = job.distill(touched, list(smaller))
        if job.originals:
            told_sizes(job)
        alone = {name: job.layers[name] for name in touched if name not in job.originals}  # the others go together
        check_exchanged(job.model, alone or job.before, before)
    except BaseException:
        job.undo(touched)
        put_back(job)
        raise
    changed = [name for name in job.layers if name in smaller or name in job.originals]
    return Result(job.rows(ranks, smaller), changed, tokens, losses)


def _search(
    job: Exchange, prepared: Mapping[str, Decomposition] | None, end: str, *, only_ranks: bool
) -> tuple[dict[str, int], Mapping[str, Decomposition], int]:
    """Ranks, the decompositions that they come from, and the tokens that went through the model for them.

    With ``only_ranks`` no more than the singular values is kept of the decompositions.
    """
    ask = job.ask
    how = {"method": recipe(ask.name).method, "progress": ask.progress, **ask.options}
    if ask.allocation == "fisher":
        check_gradients(job.layers, job.measured, "allocation 'fisher'")
    if prepared is None:
        prepared = job.shelf.own.kept(f"decompositions-{end}")
        rest: dict[str, Any] = {"only_ranks": only_ranks and ask.allocation not in SEARCHING, "progress": ask.progress}
        decompositions(prepared, job.model, job.layers, job.measured, ask.method, ask.options, **rest)
        job.clock.lap("decompose")
    texts = [ids[: ask.search_count] for ids in ask.domains]
    how |= {"factors": ask.factors, "shelf": job.shelf}
    ranks, tokens = same(searched(job.model, job.measured, prepared, job.ratio, ask.allocation, texts, **how))
    job.clock.lap("search")
    return ranks, prepared, tokens


def _both_ends(job: Exchange, ranks: Mapping[str, int], prepared: Mapping[str, Decomposition]) -> Statistics:
    """The statistics, their gradients averaged with those of the model compressed without following the inputs.

    The loss bends differently at the two ends of the way from the dense to the compressed model: the mean is the trapezoid
    rule. Labels at the compressed end are drawn from the dense model. So errors that are already made weigh more, which was a
    little better on three of our models (0.2 points of what ASVD-I loses).
    """
    ask, stats, shelf = job.ask, cast(Statistics, job.measured), job.shelf
    known = stats.gradients
    if ENDS not in shelf:
        draft, smaller, texts = (
            replace(job, stage="draft"),
            job.smaller(ranks),
            gradient_texts(ask.domains, others=True),
        )
        how = {"layers": list(known), "labels": _labels(job, texts), "shelf": shelf, "progress": ask.progress}
        how |= {"kind": Kind(diagonal=known[next(iter(known))].ndim == 1), "walk": "gradients-draft"}
        try:
            draft.at_once(smaller, prepared)
            fisher_into(shelf.kept(DRAFT), job.model, texts, stats.shares(len(texts)), **how)
        finally:
            draft.undo(smaller)
        shelf.put(ENDS, {})
    both = averaged(known, shelf)
    job.clock.lap("gradients")
    return stats.with_gradients(both)


def _labels(job: Exchange, texts: list[Tensor]) -> list[Tensor]:
    """What the dense model predicts after every token of the texts, drawn once."""
    labels, first = [], 0
    for number, ids in enumerate(texts):
        key = f"labels/{number}"
        if key not in job.shelf:
            with job.whole():
                job.shelf.put(key, {"ids": drawn_labels(job.model, ids, seed=job.ask.seed, first=first)})
        labels.append(job.shelf.get(key)["ids"])
        first += len(ids)
    return labels
