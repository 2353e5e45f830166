"""``compress_`` by a method that factors whole layers: leave out neurons, find ranks where they are not known, exchange layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from torch import Tensor

from nsvd.compression.exchange import Exchange
from nsvd.compression.measure import DRAFT, ENDS, averaged, check_gradients, decompositions, gradient_texts, naming
from nsvd.compression.ranks import SEARCHING, searched
from nsvd.compression.request import recipe
from nsvd.linalg import Decomposition
from nsvd.linalg.asvd import ridged
from nsvd.linalg.neurons import MOST, Neurons, Removal, kept
from nsvd.linalg.precision import double
from nsvd.walk.gradient_sums import Kind
from nsvd.walk.gradients import drawn_labels, fisher_into
from nsvd.walk.lazy import held, rebase
from nsvd.walk.narrow import file_of, is_written, narrow, tell_sizes, write_narrow
from nsvd.walk.processes import same
from nsvd.walk.roles import Siblings, roles
from nsvd.walk.soundness import check_exchanged, check_runs
from nsvd.walk.statistics import Statistics

REMOVALS = "removals"  # on the shelf


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
            tell_sizes(job.model, job.originals)
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


def without_neurons(job: Exchange) -> Exchange:
    """The same job with smaller layers, for ``put_narrow``, and their statistics; the model is left as it is.

    ``nsvd.linalg.neurons`` says which neurons go, and by how much the loss rises: in nats a token, so that one price for a
    parameter says how many every feed-forward loses. Without a feed-forward, and where none had to be, it is the job itself.

    What is found of a feed-forward lies on the shelf before the next is looked at, and statistics that lie there are cut there. So
    no more than one is in memory, and an interrupted run goes on.

    Raises:
        ValueError: if no feed-forward is among the layers whole, or the model has none whose neurons are computed one by one.
    """
    found = _feed_forwards(job)
    if not found:
        return job
    left = same(neurons_kept(job, found, {last: _removal(job, last) for last in found}))
    found = {last: first for last, first in found.items() if len(left[last]) < job.layers[last].in_features}
    for last, first in found.items():
        if not is_written(job.shelf, last, first):
            with held(job.place(last)[0]):
                write_narrow(job.shelf, job.layers, last, first, left[last], _neurons(job, last).refitted(left[last]))
    layers, stats, originals = narrow(job.layers, cast(Statistics, job.measured), found, left, job.shelf)
    job.clock.lap("neurons")
    return replace(job, layers=layers, stats=stats, originals=originals)


def _feed_forwards(job: Exchange) -> Siblings:
    """The feed-forwards that are among the layers whole and can lose neurons; none only where that is ``optional``."""
    try:
        known = roles(job.model)
    except ValueError:
        if not job.ask.optional:
            raise
        return {}
    found = {last: first for last, first in known.neurons.items() if {last, *first} <= job.layers.keys()}
    apart = {last: first for last, first in found.items() if last in known.apart}
    if not (apart or job.ask.optional):
        raise ValueError(
            f"neurons cannot be left out of {type(job.model).__name__}: what one of them gives depends on the others"
            if found
            else "neurons are left out of feed-forwards, and none of them is among the layers whole"
        )
    return apart


def _removal(job: Exchange, last: str) -> Removal:
    """In which order the neurons of a feed-forward go."""
    key = f"{REMOVALS}/{last}"
    if key not in job.shelf:
        with held(job.place(last)[0]), naming(last):
            found = _neurons(job, last).removal(int(MOST * job.layers[last].in_features))
        job.shelf.put(key, found._asdict())
    return Removal(**job.shelf.get(key))


def _neurons(job: Exchange, last: str) -> Neurons:
    moments, options = cast(Statistics, job.measured)[last], job.options
    W = double(job.layers[last].weight.detach())
    G, H = (double(x).to(W.device) for x in (moments.G, moments.slopes()))
    return Neurons(W, G, ridged(H, options["eta"], "eta"), mu=options["mu"])


def neurons_kept(job: Exchange, found: Siblings, removals: Mapping[str, Removal]) -> dict[str, Tensor]:
    """Which neurons are left, by the last layer of each feed-forward, when their share of what is to go has gone."""
    layers = job.layers
    units = {
        last: sum(layers[f].in_features for f in first) + layers[last].out_features for last, first in found.items()
    }
    goal = job.ask.neurons * job.ask.removed * sum(layer.weight.numel() for layer in layers.values())
    return kept(removals, {last: layers[last].in_features for last in found}, units, goal)


def put_narrow(job: Exchange) -> None:
    """Put the smaller layers in the place of the ``originals``; a block that is in a file reads them from the shelf."""
    for name in job.originals:
        rebase(*job.place(name), job.layers[name], file_of(job.shelf, name))


def put_back(job: Exchange) -> None:
    """Put the ``originals`` back."""
    for name, layer in job.originals.items():
        rebase(*job.place(name), layer)
