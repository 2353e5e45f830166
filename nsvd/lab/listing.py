"""What notebooks there are: the question of each, its parameters, how long it takes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nbformat

from nsvd.lab.parameters import Parameter, described

START = re.compile(
    r"\*\*Start here\*\*: change `(\w+)` in the next cell, then `(\w+)`.* Running time: (about [^.\n]+)\."
)


@dataclass(frozen=True)
class Entry:
    """A notebook as it tells of itself; ``seconds`` is what its last execution took, None where it is not known."""

    name: str
    question: str
    start: tuple[str, ...]  # the parameters to change first
    time: str
    seconds: int | None
    parameters: list[Parameter]


def entry(source: Path, executed: Path | None = None) -> Entry:
    """What a source notebook tells, and how long the run in the folder ``executed`` took.

    Raises:
        ValueError: the file is not a notebook.
    """
    parameters = described(source)
    first = next(iter(nbformat.read(source, as_version=4).cells), {}).get("source", "")
    start, ran = START.search(first), None if executed is None else executed / source.name
    seconds = (
        nbformat.read(ran, as_version=4).metadata.get("nsvd", {}).get("seconds") if ran and ran.is_file() else None
    )
    title = first.splitlines()[0].lstrip("# ") if first else ""
    return Entry(
        source.stem, title, start.groups()[:2] if start else (), start[3] if start else "", seconds, parameters
    )


def told(entries: Iterable[Entry]) -> str:
    """The list as text: every notebook's question and time in two lines, then a line a parameter."""
    return "\n\n".join("\n".join(_lines(one)) for one in entries)


def _lines(one: Entry) -> list[str]:
    times = [one.time] if one.time else []
    times += [f"the last run here took {one.seconds} s"] if one.seconds is not None else []
    first = [f"start with {' and '.join(one.start)}"] if one.start else []
    name, kind, default = (
        max((len(getattr(p, part)) for p in one.parameters), default=0) for part in ("name", "kind", "default")
    )
    default = min(default, 44)
    rows = [f"    {p.name:{name}}  {p.kind:{kind}}  {p.default:{default}}  {p.help}" for p in one.parameters]
    return [f"{one.name}  {one.question}", f"    {'; '.join(times + first)}", *rows]
