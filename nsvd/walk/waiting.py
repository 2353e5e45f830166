"""Tensors that wait on a shelf, in a row or by name, and are read one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from nsvd.walk.memory import Room
from nsvd.walk.shelf import Shelf


class Row(Sequence):
    """Tensors by number, under a name on a shelf; as many as there is ``room`` for stay on the GPU where they are."""

    def __init__(self, shelf: Shelf, name: str, room: Room):
        self.shelf, self.name, self._count = shelf, name, 0
        self._room, self._here = room, {}

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._here[index] if index in self._here else self.shelf.get(f"{self.name}/{index}")[""]

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._drop(index)
        if self._room.take(tensor):
            self._here[index] = tensor.detach()
        else:
            self.shelf.put(f"{self.name}/{index}", {"": tensor})

    def __len__(self) -> int:
        return self._count

    def fill(self, tensors: Iterable[Tensor]) -> None:
        """These in the place of what was there."""
        count, before = 0, self._count
        for count, tensor in enumerate(tensors, 1):
            self[count - 1] = tensor
        self._count = count
        for index in range(count, before):
            self._drop(index)

    def _drop(self, index: int) -> None:
        if index in self._here:
            self._room.leave(self._here.pop(index))
        else:
            self.shelf.drop(f"{self.name}/{index}")


class Waiting(MutableMapping[str, Any]):
    """Tensors, or nests of them, by name. What finds no ``room`` waits on a shelf, and comes back to the device it came from."""

    def __init__(self, shelf: Shelf, key: str, room: Room):
        self.shelf, self.key, self._room = shelf, key, room
        # of each nest its form, its leaves (the devices of those on the shelf), and whether any is on the shelf
        self._forms: dict[str, Any] = {}

    def __setitem__(self, name: str, value: object) -> None:
        if name in self:
            del self[name]
        leaves, form = tree_flatten(value)
        away: dict[str, Tensor] = {}
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            if self._room.take(leaf):
                leaves[i] = leaf.detach()
            else:
                away[str(i)], leaves[i] = leaf, leaf.device
        if away:
            self.shelf.put(f"{self.key}/{name}", away)
        self._forms[name] = form, leaves, bool(away)

    def __getitem__(self, name: str) -> Any:
        form, leaves, away = self._forms[name]
        found = self.shelf.get(f"{self.key}/{name}") if away else {}
        leaves = [found[str(i)].to(leaf) if str(i) in found else leaf for i, leaf in enumerate(leaves)]
        return tree_unflatten(leaves, form)

    def __delitem__(self, name: str) -> None:
        _, leaves, _ = self._forms.pop(name)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self._room.leave(leaf)
        self.shelf.drop(f"{self.key}/{name}")

    def __contains__(self, name: object) -> bool:
        return name in self._forms

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._forms))

    def __len__(self) -> int:
        return len(self._forms)

    def clear(self) -> None:
        """Drop all of them, unread."""
        for name in list(self._forms):
            del self[name]
