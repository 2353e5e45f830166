"""Packages that pip would install in another version than constraints-lock.txt names: ``python -m tests.differing REPORT``.

``REPORT`` is what ``pip install --dry-run --report REPORT`` wrote. Nothing is printed where all are those of the lock: with these
the tests have run already. torch has a file of its own. What JupyterLab alone needs is not looked at: no test imports it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.lowest import requirements

LOCK = Path(__file__).parents[1] / "constraints-lock.txt"
PAGES = "jupyterlab"


def pinned(lines: Iterable[str]) -> dict[str, str]:
    """Name and version of every ``name==version``."""
    return {
        canonicalize_name(name): number
        for name, _, number in (line.strip().partition("==") for line in lines)
        if number
    }


def chosen(report: Mapping, wanted: Iterable[str]) -> dict[str, str]:
    """Name and version of those that a report would install for the requirements ``wanted``, and for what these need."""
    known = {canonicalize_name(one["metadata"]["name"]): one["metadata"] for one in report["install"]}
    found, seen, left = {}, set(), [Requirement(line) for line in wanted]
    while left:
        one = left.pop()
        name = canonicalize_name(one.name)
        for extra in {"", *one.extras} if name in known else ():
            if (name, extra) not in seen:
                seen.add((name, extra))
                needs = map(Requirement, known[name].get("requires_dist", []))
                left += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
                found[name] = known[name]["version"]
    return found


def differing(here: Mapping[str, str], lock: Mapping[str, str]) -> list[str]:
    """``name lock -> here`` of those that the lock names with another version."""
    return [
        f"{name} {lock[name]} -> {here[name]}" for name in sorted(here) if name in lock and here[name] != lock[name]
    ]


if __name__ == "__main__":
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    wanted = [line for line in requirements() if Requirement(line).name != PAGES]
    print("\n".join(differing(chosen(report, wanted), pinned(LOCK.read_text(encoding="utf-8").splitlines()))))
