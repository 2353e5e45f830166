"""Installed packages that have another version than constraints-lock.txt names: ``python -m tests.differing``.

Nothing is printed where all are those of the lock: with these the tests have run already. torch has a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name

LOCK = Path(__file__).parents[1] / "constraints-lock.txt"


def pinned(lines: list[str]) -> dict[str, str]:
    """Name and version of every ``name==version``."""
    return {
        canonicalize_name(name): number
        for name, _, number in (line.strip().partition("==") for line in lines)
        if number
    }


def differing(here: Mapping[str, str], lock: Mapping[str, str]) -> list[str]:
    """``name lock -> here`` of those that the lock names with another version."""
    return [
        f"{name} {lock[name]} -> {here[name]}" for name in sorted(here) if name in lock and here[name] != lock[name]
    ]


if __name__ == "__main__":
    installed = {canonicalize_name(one.metadata["Name"]): one.version for one in distributions()}
    print("\n".join(differing(installed, pinned(LOCK.read_text(encoding="utf-8").splitlines()))))
