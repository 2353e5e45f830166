"""Tensors that wait on a shelf, in a row or by name, and are read one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from nsvd.walk.shelf import Shelf


class Row(Sequence):
    """Tensors by number, under a name on a shelf; as many as there is ``room`` for, in bytes, stay on the GPU where they are."""

    def __init__(self, shelf: Shelf, name: str, *, room: int = 0):
        self.shelf, self.name, self._count = shelf, name, 0
        self._room, self._here = room, {}

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._here[index] if index in self._here else self.shelf.get(f"{self.name}/{index}")[""]

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._drop(index)
        if tensor.device.type != "cpu" and tensor.nbytes <= self._room:
            self._here[index], self._room = tensor.detach(), self._room - tensor.nbytes
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
            self._room += self._here.pop(index).nbytes
        else:
            self.shelf.drop(f"{self.name}/{index}")


class Waiting(MutableMapping[str, Any]):
    """Tensors, or nests of them, by name: they wait on a shelf, and each comes back to the device that it came from."""

    def __init__(self, shelf: Shelf, key: str):
        self.shelf, self.key, self._forms = shelf, key, {}

    def __setitem__(self, name: str, value: object) -> None:
        leaves, form = tree_flatten(value)
        tensors = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        self.shelf.put(f"{self.key}/{name}", tensors)
        self._forms[name] = form, [leaf.device if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def __getitem__(self, name: str) -> Any:
        form, leaves = self._forms[name]
        found = self.shelf.get(f"{self.key}/{name}")
        leaves = [found[str(i)].to(leaf) if str(i) in found else leaf for i, leaf in enumerate(leaves)]
        return tree_unflatten(leaves, form)

    def __delitem__(self, name: str) -> None:
        del self._forms[name]
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
