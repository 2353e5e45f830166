"""The sums of a model folder's files: written by ``save``, compared by ``load``.

``nsvd_manifest.json`` holds ``format_version`` and, for every other file of the folder, its ``sha256`` and ``bytes``; but not
for README.md, which people write on. It speaks of these files only. A folder without one is read unchecked; in a folder that
another program saved into afterwards, the sums no longer fit, and the file has to be deleted or the folder saved again with
``nsvd.save``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from pathlib import Path

from nsvd.stored.files import replacing, sha256
from nsvd.stored.folder import CheckpointError, read_json

NAME = "nsvd_manifest.json"
FORMAT = 1
READ = (  # what loading would read; another of these beside the files of a manifest is refused
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "adapter_config.json", "*config.json",
    "tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
)  # fmt: skip
ADVICE = f"restore the file, or delete {NAME} if another program changed the folder on purpose"

_settled: ContextVar[bool] = ContextVar("_settled", default=False)


def write(folder: Path) -> None:
    """Put the sums of the files of a folder beside them."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name not in (NAME, "README.md"))
    sums = {file.name: {"sha256": sha256(file), "bytes": file.stat().st_size} for file in files}
    text = json.dumps({"format_version": FORMAT, "files": sums}, indent=1) + "\n"
    with replacing(folder / NAME) as part:
        part.write_text(text, encoding="utf-8")


def check(folder: Path) -> None:
    """Compare every file with the manifest; a folder without one passes.

    Raises:
        CheckpointError: naming the first file that differs, is missing, or would be read and is not in it.
    """
    if os.path.lexists(folder / NAME):
        sums = _read(folder)
        _compare(folder, sums, sums)
        for file in sorted(folder.iterdir()):
            if file.name not in sums and any(fnmatchcase(file.name, pattern) for pattern in READ):
                raise CheckpointError(f"{file} is not in {NAME}; {ADVICE}")


def check_files(files: Iterable[str | Path]) -> None:
    """Compare these files of one folder with its manifest, unless ``settled``. Raises ``CheckpointError``."""
    files = [Path(file) for file in files]
    if files and not _settled.get() and os.path.lexists(files[0].parent / NAME):
        sums = _read(files[0].parent)
        _compare(files[0].parent, sums, [file.name for file in files])


@contextmanager
def settled() -> Iterator[None]:
    """``check_files`` passes within: the folder has been compared already, or is not to be."""
    token = _settled.set(True)
    try:
        yield
    finally:
        _settled.reset(token)


def _read(folder: Path) -> dict[str, dict]:
    about = read_json(folder / NAME)
    version, sums = about.get("format_version"), about.get("files")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{folder / NAME}: format_version is {version!r}, not a whole number from 1")
    if version > FORMAT:
        raise CheckpointError(f"{folder / NAME}: format {version} is newer than this nsvd reads ({FORMAT})")
    if not isinstance(sums, dict) or not sums:
        raise CheckpointError(f"{folder / NAME}: files must map file names to their sums")
    for name, entry in sums.items():
        whole = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        if not whole or name != Path(name).name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{folder / NAME}: the entry {name[:80]!r} is no file of the folder with its sum")
    return sums


def _compare(folder: Path, sums: dict[str, dict], names: Iterable[str]) -> None:
    for name in names:  # all sizes before any sum
        if name not in sums:
            raise CheckpointError(f"{folder / name} is not in {NAME}; {ADVICE}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing, and {NAME} tells of it; {ADVICE}")
        if (folder / name).stat().st_size != sums[name]["bytes"]:
            raise CheckpointError(f"{folder / name} has another size than {NAME} tells; {ADVICE}")
    for name in names:
        if sha256(folder / name) != sums[name]["sha256"]:
            raise CheckpointError(f"{folder / name} is not the file that {NAME} tells of; {ADVICE}")
