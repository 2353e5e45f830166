"""Which part of which layer SoLA factors: what a neuron is, what counts as prime, and what stays dense altogether."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from nsvd.linalg.sola import COLUMNS, ROWS, WHOLE, Block, by_size, n_prime
from nsvd.walk.moments import Statistics
from nsvd.walk.roles import Roles


def blocks(
    layers: Mapping[str, nn.Linear], found: Roles, stats: Statistics, settings: Mapping, ratio: float | None = None
) -> dict[str, Block]:
    """The block of every layer that is compressed, in the order of the model.

    Neurons are ranked by mean |h|, the inputs of the last layer of their feed-forward. Left out are the ``keep_outer`` first
    and last blocks of the model, the values unless ``compress_v``, and the outputs of attention for a ratio below
    ``o_from``.
    """
    chosen = dict.fromkeys(layers, WHOLE)
    for last, first in found.neurons.items():
        prime = n_prime(layers[last].in_features, float(settings["prime"]))
        if prime:
            order = by_size(stats[last].mean_abs)
            chosen |= {name: Block(order, prime, ROWS) for name in first} | {last: Block(order, prime, COLUMNS)}
    kept = outer(layers, settings["keep_outer"])
    kept |= set() if settings["compress_v"] else found.values
    kept |= set(found.outputs) if ratio is not None and ratio < settings["o_from"] else set()
    return {name: block for name, block in chosen.items() if name not in kept}


def outer(layers: Mapping[str, nn.Linear], keep: int) -> set[str]:
    """Layers of the first and last ``keep`` blocks, by the first number in their names."""
    if keep < 0:
        raise ValueError(f"keep_outer is {keep}, but it counts blocks")
    numbers = {name: int(number[0]) for name in layers if (number := re.search(r"(?<![^.])\d+(?![^.])", name))}
    order = sorted(set(numbers.values()))
    ends = set(order[:keep]) | set(order[max(len(order) - keep, 0) :])
    return {name for name, number in numbers.items() if number in ends}


def kind(name: str) -> str:
    """A layer's name without its block's number: layers of one kind get one rank."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name, count=1)
