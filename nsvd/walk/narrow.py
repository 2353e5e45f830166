"""The layers of a feed-forward without some of its neurons, and their statistics.

A neuron takes a row of every layer that computes it, and a column of the one that reads it. Smaller layers wait on a shelf for
their place in the model; where the shelf lasts they stay there, and a layer that is in a file is never in memory beside others.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsvd.linalg import Moments
from nsvd.stored.checkpoint import compressed_layer
from nsvd.stored.transposed import Transposed
from nsvd.walk.roles import Siblings
from nsvd.walk.shelf import Kept, Shelf
from nsvd.walk.statistics import Statistics

NARROW = "narrow-layers"  # on the shelf


class Narrow(NamedTuple):
    """All layers, some of them smaller, with their statistics, and the ``originals`` of those that are."""

    layers: dict[str, nn.Linear]
    stats: Statistics
    originals: dict[str, nn.Linear]


@torch.no_grad()
def write_narrow(
    shelf: Shelf,
    layers: Mapping[str, nn.Linear],
    last: str,
    first: tuple[str, ...],
    kept: Int[Tensor, " kept"],
    refitted: Float[Tensor, "d_out kept"],
) -> None:
    """Put the layers of a feed-forward with the ``kept`` neurons on the shelf; the last one is ``refitted`` to them."""
    for name in (*first, last):
        old = layers[name]
        W = refitted if name == last else old.weight[kept.to(old.weight.device)]
        bias = old.bias if name == last or old.bias is None else old.bias[kept.to(old.bias.device)]
        shelf.put(f"{NARROW}/{name}", {"weight": W.to(old.weight.dtype)} | ({} if bias is None else {"bias": bias}))


def is_written(shelf: Shelf, last: str, first: tuple[str, ...]) -> bool:
    """Whether all layers of a feed-forward are there."""
    return all(f"{NARROW}/{name}" in shelf for name in (*first, last))


@torch.no_grad()
def narrow(
    layers: Mapping[str, nn.Linear], stats: Statistics, neurons: Siblings, kept: Mapping[str, Tensor], shelf: Shelf
) -> Narrow:
    """All layers, those of the ``neurons`` from the shelf, and their statistics.

    Statistics that lie on a shelf are cut there. An interrupted run may have cut some before.
    """
    moments: MutableMapping[str, Moments] = stats.moments if isinstance(stats.moments, Kept) else dict(stats.moments)
    gradients: MutableMapping[str, Tensor]
    gradients = stats.gradients if isinstance(stats.gradients, Kept) else dict(stats.gradients)
    new, originals = dict(layers), {}
    for last, first in neurons.items():
        left, leader = kept[last], stats.inputs[last]
        for name in (*first, last):
            old = originals[name] = layers[name]
            new[name] = _read(
                shelf, name, old, *((len(left), old.out_features) if name == last else (old.in_features, len(left)))
            )
        for name in first:
            if len(gradients[name]) > len(left):
                gradients[name] = _cut(gradients[name], left)
        if len(moments[leader].G) > len(left):
            G, sizes = _cut(moments[leader].G, left), moments[leader].mean_abs
            moments[leader] = replace(moments[leader], G=G, mean_abs=None if sizes is None else _cut(sizes, left))
    return Narrow(new, Statistics(moments, stats.inputs, stats.origin, gradients), originals)


def _read(shelf: Shelf, name: str, old: nn.Linear, d_in: int, d_out: int) -> nn.Linear:
    """A layer from the shelf; without its numbers where the first one is in a file."""
    key = f"{NARROW}/{name}"
    tensors = shelf.get(key)  # what an earlier run has left is compared with its sum
    new = nn.Linear(d_in, d_out, old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    if not old.weight.is_meta:
        new.load_state_dict(tensors)
    if not shelf.lasting:
        shelf.drop(key)
    return new.requires_grad_(old.weight.requires_grad).train(old.training)


def _cut(known: Tensor, kept: Tensor) -> Tensor:
    """A matrix or vector of the neurons, or the diagonal of one, without the others."""
    kept = kept.to(known.device)
    return known[kept] if known.ndim == 1 else known[kept[:, None], kept]


def file_of(shelf: Shelf, name: str) -> Path | None:
    """Where the numbers of a smaller layer stay, if they do."""
    return shelf.file(f"{NARROW}/{name}") if shelf.lasting else None


def tell_sizes(model: nn.Module, originals: Mapping[str, nn.Linear]) -> None:
    """Let every layer that has lost neurons tell what it stands for."""
    for name, old in originals.items():
        layer = compressed_layer(model, name)
        layer.stands_for, layer.transposed = (old.weight.shape[0], old.weight.shape[1]), isinstance(old, Transposed)
