"""Which part of which layer SoLA factors: what a neuron is, what counts as prime, and what stays dense altogether."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from nsvd.linalg import Moments
from nsvd.linalg.sola import COLUMNS, ROWS, WHOLE, Block, by_size, n_prime
from nsvd.walk.roles import Roles


def blocks(
    layers: Mapping[str, nn.Linear],
    found: Roles,
    stats: Mapping[str, Moments] | None,
    settings: Mapping,
    ratio: float | None = None,
) -> dict[str, Block]:
    """The block of every layer that is compressed, in the order of the model.

    Neurons are ranked by mean |h|, the inputs of the last layer of their feed-forward. Left out are the ``keep_outer`` first
    and last blocks of the model, the values unless ``compress_v``, and the outputs of attention for a ratio below
    ``o_from``.
    """
    chosen, known = dict.fromkeys(layers, WHOLE), cast(Mapping[str, Moments], stats)  # see ``check_statistics``
    for last, first in found.neurons.items():
        prime = n_prime(layers[last].in_features, float(settings["prime"]))
        if prime:
            order = by_size(known[last].scale())
            chosen |= {name: Block(order, prime, ROWS) for name in first} | {last: Block(order, prime, COLUMNS)}
    kept = outer(found.places, settings["keep_outer"])
    kept |= set() if settings["compress_v"] else found.values
    kept |= set(found.outputs) if ratio is not None and ratio < settings["o_from"] else set()
    return {name: block for name, block in chosen.items() if name not in kept}


def outer(places: Mapping[str, tuple[int, str]], keep: int) -> set[str]:
    """Layers of the first and last ``keep`` blocks that hold any of the layers."""
    order = sorted({number for number, _ in places.values()})
    ends = {*order[:keep], *order[max(len(order) - keep, 0) :]}
    return {layer for layer, (number, _) in places.items() if number in ends}
