"""Decompositions that are kept for later, and what they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from nsvd.linalg import Decomposition, Method, SplitMethod
from nsvd.stored.files import fingerprint
from nsvd.walk.statistics import Statistics


@dataclass(frozen=True)
class Prepared(Mapping[str, Decomposition]):
    """What ``prepare`` returns: a mapping from layer name to decomposition that knows its outer step, weights and statistics."""

    layers: dict[str, Decomposition]
    outer: dict  # the step and its options, see ``Method.outer_step``
    weights: str  # fingerprint
    moments: str | None  # fingerprint of those that the step looks at

    def __getitem__(self, name: str) -> Decomposition:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def describing(
    layers: Mapping[str, nn.Linear], stats: Statistics | None, method: Method | SplitMethod, options: dict
) -> tuple[dict, str, str | None]:
    """The outer step, and fingerprints of the weights and of the moments that it looks at."""
    return method.outer_step(options), _weights(layers), _moments(layers, stats, method)


def check_prepared(
    prepared: object,
    layers: Mapping[str, nn.Linear],
    stats: Statistics | None,
    method: Method | SplitMethod,
    options: dict,
) -> None:
    """Raise ``ValueError`` unless this is what ``prepare`` returns for these layers, statistics, method and options."""
    check_step(prepared, layers, method, options)
    if cast(Prepared, prepared).moments != _moments(layers, stats, method):
        raise ValueError("prepared was made for other statistics than those given")


def check_step(prepared: object, layers: Mapping[str, nn.Linear], method: Method | SplitMethod, options: dict) -> None:
    """The same where the statistics are not known: another kind of thing, outer step or weights is refused."""
    if not isinstance(prepared, Prepared):
        raise ValueError(f"prepared is a {type(prepared).__name__}, but what prepare() returns is wanted")
    outer = method.outer_step(options)
    if prepared.outer != outer:
        raise ValueError(f"prepared is for {_said(prepared.outer)}, but {method.label} asks for {_said(outer)}")
    if prepared.weights != _weights(layers):
        raise ValueError("prepared was made for other weights than this model's")


def _said(outer: Mapping) -> str:
    return ", ".join(f"{name} {value}" for name, value in outer.items())


def _weights(layers: Mapping[str, nn.Linear]) -> str:
    return fingerprint(layer.weight for layer in layers.values())


def _moments(layers: Mapping[str, nn.Linear], stats: Statistics | None, method: Method | SplitMethod) -> str | None:
    if not method.needs_moments or stats is None:
        return None
    looked_at = {}  # each once, though several layers share it
    for name in layers:
        if name in stats:
            one = stats[name]
            for values in (one.G, one.mean_abs, one.H if method.needs_gradients else None):
                if values is not None:
                    looked_at[id(values)] = values
    return fingerprint(looked_at.values())
