"""The cache among the arguments and results of a model, known by its type: its name differs between releases of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import cast

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer


def cache_in(args: tuple, kwargs: Mapping) -> Cache | None:
    """The cache among the arguments of a call, wherever it stands; None where there is none.

    Raises:
        ValueError: for an argument that takes keys and values like a cache (it has an ``update``), but is none of transformers.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            return value
        if callable(getattr(value, "update", None)) and not isinstance(value, Mapping):
            raise ValueError(f"a {type(value).__name__} is no cache of transformers, so it cannot hold latents")
    return None


def with_cache(args: tuple, kwargs: Mapping, other: object) -> tuple[tuple, dict]:
    """The arguments of a call with ``other`` in the place of the cache."""

    def exchange(value):
        return other if isinstance(value, Cache) else value

    return tuple(exchange(value) for value in args), {name: exchange(value) for name, value in kwargs.items()}


def caches_of(output: Mapping) -> dict[str, Cache]:
    """The caches that a model has returned, by the names under which it takes them again.

    Raises:
        ValueError: if it has returned none.
    """
    found = {name: value for name, value in output.items() if isinstance(value, Cache)}
    if not found:
        raise ValueError(f"the model was run with use_cache, but its {type(output).__name__} holds no cache")
    return found


class Reserved(DynamicLayer):
    """A layer of a cache with room for so many tokens: a new one is written into it, and what is there stays where it is.

    The layer that it stands for copies all that it holds at every token. It takes over what that one holds.
    """

    def __init__(self, layer: DynamicLayer, room: int):
        super().__init__()
        keys, values = cast(tuple[Tensor, Tensor], (layer.keys, layer.values))  # None before the first token alone
        self.lazy_initialization(keys, values)
        self._rooms = [t.new_empty(*t.shape[:-2], room, t.shape[-1]) for t in (keys, values)]
        self.update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keys and values (count, heads, tokens, d) of all tokens, the new ones last."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., begin:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return self.keys, self.values


def reserve(caches: Mapping[str, Cache], room: int) -> None:
    """Make room for so many tokens in all layers that hold every token; those that forget, or hold states, stay as they are."""
    for one in caches.values():
        layers = getattr(one, "layers", [])
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer and layer.get_seq_length():
                layers[index] = Reserved(layer, room)


def input_of(layer: nn.Module, args: tuple, kwargs: Mapping) -> Tensor | None:
    """The first argument of a call of the layer, by its place or by its name: the hidden states."""
    return args[0] if args else kwargs.get(_first_parameter(type(layer)))


@cache
def _first_parameter(kind: type[nn.Module]) -> str:
    return list(inspect.signature(kind.forward).parameters)[1]
