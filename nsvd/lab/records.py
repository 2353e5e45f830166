"""Results as JSON lines: parameters, numbers, and where they came from."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
from functools import cache
from pathlib import Path

import pandas as pd

from nsvd.model.files import replacing
from nsvd.model.report import versions

_PACKAGE = Path(__file__).resolve().parent.parent


@cache
def origin() -> dict[str, str]:
    """Versions, the commit, and a hash of the code that computes (``nsvd/linalg``, ``nsvd/model``, the evaluation)."""
    files = sorted([*_PACKAGE.glob("linalg/*.py"), *_PACKAGE.glob("model/*.py"), _PACKAGE / "lab/evaluation.py"])
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    git = ["git", "-C", str(_PACKAGE), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return versions() | {"commit": commit, "code": code}


class Records:
    """A file of results, one JSON line each, found again by their parameters.

    A record made by other code than today's does not count as found, nor, with ``fresh``, one made before; it is
    replaced when it is measured again.
    """

    def __init__(self, file: str | Path, *, fresh: bool = False):
        self.file, self._rows, self._stale = Path(file), {}, set()
        if self.file.exists():
            for row in self._read():
                key = _key(row["parameters"])
                self._rows[key] = row
                if fresh or row["origin"].get("code") != origin()["code"]:
                    self._stale.add(key)

    def _read(self) -> list[dict]:
        """All rows; a last line that a kill has cut short is taken out of the file."""
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            with replacing(self.file) as part:
                part.write_text("".join(lines), encoding="utf-8")
        try:
            return [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.file} is not a file of results: {error}") from error

    def find(self, **parameters) -> dict | None:
        """The numbers recorded for exactly these parameters by today's code, or None."""
        key = _key(parameters)
        return None if key in self._stale or key not in self._rows else self._rows[key]["numbers"]

    def add(self, parameters: dict, numbers: dict) -> dict:
        """Write a record, in place of an older one of the same parameters; returns the numbers."""
        row = {"parameters": parameters, "numbers": finite(numbers), "origin": origin()}
        key = _key(parameters)
        known = key in self._rows
        self._rows[key] = row
        self._stale.discard(key)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if known:
            with replacing(self.file) as part:
                part.write_text("".join(map(_line, self._rows.values())), encoding="utf-8")
        else:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(_line(row))
        return row["numbers"]

    def frame(self, *, stale: bool = False) -> pd.DataFrame:
        """All records that count as found, a column for every parameter and number; with ``stale`` the others, too."""
        rows = (row for key, row in self._rows.items() if stale or key not in self._stale)
        return pd.DataFrame([row["parameters"] | row["numbers"] for row in rows])


def finite(numbers: dict) -> dict:
    """The same with None, JSON's null, in place of NaN and infinities."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}


def _key(parameters: dict) -> str:
    return json.dumps(parameters, sort_keys=True, ensure_ascii=False)


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
