"""Write under a temporary name, move into place when whole; tell tensors apart."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


def short_name(source: str | Path) -> str:
    """A hub id or the name of an embedded model as it is; of a folder its last part, which tells nothing of the machine."""
    path = Path(source)
    return path.resolve().name if path.is_absolute() or path.is_dir() else str(source)


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """Give a fresh path beside ``target`` to write a file or a folder to; rename it to ``target`` on success.

    When the block raises, what was written is removed and ``target`` stays as it was. An existing target folder is
    exchanged, not merged. Where ``target`` is a symbolic link, what it points to is replaced.
    """
    target = Path(target).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    _remove(part)
    try:
        yield part
        if target.is_dir() and not part.is_dir():
            raise IsADirectoryError(f"{target} is a folder; a file was to be written there")
        if target.is_dir():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
            try:
                part.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old)
        else:
            part.replace(target)
    finally:
        _remove(part)


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Twelve hexadecimal digits that change with any of the tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
