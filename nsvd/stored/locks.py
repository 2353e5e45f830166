"""A file held by one process at a time. The kernel gives it free when the process ends, however it ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None


@contextmanager
def locked(file: str | Path, *, wait: bool = True, sure: bool = True) -> Iterator[int | None]:
    """Hold ``file``, made if it is not there, and give its descriptor, which reads all of it and appends.

    Where there are no locks (Windows, some network file systems), it is given without one. With ``wait=False`` the
    descriptor is None unless the lock is surely ours; without ``sure``, it is None only if another process has the lock.
    """
    descriptor = _open(file, wait, sure)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open(file: str | Path, wait: bool, sure: bool) -> int | None:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if _hold(descriptor, wait, sure):
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                        return descriptor
            elif not wait:
                os.close(descriptor)
                return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another process has put a new file in the place of this one, or removed it


def _hold(descriptor: int, wait: bool, sure: bool) -> bool:
    if fcntl is None:
        return wait or not sure
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:  # another has it, or the file system has no locks
        return wait or (not sure and error.errno not in (errno.EWOULDBLOCK, errno.EACCES))
    return True
