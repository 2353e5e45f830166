"""Results as JSON lines: parameters, numbers, and where they came from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nsvd.compression.report import versions
from nsvd.stored.files import replacing, sync
from nsvd.stored.locks import locked

if TYPE_CHECKING:
    import pandas as pd

DOCUMENTS = "documents"  # measured: of windows, the documents that they are from
_PACKAGE = Path(__file__).resolve().parent.parent
ALIKE = _PACKAGE.parent / "data/results/alike.json"


@cache
def origin() -> dict[str, str]:
    """Versions, the commit, and a hash of the code that computes: every room but ``lab``, and the evaluation."""
    rooms = [file for file in _PACKAGE.glob("*/*.py") if file.parent.name != "lab"]
    files = sorted([*rooms, _PACKAGE / "lab/evaluation.py"])
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    git = ["git", "-C", str(_PACKAGE), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return versions() | {"commit": commit, "code": code}


def codes() -> set[str]:
    """The hash of today's code, and those of earlier code that is known to give the same numbers.

    ``data/results/alike.json`` names them: ``{"code": today's, "alike": [earlier ones], "shown": "how"}``. It is for a change of
    speed or memory alone, once records have been measured again and came out the same. The next change of code ends it.
    """
    today, told = origin()["code"], _alike(ALIKE)
    return {today, *(told["alike"] if told.get("code") == today else ())}


@cache
def _alike(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


class Records:
    """A file of results, one JSON line each, found again by their parameters.

    A record made by code that is not among ``codes`` does not count as found, nor, with ``fresh``, one made before; it is
    replaced when it is measured again. Of ``times`` only those by today's code count. Several processes can add to one file at the
    same time.

    Raises:
        ValueError: if a line is not a result; names file and line. A last line that a kill has cut short is let go.
        OSError: if the file cannot be read or written.
    """

    def __init__(self, file: str | Path, *, fresh: bool = False, times: bool = False):
        self.file, self._rows, self._times = Path(file), {}, times
        if self.file.exists():
            self._rows, _ = self._parse(self.file.read_bytes())
        self._before = set(map(_line, self._rows.values())) if fresh else set()

    def _parse(self, text: bytes) -> tuple[dict[str, dict], bool]:
        """All rows by their parameters, and whether the last line lacks its end."""
        *lines, tail = text.split(b"\n")
        rows = {}
        for number, line in enumerate([*lines, tail] if tail else lines, 1):
            try:
                row = _row(line)
            except ValueError as error:
                if number > len(lines):
                    break
                raise ValueError(f"{self.file} is not a file of results: line {number}: {error}") from error
            rows[_key(row["parameters"])] = row
        return rows, bool(tail)

    def _counts(self, row: dict) -> bool:
        known = {origin()["code"]} if self._times else codes()
        return row["origin"].get("code") in known and _line(row) not in self._before

    def find(self, **parameters) -> dict | None:
        """The numbers recorded for exactly these parameters by today's code, or code like it, or None."""
        row = self._rows.get(_key(parameters))
        return row["numbers"] if row and self._counts(row) else None

    def found(self, **parameters) -> dict:
        """As ``find``, of a record that is there.

        Raises:
            KeyError: if it is not.
        """
        numbers = self.find(**parameters)
        if numbers is None:
            raise KeyError(f"{self.file} has no record of {parameters}")
        return numbers

    def add(self, parameters: dict, numbers: dict) -> dict:
        """Write a record, in place of an older one of the same parameters; returns the numbers.

        What other processes have added since is kept, and found from now on. When the write fails, the file is what it
        was, and the record is not found.
        """
        row = {"parameters": parameters, "numbers": finite(numbers), "origin": origin()}
        key, line = _key(parameters), _line(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.file) as descriptor:
            assert descriptor is not None, "who waits gets the lock"
            rows, cut = self._parse(self.file.read_bytes())
            if cut or key in rows:
                with replacing(self.file) as part:
                    part.write_bytes(b"".join(map(_line, (rows | {key: row}).values())))
            else:
                self._append(descriptor, line)
        self._rows = rows | {key: row}
        self._before.discard(line)
        return row["numbers"]

    def _append(self, descriptor: int, line: bytes) -> None:
        size = os.fstat(descriptor).st_size
        try:
            while line:  # at once, but for a disk that is full
                line = line[os.write(descriptor, line) :]
            sync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise OSError(f"cannot write {self.file}: {error.strerror}") from error

    def rows(self, *, stale: bool = False) -> list[dict[str, dict]]:
        """All records that count as found, each of ``parameters``, ``numbers`` and ``origin``; with ``stale`` the others, too."""
        return [row for row in self._rows.values() if stale or self._counts(row)]

    def frame(self, *, stale: bool = False) -> pd.DataFrame:
        """All records that count as found, a column for every parameter and number; with ``stale`` the others, too.

        What says of windows which ``documents`` they are from is no row: it is joined to the rows of these windows.
        """
        import pandas as pd

        rows, known = [], {}
        for row in self.rows(stale=stale):
            about = row["parameters"]
            if about.get("measure") == DOCUMENTS:
                known[about["corpus"], about["windows"]] = row["numbers"]
            else:
                rows.append(row)
        places = [(row["parameters"].get("corpus"), row["parameters"].get("windows")) for row in rows]
        told = (row["parameters"] | row["numbers"] | known.get(at, {}) for row, at in zip(rows, places, strict=True))
        cells = (row.items() for row in told)
        return pd.DataFrame([{_whole(name): _whole(value) for name, value in row} for row in cells])


def finite(numbers: dict) -> dict:
    """The same with None, JSON's null, in place of NaN and infinities, in lists and dictionaries too."""
    return {name: _finite(value) for name, value in numbers.items()}


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return finite(value)
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole(value: object) -> object:
    """A lone surrogate in a text, which has no place in a table, escaped."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _key(parameters: dict) -> str:
    return json.dumps(parameters, sort_keys=True, ensure_ascii=False)


def _line(row: dict) -> bytes:
    """In UTF-8; a lone surrogate, which has no place there, is escaped as JSON escapes it."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _row(line: bytes) -> dict:
    """A line read; raises ``ValueError`` if it is not a result."""
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    parts = ("parameters", "numbers", "origin")
    if not isinstance(row, dict) or not all(isinstance(row.get(part), dict) for part in parts):
        raise ValueError("expected an object of parameters, numbers and origin")
    return row
