"""Leave out neurons of the feed-forwards, before ranks are found for what is left.

A neuron takes a row of every layer that computes it, and a column of the one that reads it. ``nsvd.linalg.neurons`` says which
go, and by how much the loss rises: in nats a token, so that one price for a parameter says how many every feed-forward loses.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nsvd.compression.exchange import Exchange
from nsvd.compression.measure import naming
from nsvd.linalg import Moments
from nsvd.linalg.asvd import ridged
from nsvd.linalg.budget import hull
from nsvd.linalg.neurons import Neurons, Removal
from nsvd.linalg.precision import double
from nsvd.stored.checkpoint import compressed_layer
from nsvd.stored.transposed import Transposed
from nsvd.walk.lazy import held, rebase
from nsvd.walk.processes import same
from nsvd.walk.roles import Siblings, roles
from nsvd.walk.shelf import Kept
from nsvd.walk.statistics import Statistics

MOST = 0.5  # of the neurons of a feed-forward that may go
MULTIPLE = 8  # of neurons that are left, as hardware likes it
REMOVALS, NARROW = "removals", "narrow-layers"  # on the shelf


def without_neurons(job: Exchange) -> Exchange:
    """The same job with smaller layers, for ``put_narrow``, and their statistics; the model is left as it is.

    Without a feed-forward, and where none had to be, it is the job itself.

    What is found of a feed-forward lies on the shelf before the next is looked at, and statistics that lie there are cut there. So
    no more than one is in memory, and an interrupted run goes on.

    Raises:
        ValueError: if no feed-forward is among the layers whole, or the model has none whose neurons are computed one by one.
    """
    found = _feed_forwards(job)
    if not found:
        return job
    narrow = _narrow(job, found, same(kept(job, found, {last: _removal(job, last) for last in found})))
    job.clock.lap("neurons")
    return narrow


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
    moments, options = _stats(job)[last], job.options
    W = double(job.layers[last].weight.detach())
    G, H = (double(x).to(W.device) for x in (moments.G, moments.slopes()))
    return Neurons(W, G, ridged(H, options["eta"], "eta"), mu=options["mu"])


def kept(job: Exchange, found: Siblings, removals: Mapping[str, Removal]) -> dict[str, Int[Tensor, " kept"]]:
    """Which neurons are left, by the last layer of each feed-forward.

    Together they remove the share of the target that is asked of them, and no more. At the margin the loss rises by the same
    everywhere, for each parameter.
    """
    edges, units = [], {}
    for last, first in found.items():
        unit = units[last] = sum(job.layers[name].in_features for name in first) + job.layers[last].out_features
        corners = hull([(-unit * gone, rise, gone) for gone, rise in enumerate(removals[last].losses.tolist())])
        edges += [((b[1] - a[1]) / (a[0] - b[0]), a[0] - b[0], last, b[2]) for a, b in pairwise(corners)]
    size = sum(layer.weight.numel() for layer in job.layers.values())
    goal, gone = job.ask.neurons * job.ask.removed * size, dict.fromkeys(found, 0)
    for _, freed, last, count in sorted(edges):
        if freed > goal:
            gone[last] += int(goal // units[last])
            break
        gone[last], goal = count, goal - freed
    chosen = {}
    for last, count in gone.items():
        n = job.layers[last].in_features
        count = n - -(-(n - count) // MULTIPLE) * MULTIPLE if n % MULTIPLE == 0 else count
        left = torch.ones(n, dtype=torch.bool)
        left[removals[last].order[:count]] = False
        chosen[last] = left.nonzero()[:, 0]
    return chosen


@torch.no_grad()
def _narrow(job: Exchange, found: Siblings, kept: Mapping[str, Tensor]) -> Exchange:
    """The job with smaller layers and their statistics."""
    stats, layers = _stats(job), dict(job.layers)
    moments: MutableMapping[str, Moments] = stats.moments if isinstance(stats.moments, Kept) else dict(stats.moments)
    gradients: MutableMapping[str, Tensor]
    gradients = stats.gradients if isinstance(stats.gradients, Kept) else dict(stats.gradients)
    originals: dict[str, nn.Linear] = {}
    for last, first in found.items():
        left, leader = kept[last], stats.inputs[last]
        if len(left) == layers[last].in_features:
            continue
        _write(job, last, first, left)
        for name in (*first, last):
            originals[name] = layers[name]
            sizes = (layers[name].in_features, len(left)) if name != last else (len(left), layers[name].out_features)
            layers[name] = _read(job, name, *sizes)
        for name in first:
            if len(gradients[name]) > len(left):  # an interrupted run may have cut it before
                gradients[name] = _cut(gradients[name], left)
        if len(moments[leader].G) > len(left):
            G, sizes = moments[leader].G, moments[leader].mean_abs
            moments[leader] = replace(
                moments[leader], G=_cut(G, left), mean_abs=None if sizes is None else _cut(sizes, left)
            )
    return replace(
        job, layers=layers, stats=Statistics(moments, stats.inputs, stats.origin, gradients), originals=originals
    )


def _write(job: Exchange, last: str, first: tuple[str, ...], kept: Tensor) -> None:
    """Put the layers of a feed-forward without the other neurons on the shelf; the last of them does what they all did."""
    keys = {name: f"{NARROW}/{name}" for name in (*first, last)}
    if all(key in job.shelf for key in keys.values()):
        return
    with held(job.place(last)[0]):
        for name, key in keys.items():
            old = job.layers[name]
            W = _neurons(job, last).refitted(kept) if name == last else old.weight[kept.to(old.weight.device)]
            bias = old.bias if name == last or old.bias is None else old.bias[kept.to(old.bias.device)]
            job.shelf.put(key, {"weight": W.to(old.weight.dtype)} | ({} if bias is None else {"bias": bias}))


def _read(job: Exchange, name: str, d_in: int, d_out: int) -> nn.Linear:
    """A layer from the shelf; without its numbers where the first one is in a file."""
    old, key = job.layers[name], f"{NARROW}/{name}"
    tensors = job.shelf.get(key)  # what an earlier run has left is compared with its sum
    new = nn.Linear(d_in, d_out, old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    if not old.weight.is_meta:
        new.load_state_dict(tensors)
    if not job.shelf.lasting:
        job.shelf.drop(key)
    return new.requires_grad_(old.weight.requires_grad).train(old.training)


def _cut(known: Tensor, kept: Tensor) -> Tensor:
    """A matrix or vector of the neurons, or the diagonal of one, without the others."""
    kept = kept.to(known.device)
    return known[kept] if known.ndim == 1 else known[kept[:, None], kept]


def _stats(job: Exchange) -> Statistics:
    return cast(Statistics, job.measured)


def put_narrow(job: Exchange) -> None:
    """Put the smaller layers in the place of the ``originals``; a block that is in a file reads them from the shelf."""
    for name in job.originals:
        file = job.shelf.file(f"{NARROW}/{name}") if job.shelf.lasting else None
        rebase(*job.place(name), job.layers[name], file)


def put_back(job: Exchange) -> None:
    """Put the ``originals`` back."""
    for name, layer in job.originals.items():
        rebase(*job.place(name), layer)


def told_sizes(job: Exchange) -> None:
    """Let every layer that has lost neurons tell what it stands for."""
    for name, old in job.originals.items():
        layer = compressed_layer(job.model, name)
        layer.stands_for, layer.transposed = (old.weight.shape[0], old.weight.shape[1]), isinstance(old, Transposed)
