"""The installed packages of pyproject.toml's ranges that are newer than in constraints-lock.txt: ``python -m tests.newer``.

Nothing is printed where all are those of the lock: with these the tests have run already.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.utils import canonicalize_name

from tests.lowest import requirements

LOCK = Path(__file__).parents[1] / "constraints-lock.txt"


def pinned(lines: list[str]) -> dict[str, str]:
    """Name and version of every ``name==version``."""
    return {
        canonicalize_name(name): number
        for name, _, number in (line.strip().partition("==") for line in lines)
        if number
    }


def newer(names: list[str], here: Mapping[str, str], lock: Mapping[str, str]) -> list[str]:
    """``name lock -> here`` of those that are here with another version."""
    return [f"{n} {lock.get(n, '—')} -> {here[n]}" for n in names if n in here and here[n] != lock.get(n)]


def installed(names: list[str]) -> dict[str, str]:
    """Versions of those that are."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    ours = [line.partition(">=")[0] for line in requirements() if not line.startswith("torch>")]
    print("\n".join(newer(ours, installed(ours), pinned(LOCK.read_text(encoding="utf-8").splitlines()))))
