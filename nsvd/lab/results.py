"""Measurements of one or several files as a table, for reading, for a spreadsheet, for a paper; and two runs beside each other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nsvd.lab.records import Records

if TYPE_CHECKING:
    import pandas as pd

FINGERPRINTS = ("weights", "statistics", "windows")  # digits that tell inputs apart
FORMATS = ("csv", "latex", "markdown")
Files = str | Path | Iterable[str | Path]


def results(files: Files, *, losses: bool = False, stale: bool = True) -> pd.DataFrame:
    """All measurements as a tidy table: one row for each measurement, one column for each parameter or number, ``file`` first.

    Args:
        files: a file of results, a folder of such files (those that end in ``.jsonl``), or several of both.
        losses: keep columns of lists, such as the loss of every window.
        stale: keep what was measured by other code than today's.

    Raises:
        FileNotFoundError: a file or folder is not there, or a folder holds no file of results.
        ValueError: a file holds something else than results; file and line are named.
    """
    import pandas as pd

    frames = []
    for file in _files([files] if isinstance(files, str | Path) else files):
        frame = Records(file).frame(stale=stale)
        frame.insert(0, "file", file.stem)
        frames.append(frame if losses else frame.loc[:, [not _of_lists(column) for _, column in frame.items()]])
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"file": []})


def written(frame: pd.DataFrame, form: str) -> str:
    """The table as text: ``csv`` has every column; ``latex`` and ``markdown`` those that differ between rows, the others above.

    Raises:
        ValueError: unknown format.
    """
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}; there are {', '.join(FORMATS)}")
    if form == "csv":
        return frame.to_csv(index=False)
    frame = frame.drop(columns=[name for name in FINGERPRINTS if name in frame]).dropna(axis=1, how="all")
    same = [name for name, column in frame.items() if len(frame) > 1 and not _varies(column)]
    shown, about = frame.drop(columns=same), ", ".join(f"{name} {frame[name].iloc[0]}" for name in same)
    cells = [[_cell(value) for value in row] for row in shown.itertuples(index=False, name=None)]
    if form == "markdown":
        rows = [list(shown), ["---"] * shown.shape[1], *cells]
        lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
        return "\n".join([about, "", *lines] if about else lines) + "\n"
    rows = [" & ".join(map(_tex, row)) + r" \\" for row in cells]
    columns = "".join("r" if shown[name].dtype.kind in "fiub" else "l" for name in shown)
    head = " & ".join(_tex(str(name)) for name in shown) + r" \\"
    table = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(["% needs \\usepackage{booktabs}", *([f"% {about}"] if about else []), *table]) + "\n"


def compared(ours: Files, theirs: Files, number: str = "perplexity") -> pd.DataFrame:
    """The results of two runs beside each other: a row a measurement that both hold, the largest change first.

    Measurements are matched by file name and all parameters, fingerprints left out; of several with the same parameters the
    last counts. ``change`` is the second over the first, less 1. Parameters that are the same in all rows are left out.

    Raises:
        FileNotFoundError, ValueError: as ``results``.
        ValueError: one of them does not hold the number, or they share no measurement.
    """
    import pandas as pd

    sides = [_measured(files, number) for files in (ours, theirs)]
    if empty := [name for name, side in zip(("first", "second"), sides, strict=True) if not side]:
        raise ValueError(f"the {empty[0]} run holds no {number}")
    first, second = sides
    rows = [
        dict(key) | {number: first[key], f"{number}, second": second[key], "change": second[key] / first[key] - 1}
        for key in first
        if key in second and first[key]
    ]
    if not rows:
        raise ValueError("the two runs share no measurement: they differ in a parameter of every one")
    frame = pd.DataFrame(sorted(rows, key=lambda row: -abs(row["change"])))
    keep = {number, f"{number}, second", "change"}
    return frame.loc[:, [name in keep or _varies(column) for name, column in frame.items()]]


def _measured(files: Files, number: str) -> dict[tuple, float]:
    """The number by file and parameters."""
    found = {}
    for file in _files([files] if isinstance(files, str | Path) else files):
        for row in Records(file).rows(stale=True):
            if isinstance(value := row["numbers"].get(number), int | float):
                told = {name: str(one) for name, one in row["parameters"].items() if name not in FINGERPRINTS}
                found[("file", file.stem), *sorted(told.items())] = value
    return found


def _files(places: Iterable[str | Path]) -> list[Path]:
    found = []
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"no file or folder of results {place}")
        inside = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
        if not inside:
            raise FileNotFoundError(f"the folder {place} holds no file of results (NAME.jsonl)")
        found += inside
    return found


def _of_lists(column: pd.Series) -> bool:
    return column.dtype == object and any(isinstance(value, list | dict) for value in column)


def _varies(column: pd.Series) -> bool:
    """Whether it holds more than one value; a missing one counts as one, too."""
    return len({str(value) for value in column}) > 1


def _cell(value: object) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return str(value)


def _tex(text: str) -> str:
    for sign in ("\\", "&", "%", "$", "#", "_", "{", "}"):
        text = text.replace(sign, r"\textbackslash " if sign == "\\" else f"\\{sign}")
    return text.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ")
