"""Leave out neurons of the feed-forwards, before ranks are found for what is left.

A neuron takes a row of every layer that computes it, and a column of the one that reads it. ``nsvd.linalg.neurons`` says which
go, and by how much the loss rises: in nats a token, so that one price for a parameter says how many every feed-forward loses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from nsvd.stored.layers import CompressedLayer, NarrowLinear
from nsvd.stored.transposed import Transposed
from nsvd.walk.processes import same
from nsvd.walk.roles import Siblings, roles
from nsvd.walk.statistics import Statistics

MOST = 0.5  # of the neurons of a feed-forward that may go
MULTIPLE = 8  # of neurons that are left, as hardware likes it


def without_neurons(job: Exchange) -> Exchange:
    """The same job with smaller layers, which are to be put in the place of its ``originals``.

    Raises:
        ValueError: if no feed-forward is among the layers whole, or the model has none whose neurons are computed one by one.
    """
    found = {last: first for last, first in roles(job.model).neurons.items() if {last, *first} <= job.layers.keys()}
    if not found:
        raise ValueError("neurons are left out of feed-forwards, and none of them is among the layers whole")
    removals = {}
    for last in found:
        with naming(last):
            removals[last] = _neurons(job, last).removal(int(MOST * job.layers[last].in_features))
    narrow = _narrow(job, found, same(kept(job, found, removals)))
    job.clock.lap("neurons")
    return narrow


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


def _narrowed(job: Exchange, last: str, first: tuple[str, ...], kept: Tensor) -> Iterator[tuple[str, Tensor, Moments]]:
    """Weights and moments of the layers of a feed-forward without the other neurons."""
    for name in first:
        moments = _stats(job)[name]
        H, rows = moments.slopes(), kept.to(moments.slopes().device)
        H = H[rows] if H.ndim == 1 else H[rows][:, rows]
        yield name, double(job.layers[name].weight)[kept], replace(moments, H=H)
    moments = _stats(job)[last]
    there = kept.to(moments.G.device)
    sizes = None if moments.mean_abs is None else moments.mean_abs[there]
    left = replace(moments, G=moments.G[there][:, there], mean_abs=sizes)
    yield last, _neurons(job, last).refitted(kept), left


@torch.no_grad()
def _narrow(job: Exchange, found: Siblings, kept: Mapping[str, Tensor]) -> Exchange:
    """The job with smaller layers and their statistics; the model is left as it is."""
    stats, layers = _stats(job), dict(job.layers)
    moments, gradients = dict(stats.moments), dict(stats.gradients)
    originals: dict[str, nn.Linear] = {}
    for last, first in found.items():
        if len(kept[last]) == layers[last].in_features:
            continue
        for name, W, left in _narrowed(job, last, first, kept[last]):
            old = originals[name] = layers[name]
            bias = old.bias if name == last or old.bias is None else old.bias[kept[last].to(old.bias.device)]
            layers[name] = _linear(old, W, bias)
            gradients[name] = left.slopes()
            moments[stats.inputs[name]] = replace(left, H=None)
    left_over = Statistics(moments, stats.inputs, stats.origin, gradients)
    return replace(job, layers=layers, stats=left_over, originals=originals)


def _stats(job: Exchange) -> Statistics:
    return cast(Statistics, job.measured)


def _linear(old: nn.Linear, W: Tensor, bias: Tensor | None) -> nn.Linear:
    new = nn.Linear(W.shape[1], W.shape[0], bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    new.weight.copy_(W)
    if bias is not None:
        new.bias.copy_(bias)
    new.requires_grad_(old.weight.requires_grad)
    return new.train(old.training)


def told_sizes(job: Exchange) -> None:
    """Let every layer that has lost neurons be one that a checkpoint can tell of."""
    for name, old in job.originals.items():
        layer = job.model.get_submodule(name)
        if not isinstance(layer, CompressedLayer):
            layer = NarrowLinear.of(cast(nn.Linear, layer))
            job.model.set_submodule(name, layer)
        layer.stands_for, layer.transposed = (old.weight.shape[0], old.weight.shape[1]), isinstance(old, Transposed)
