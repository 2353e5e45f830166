"""Where tensors wait that would be too many for memory, and what an interrupted run is resumed from."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from tempfile import mkstemp
from typing import Any, cast

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsvd.linalg import Decomposition, Moments
from nsvd.linalg.decomposition import Oblique, Orthogonal, Spectrum
from nsvd.walk import processes

LIMIT = 2**28  # bytes kept in memory by default; what comes later goes to files

_ENDING = ".safetensors"
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Moments, Orthogonal, Oblique, Spectrum)}


class Shelf:
    """Groups of tensors by key, with a note each (whatever JSON holds).

    Without a folder they are kept in memory up to ``limit`` bytes. What comes later goes to files that are mapped into memory and
    have no name once they are written: the system frees them with the tensors, also of a process that is killed. With a ``folder``
    every group is a file there: it appears whole or not at all, and a later shelf on the same folder finds it. What such a
    shelf finds is compared with its sum when it is first read.

    Several processes that work ``together`` share a folder. All of them make the same calls, and only process 0 writes; when
    they go on all see it. What each of them has for itself is on the shelf ``own``.
    """

    def __init__(self, folder: Path | None = None, *, limit: int = LIMIT, common: bool = True):
        self.lasting, self.limit, self._folder = folder is not None, limit, folder
        self._common, self._spill = common and self.lasting, None  # a folder for files without a name
        self._held: dict[str, tuple[dict[str, Tensor], dict, int]] = {}  # tensors, note, bytes of memory
        self._bytes, self._ours = 0, set()

    @property
    def _place(self) -> Path:
        """The folder of a shelf that lasts."""
        return cast(Path, self._folder)

    @cached_property
    def own(self) -> Shelf:
        """Where this process keeps what is its own; this very shelf where it is alone, or the shelf does not last."""
        if not self._common or processes.count() == 1:
            return self
        return Shelf(self._place / f"rank-{processes.rank()}-of-{processes.count()}", common=False)

    def scratch(self) -> Shelf:
        """An empty shelf for what is of no use to a later run. Its files, where it needs any, lie in the folder of this one."""
        new = Shelf(limit=self.limit)
        new._spill = self.own._folder if self.lasting else self._spill
        return new

    def put(self, key: str, tensors: Mapping[str, Tensor], **note) -> None:
        """Keep a group; one of the same key is replaced."""
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        if self.lasting:
            self._once(lambda: self._write(key, tensors, note))
            processes.see(self.file(key))
            self._ours.add(key)
            return
        self.drop(key)
        size = _size(tensors)
        if self._bytes + size > self.limit:
            tensors, size = _mapped(tensors, self._spill), 0
        self._held[key], self._bytes = (tensors, note, size), self._bytes + size

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of a group, on the CPU.

        Raises:
            KeyError: if there is no such group.
            OSError: if its file is not what was written.
        """
        return self._read(key)[0]

    def note(self, key: str) -> dict:
        """What ``put`` was told beside the tensors; raises as ``get``."""
        return self._read(key)[1]

    def __contains__(self, key: str) -> bool:
        return key in self._held or (self.lasting and self.file(key).is_file())

    def drop(self, key: str) -> None:
        """Forget a group, if it is there."""
        if key in self._held:
            self._bytes -= self._held.pop(key)[2]
        elif self.lasting:
            self._once(lambda: self.file(key).unlink(missing_ok=True))

    def begun(self, *apart: str) -> bool:
        """Whether there is any group in the folder but those."""
        files = self._place.rglob(f"*{_ENDING}") if self.lasting else ()
        return any(file.relative_to(self._place).as_posix().removesuffix(_ENDING) not in apart for file in files)

    def clear(self) -> None:
        """Forget all groups."""
        self._held, self._bytes, self._ours = {}, 0, set()
        if self.lasting:
            self._once(lambda: shutil.rmtree(self._place, ignore_errors=True))

    def file(self, key: str) -> Path:
        """Where a group is, or would be, in the folder of a shelf that lasts."""
        return self._place / f"{key}{_ENDING}"

    def kept(self, name: str) -> Kept:
        """A mapping whose values lie on this shelf under ``name``."""
        return Kept(self, name)

    def keys(self, prefix: str) -> list[str]:
        """The keys that begin with ``prefix/``, in order."""
        here = [key for key in self._held if key.startswith(f"{prefix}/")]
        folder = self._place / prefix if self.lasting else None
        if folder is not None and folder.is_dir():
            here += [f"{prefix}/{file.name.removesuffix(_ENDING)}" for file in folder.glob(f"*{_ENDING}")]
        return sorted(here)

    def _once(self, act: Callable[[], object]) -> None:
        """Change the folder: one process does, where several share it."""
        if self._common:
            processes.once(act)
        else:
            act()

    @contextmanager
    def _opened(self, key: str) -> Iterator[safe_open]:
        if not self.lasting or not self.file(key).is_file():
            raise KeyError(f"nothing is kept under {key}")
        try:
            with safe_open(self.file(key), "pt") as stored:
                yield stored
        except SafetensorError as error:
            raise self._damaged(key) from error

    def _damaged(self, key: str) -> OSError:
        return OSError(f"{self.file(key)} is not what was written there; remove {self._place.parent} to begin anew")

    def _write(self, key: str, tensors: dict[str, Tensor], note: dict) -> None:
        file = self.file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        _save(tensors, part, {"note": json.dumps(note), "sum": _sum(tensors, note)})
        os.replace(part, file)
        self._ours.add(key)

    def _read(self, key: str) -> tuple[dict[str, Tensor], dict]:
        if key in self._held:
            return self._held[key][:2]
        with self._opened(key) as stored:
            about = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        note = json.loads(about["note"])
        if key not in self._ours:
            if about["sum"] != _sum(tensors, note):
                raise self._damaged(key)
            self._ours.add(key)
        return tensors, note


class Kept(MutableMapping[str, Any]):
    """Tensors, moments or decompositions by name, on a shelf; the one read last stays in memory."""

    def __init__(self, shelf: Shelf, name: str):
        self.shelf, self.name = shelf, name
        self._last: tuple[str | None, Any] = (None, None)

    def __setitem__(self, key: str, value: Tensor | Moments | Decomposition | Spectrum) -> None:
        kind, note = type(value).__name__, {}
        if isinstance(value, Tensor):
            tensors = {"": value}
        else:
            parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            first = {id(part): name for name, part in reversed(parts.items())}
            tensors = {n: part for n, part in parts.items() if isinstance(part, Tensor) and first[id(part)] == n}
            note = {n: part for n, part in parts.items() if not isinstance(part, Tensor)}
            note |= {n: f"= {first[id(part)]}" for n, part in parts.items() if first[id(part)] != n and n not in note}
        self.shelf.put(f"{self.name}/{key}", tensors, kind=kind, parts=note)
        self._last = (None, None)

    def __getitem__(self, key: str) -> Any:
        if self._last[0] == key:
            return self._last[1]
        at = f"{self.name}/{key}"
        if at not in self.shelf:
            raise KeyError(key)
        tensors, note = self.shelf._read(at)
        kind = _KINDS.get(note["kind"])
        value = tensors[""] if kind is None else kind(**tensors | _filled(note["parts"], tensors))
        self._last = (key, value)
        return value

    def __delitem__(self, key: str) -> None:
        self.shelf.drop(f"{self.name}/{key}")
        self._last = (None, None)

    def __contains__(self, key: object) -> bool:
        return f"{self.name}/{key}" in self.shelf

    def __iter__(self) -> Iterator[str]:
        return iter([key.removeprefix(f"{self.name}/") for key in self.shelf.keys(self.name)])

    def __len__(self) -> int:
        return len(self.shelf.keys(self.name))


def _filled(parts: dict, tensors: dict[str, Tensor]) -> dict:
    """The parts of a value that are no tensors of their own: numbers, None, and other names of one tensor."""
    same = lambda part: isinstance(part, str) and part.startswith("= ")  # noqa: E731
    return {name: tensors[part[2:]] if same(part) else part for name, part in parts.items()}


def _mapped(tensors: Mapping[str, Tensor], folder: Path | None) -> dict[str, Tensor]:
    """The same tensors in a file, of the folder or of the system's temporary one, which loses its name at once."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    place, name = mkstemp(prefix="nsvd-", dir=folder)
    os.close(place)
    try:
        _save(tensors, Path(name), {})
        with safe_open(name, "pt") as stored:
            return {key: stored.get_tensor(key) for key in tensors}
    finally:
        with suppress(PermissionError):  # Windows keeps the name of a file in use
            os.unlink(name)


def _save(tensors: Mapping[str, Tensor], file: Path, about: dict[str, str]) -> None:
    try:
        save_file(dict(tensors), file, metadata=about)
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _sum(tensors: Mapping[str, Tensor], note: dict) -> str:
    told = json.dumps([note, [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)]])
    digest = xxhash.xxh3_128(told.encode())  # as fast as memory: it tells of damage, not of malice
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
