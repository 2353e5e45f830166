"""What a linear layer is to its block of a model, found by experiment: no layer, family or activation is known by name.

Neurons: h, the input of a layer, is computed one neuron and one token at a time from the outputs of its siblings (gate and
up, or one layer alone) if permuting those outputs, each token's in its own way, permutes h likewise and does nothing else. They
are apart if half of them stay what they are when the outputs of the others are zero; where a norm reads them they are not.
Values: h is linear in the output of one of several siblings if SCALE times that output makes h as much larger. Each
experiment is one pass over a few tokens, in float32, for all blocks at once; the layer under test is given its own input back, so
nothing behind it notices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nsvd.linalg.precision import double
from nsvd.walk.decoder import longest_list, place_in
from nsvd.walk.hooks import each_in_float32, evaluating, intervening
from nsvd.walk.moments import shared_inputs
from nsvd.walk.targets import targets
from nsvd.walk.text import TRIED, trial

SCALE = 256  # large: in a random model queries and keys of the usual size hardly matter
Siblings = dict[str, tuple[str, ...]]  # a layer, and the siblings that read one input earlier in the same module


@dataclass(frozen=True)
class Roles:
    """``neurons`` maps the last layer of each feed-forward to those that compute its neurons, ``outputs`` that of an
    attention to its queries, keys and values; ``apart`` are the last layers of feed-forwards whose neurons are, and ``values``
    those that are nothing but values. ``places`` tells of every layer that is in a block the block's number, and the layer's name
    in there."""

    neurons: Siblings
    apart: frozenset[str]
    outputs: Siblings
    values: frozenset[str]
    places: dict[str, tuple[int, str]]


@torch.no_grad()
def roles(model: nn.Module) -> Roles:
    """Find the feed-forwards and attentions among the target layers.

    Raises:
        ValueError: if there is no feed-forward whose neurons can change places.
    """
    layers = targets(model)
    candidates = _candidates(layers, shared_inputs(model, layers, trial(model)))
    clean = _inputs(model, candidates)
    sized = {last: first for last, first in candidates.items() if _fits(layers, last, first)}
    shuffle = {last: _shuffling(layers[last].in_features) for last in sized}
    moved = _inputs(model, sized, clean, {name: shuffle[last] for last, first in sized.items() for name in first})
    neurons = {last: first for last, first in sized.items() if _close(moved[last], shuffle[last](clean[last]))}
    if not neurons:
        raise ValueError(
            f"{type(model).__name__} has no feed-forward that can be split: no layer reads neurons that are computed, "
            "one by one, from the outputs of nn.Linear layers of the same size beside it"
        )
    halves = {last: _half(layers[last].in_features) for last in neurons}
    halved = _inputs(model, neurons, clean, {name: halves[last] for last, first in neurons.items() for name in first})
    apart = frozenset(last for last in neurons if _close(halves[last](halved[last]), halves[last](clean[last])))
    outputs, values = {last: first for last, first in candidates.items() if last not in neurons}, set()
    for i in range(max(map(len, outputs.values()), default=0)):
        tried = {last: first[i] for last, first in outputs.items() if i < len(first) > 1}
        scaled = _inputs(model, tried, clean, {name: lambda y: SCALE * y for name in tried.values()})
        values |= {name for last, name in tried.items() if _close(scaled[last], SCALE * clean[last])}
    return Roles(neurons, apart, outputs, frozenset(values), places(model, layers))


def places(model: nn.Module, layers: Iterable[str]) -> dict[str, tuple[int, str]]:
    """The number of the block that holds a layer, and the layer's name in there; layers in no block are left out."""
    found = longest_list(model)
    return {layer: place for layer in layers if found and (place := place_in(found[0], layer))}


def _candidates(layers: Mapping[str, nn.Linear], readers: Mapping[str, str]) -> Siblings:
    """Layers that come last in their module, with the siblings that read another, common input before."""
    modules: dict[str, dict[str, list[str]]] = {}
    for name in readers:  # in forward order
        modules.setdefault(name.rpartition(".")[0], {}).setdefault(readers[name], []).append(name)
    found = {}
    for inputs in modules.values():
        if len(inputs) == 2:
            first, last = inputs.values()
            if len(last) == 1:
                found[last[0]] = tuple(first)
    return found


def _fits(layers: Mapping[str, nn.Linear], last: str, first: tuple[str, ...]) -> bool:
    return {layers[name].out_features for name in first} == {layers[last].in_features}


def _inputs(
    model: nn.Module,
    names: Mapping,
    clean: Mapping[str, Tensor] | None = None,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Inputs of the named layers when outputs are changed; each layer itself goes on with its ``clean`` one."""
    seen: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            seen[name] = x.detach().clone()
            return x if clean is None else clean[name]

        return look

    found = longest_list(model)
    with (
        evaluating(model),
        each_in_float32(found[1] if found else ()),
        intervening(model, {name: hook_for(name) for name in names}, changes or {}),
    ):
        model(input_ids=trial(model), use_cache=False)
    return seen


def _shuffling(size: int) -> Callable[[Tensor], Tensor]:
    """Permute the last dimension, another way for every token."""
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(size, generator=generator) for _ in range(TRIED)])
    return lambda y: y.reshape(-1, size).gather(1, orders.to(y.device)).reshape(y.shape)


def _half(size: int) -> Callable[[Tensor], Tensor]:
    """Make every second entry of the last dimension zero."""
    left = torch.arange(size) % 2 == 0
    return lambda y: y * left.to(y.device)


def _close(x: Tensor, y: Tensor) -> bool:
    """Up to rounding: where the answer is no, the two differ by as much as they are large."""
    return bool((double(x) - double(y)).norm() <= 0.02 * double(y).norm())
