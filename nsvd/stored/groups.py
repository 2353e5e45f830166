"""The compressed layers of a model by kind: those of one name in their blocks, of one shape, and stored in one way."""

from __future__ import annotations

import re
from dataclasses import dataclass
from statistics import median_low

from torch import nn

from nsvd.stored.layers import CompressedLayer


@dataclass(frozen=True)
class Group:
    """Layers of one kind; ``place`` is their name, with * for every number."""

    place: str
    d_out: int
    d_in: int
    kind: str
    layers: list[CompressedLayer]

    @property
    def ranks(self) -> tuple[int, int, int]:
        """The smallest, the median and the largest rank."""
        ranks = sorted(layer.rank for layer in self.layers)
        return ranks[0], median_low(ranks), ranks[-1]

    @property
    def kept(self) -> float:
        """The share of the dense layers' weights that is stored."""
        weights = sum(p.numel() for layer in self.layers for p in layer.parameters() if p.ndim == 2)
        return weights / (len(self.layers) * self.d_out * self.d_in)


def groups(model: nn.Module) -> list[Group]:
    """All compressed layers, in the order of the model."""
    found: dict[tuple[str, int, int, str], Group] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, CompressedLayer):
            key = place(name), *layer.stands_for, layer.kind
            found.setdefault(key, Group(*key, [])).layers.append(layer)
    return list(found.values())


def place(name: str) -> str:
    """The name of a layer or parameter with * for every number in it."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
