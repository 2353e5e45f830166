"""Write under a temporary name, move into place when whole; tell tensors apart."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import torch
from safetensors import SafetensorError
from torch import Tensor

from nsvd.stored.locks import locked

_PART = ".part"  # ends the name of the hidden folder
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_OPEN = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
_RUST = re.compile(r"([^:]*) \(os error \d+\)")  # how tokenizers and safetensors tell an error of the system


def short_name(source: str | Path) -> str:
    """A hub id or the name of an embedded model as it is; of a folder its last part, which tells nothing of the machine."""
    path = Path(source)
    return path.resolve().name if path.is_absolute() or path.is_dir() else str(source)


def reached(target: str | Path) -> Path:
    """``target``, or where it lies once the folders on the way are made: ``old`` for ``new/../old`` if ``new`` is not there."""
    path = Path(target)
    return path if os.path.lexists(path) else path.resolve()


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """Give a fresh path to write a file or a folder to; put it in the place of ``target`` on success.

    What is written lies in a hidden folder beside ``target`` until the block ends. It is then synced to disk and put in
    place in one step: a killed process leaves the old or the new, whole. When the block raises, ``target`` stays as it
    was. What earlier runs left that were killed is removed.

    An existing target folder is exchanged, not merged. Where ``target`` is a symbolic link, what it points to is
    replaced. A device, a pipe and a file that is our standard output are written into, not replaced.

    Raises:
        OSError: if the file or folder cannot be written; names ``target``.
    """
    with _told_of(target):
        place = reached(target)
        if _is_stream(place):
            with TemporaryDirectory() as scratch:
                part = Path(scratch) / place.name
                yield part
                _write_into(place, part)
            return
        place = place.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        _recover(place)
        with _hidden(place.parent, place.name) as (folder, mode):
            part = folder / place.name
            yield part
            _settle(part, mode)
            _put(part, place, spare=folder / "old")
            _sync(place.parent)


@contextmanager
def beside(target: str | Path) -> Iterator[Path]:
    """Give a fresh path beside ``target``, for a folder that is needed while something is made that will be ``target``.

    It goes when the block ends. What a killed process leaves of it is removed by the next one that replaces ``target``.

    Raises:
        OSError: if nothing can be written there; names ``target``.
    """
    place = reached(target).resolve()
    with _told_of(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        _recover(place)
    with _hidden(place.parent, place.name) as (folder, _):
        yield folder / place.name


def check_writable(target: str | Path, *, folder: bool = False) -> None:
    """Raise ``OSError`` before any work is done if ``replacing`` cannot put a file (or a ``folder``) at ``target``."""
    place = reached(target)
    if _is_stream(place):
        if folder:
            raise NotADirectoryError(f"cannot write {target}: it is a device or a pipe, not a folder")
        if not os.access(place, os.W_OK):
            raise PermissionError(f"cannot write {target}: no permission")
        return
    place = place.resolve()
    if place.is_dir() and not folder:
        raise IsADirectoryError(f"cannot write {target}: there is a folder of that name")
    if place.is_dir() and place.is_mount():
        raise OSError(f"cannot write {target}: a file system is mounted there; choose a folder inside it")
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    try:
        with _hidden(parent, place.name):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write {target}: {parent} is not a writable folder ({reason})") from error


def sync(descriptor: int) -> None:
    """Bring what was written to disk; where the system cannot, as with a device, it is left to itself."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise


def sha256(file: Path) -> str:
    """The sum of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Twelve hexadecimal digits that change with any of the tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


@contextmanager
def _told_of(target: str | Path) -> Iterator[None]:
    """Make one ``OSError`` that names ``target`` of whatever a library raises when it cannot write."""
    try:
        yield
    except BrokenPipeError:  # whoever reads has seen enough
        raise
    except OSError as error:
        if error.errno is None and (type(error) is not OSError or str(error).startswith("cannot write")):
            raise  # a sentence of somebody else
        kind = type(OSError(error.errno, ""))
        elsewhere = error.filename is not None and f"{_PART}{os.sep}" not in os.fsdecode(error.filename)
        reason = f"{error.strerror or error}{f': {error.filename}' if elsewhere else ''}"
        raise kind(f"cannot write {target}: {reason}") from error
    except Exception as error:
        told = _RUST.search(str(error))
        if told is None and not isinstance(error, SafetensorError):
            raise
        raise OSError(f"cannot write {target}: {told[1].strip() if told else error}") from error


def _is_stream(target: str | Path) -> bool:
    """Whether there is something to write into there, not to replace: a device, a pipe, a file that we have open."""
    try:
        found = os.stat(target)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not stat.S_ISDIR(found.st_mode) and (not stat.S_ISREG(found.st_mode) or _descriptor(target) is not None)


def _descriptor(target: str | Path) -> int | None:
    """The descriptor, one of our standard streams or one given by number, behind which ``target`` is open."""
    by_number = _OPEN.fullmatch(os.path.abspath(target))
    for descriptor in (1, 2, *([int(by_number[1])] if by_number else [])):
        with suppress(OSError):  # closed
            if os.path.samestat(os.fstat(descriptor), os.stat(target)):
                return descriptor
    return None


def _write_into(target: str | Path, part: Path) -> None:
    if part.is_dir():
        raise NotADirectoryError(f"cannot write {target}: it is a device or a pipe, not a folder")
    descriptor = _descriptor(target)
    for ours in (sys.stdout, sys.stderr):
        ours.flush()  # what was said before comes before
    descriptor = os.open(target, os.O_WRONLY) if descriptor is None else os.dup(descriptor)
    with os.fdopen(descriptor, "wb") as stream, part.open("rb") as written:
        shutil.copyfileobj(written, stream)


@contextmanager
def _hidden(parent: Path, name: str) -> Iterator[tuple[Path, int]]:
    """A folder for what is to become ``parent/name``, locked while we live, and the mode that a new file has there."""
    while True:
        folder = Path(mkdtemp(prefix=f".{name}.", suffix=_PART, dir=parent))
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            try:
                stack.enter_context(locked(folder / "lock"))
            except FileNotFoundError:  # another run took the folder for one left behind
                continue
            yield folder, stat.S_IMODE((folder / "lock").stat().st_mode)
            return


def _recover(place: Path) -> None:
    """Remove what killed runs left beside ``place``; an old folder that one had moved away is put back."""
    ours = re.compile(rf"\.{re.escape(place.name)}\.\w{{8}}{re.escape(_PART)}")
    for folder in [entry for entry in place.parent.iterdir() if ours.fullmatch(entry.name)]:
        with suppress(OSError):  # not ours to remove, or another run removes it
            if {entry.name for entry in folder.iterdir()} <= {"lock", "old", place.name}:
                with locked(folder / "lock", wait=False) as mine:
                    if mine is not None and (folder / "old").is_dir() and not os.path.lexists(place):
                        (folder / "old").rename(place)
                    if mine is not None:
                        shutil.rmtree(folder)


def _settle(part: Path, mode: int) -> None:
    """Give all files the mode that a new file has (safetensors makes them 0600), and bring everything to disk."""
    for path in [*part.rglob("*"), part]:
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
        _sync(path)


def _sync(path: Path) -> None:
    with suppress(PermissionError):  # Windows opens no folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)


def _put(part: Path, place: Path, *, spare: Path) -> None:
    """Let ``part`` take the place; a folder that was there ends at ``part`` or, after a kill, at ``spare``."""
    if place.is_dir() and not part.is_dir():
        raise IsADirectoryError(f"cannot write {place}: it is a folder; a file was to be written there")
    if place.is_file() and part.is_dir():
        raise NotADirectoryError(f"cannot write {place}: it is a file; a folder was to be written there")
    if not place.is_dir():
        part.replace(place)
    elif not _exchange(part, place):
        place.rename(spare)
        try:
            part.rename(place)
        except BaseException:
            spare.rename(place)
            raise
        spare.rename(part)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or its file system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if swap is None:
        return False
    if swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number))
