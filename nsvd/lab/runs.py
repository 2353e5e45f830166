"""A folder of executed notebooks as one page to look at: thumbnails, parameters, headline numbers, and a second run beside it."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterator
from html import escape
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import nbformat

from nsvd.lab.records import Records
from nsvd.lab.results import compared
from nsvd.markup import number, table, text
from nsvd.stored.files import check_writable, replacing

if TYPE_CHECKING:
    import pandas as pd

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
article { display: flex; gap: 1.5em; border-top: 1px solid #ccc; padding: 1em 0 }
article img { width: 18em; height: auto; align-self: start }
article div { min-width: 0 } h2 { margin: 0 0 .3em; font-size: 1.15em } .failed { color: #b00 }
td, th { padding: .1em .6em; text-align: left; font-size: 90% } code { background: #f2f2f2; padding: 0 .2em }
"""


def index(folder: str | Path, other: str | Path | None = None, page: str | Path | None = None) -> Path:
    """Write a page of a folder that ``nsvd run --out`` filled, and return its path; every run under it gets a section.

    The page is ``build/runs/NAME.html`` unless ``page`` says otherwise: the folder itself, which may be under version control, is
    only read. With ``other``, the folder of a second run, the page ends with both beside each other, measurement by measurement.

    Raises:
        FileNotFoundError: a folder is not there, or holds no executed notebook.
        ValueError: a notebook or a file of results cannot be read; the two runs share no measurement.
        OSError: the page cannot be written.
    """
    folder = Path(folder)
    page = Path(page) if page else Path("build", "runs", f"{folder.resolve().name}.html")
    sections = [
        f"<h1>{escape(str(run))}</h1>{''.join(_article(file, page.parent) for file in _executed(run))}"
        for run in _runs(folder)
    ]
    check_writable(page)
    if other is not None:
        _runs(Path(other))
        sections.append(_beside(folder, Path(other)))
    html = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(folder.name)}</title><style>{STYLE}</style>'
    with replacing(page) as part:
        part.write_text(f"{html}<body>{''.join(sections)}</body></html>\n", encoding="utf-8")
    return page


def difference(folder: str | Path, other: str | Path) -> pd.DataFrame:
    """The measurements of two runs beside each other, see ``nsvd.lab.results.compared``."""
    return compared(_results(Path(folder)), _results(Path(other)))


def _runs(folder: Path) -> list[Path]:
    """The folder itself where it holds executed notebooks, and those in it that do."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    found = [one for one in (folder, *sorted(folder.iterdir())) if one.is_dir() and _executed(one)]
    if not found:
        raise FileNotFoundError(f"{folder} holds no executed notebook; nsvd run … --out {folder} puts some there")
    return found


def _executed(run: Path) -> list[Path]:
    return sorted(run.glob("*.ipynb"))


def _results(run: Path) -> Path:
    return run / "results" if (run / "results").is_dir() else run


def _article(file: Path, place: Path) -> str:
    """One notebook: its title, how it was run, its headline numbers, its last figure."""
    try:
        notebook = nbformat.read(file, as_version=4)
    except Exception as error:  # nbformat raises what its walk through the JSON happens to meet
        raise ValueError(f"{file} is not a notebook: {str(error).splitlines()[0]}") from error
    about, title = notebook.metadata.get("nsvd", {}), _title(notebook) or file.stem
    link, failed = quote(Path(os.path.relpath(file, place)).as_posix()), file.stem.endswith(".failed")
    mark = ' <span class="failed">(failed)</span>' if failed else ""
    given = ", ".join(f"<code>{escape(k)} = {escape(repr(v))}</code>" for k, v in about.get("parameters", {}).items())
    spent = f"{about['seconds']} s" if "seconds" in about else ""
    versions = ", ".join(f"{k} {v}" for k, v in about.get("origin", {}).items())
    parts = [f'<h2><a href="{link}">{escape(title)}</a>{mark}</h2>', f"<p>{given or 'default parameters'}</p>"]
    parts += [_headline(_results(file.parent) / f"{file.stem}.jsonl")]
    parts += [f"<p><small>{escape('; '.join(filter(None, (spent, versions))))}</small></p>"]
    picture = _last_figure(notebook)
    shown = f'<img alt="Last figure of {escape(title)}" src="data:image/png;base64,{picture}">' if picture else ""
    return f"<article>{shown}<div>{''.join(parts)}</div></article>"


def _title(notebook: nbformat.NotebookNode) -> str:
    first = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
    return first.splitlines()[0].lstrip("# ") if first else ""


def _last_figure(notebook: nbformat.NotebookNode) -> str | None:
    """The last picture of a notebook, as base64 text."""
    found = None
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found = output.get("data", {}).get("image/png", found)
    return found and re.sub(r"\s", "", found)


def _headline(file: Path) -> str:
    """By method or recipe and ratio the geometric mean of the perplexities of all sets, and how many sets these are."""
    cells: dict[tuple[str, object], list[float]] = {}
    for method, ratio, perplexity in _perplexities(file):
        cells.setdefault((method, ratio), []).append(perplexity)
    if not cells:
        return ""
    ratios = sorted({ratio for _, ratio in cells}, key=lambda ratio: (ratio is None, ratio or 0.0))
    means = {cell: exp(statistics.fmean(map(log, values))) for cell, values in cells.items()}
    rows = [
        [text(method), *(number(means.get((method, ratio)), "{:,.1f}") for ratio in ratios)]
        for method in dict.fromkeys(method for method, _ in cells)
    ]
    shown = table(["perplexity, mean of the sets", *("" if ratio is None else f"{ratio:g}" for ratio in ratios)], rows)
    return f"<details><summary>{len(rows)} methods at {len(ratios)} ratios</summary>{shown}</details>"


def _perplexities(file: Path) -> Iterator[tuple[str, float | None, float]]:
    if not file.is_file():
        return
    for row in Records(file).rows(stale=True):
        told, perplexity = row["parameters"], row["numbers"].get("perplexity")
        if "corpus" in told and isinstance(perplexity, float) and perplexity > 0:
            ratio = told.get("ratio", told.get("cache_ratio"))
            yield str(told.get("recipe") or told.get("method")), ratio, perplexity


def _beside(folder: Path, other: Path) -> str:
    frame = difference(folder, other)
    form = lambda name, value: f"{value:+.2%}" if name == "change" else f"{value:.3f}"  # noqa: E731
    rows = [
        [text(form(name, value) if isinstance(value, float) else value) for name, value in row.items()]
        for row in frame.to_dict("records")
    ]
    return f"<h1>{escape(str(folder))} and {escape(str(other))}</h1>{table(list(frame), rows)}"
