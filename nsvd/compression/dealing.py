"""The layers of a block are dealt over the processes: who factors which, and how the others come to the result."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nsvd.stored.checkpoint import describe, empty_layer
from nsvd.stored.layers import CompressedLayer
from nsvd.walk.processes import count, dealt, rank, same
from nsvd.walk.targets import by_block


def owners(model: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[str, int]:
    """The process that decomposes each layer: every block is dealt by itself, as blocks come one after the other."""
    found: dict[str, int] = {}
    for names in by_block(model, layers).values():
        found |= dealt({name: _cost(layers[name]) for name in names})
    return found


def is_mine(owner: Mapping[str, int], name: str) -> bool:
    """Whether this process has the layer to do."""
    return owner[name] == rank()


@torch.no_grad()
def told(
    made: Mapping[str, nn.Module], owner: Mapping[str, int], dense: Mapping[str, nn.Linear]
) -> dict[str, nn.Module]:
    """What takes the place of each ``dense`` layer, from the process that owns it and has ``made`` it."""
    if count() == 1:
        return dict(made)
    new = {}
    for name, layer in dense.items():
        spec, state = same(_packed(made[name]) if name in made else None, owner[name])
        new[name] = made[name] if name in made else _unpacked(name, layer, spec, state)
    return new


def _cost(layer: nn.Linear) -> float:
    """Of a decomposition, in proportion."""
    d_out, d_in = layer.weight.shape
    return float(d_out * d_in * (d_out + d_in))


def _packed(layer: CompressedLayer) -> tuple[dict, dict[str, Tensor]]:
    return describe(layer), {name: value.cpu().clone() for name, value in layer.state_dict().items()}


def _unpacked(name: str, layer: nn.Linear, spec: dict, state: dict[str, Tensor]) -> CompressedLayer:
    new = empty_layer(name, layer, spec).requires_grad_(layer.weight.requires_grad)
    new.load_state_dict(state)
    return new.train(layer.training)
