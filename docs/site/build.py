"""Build the site from the executed notebooks, the results and the pages beside this file: ``make site``.

    python docs/site/build.py [OUT]

writes HTML to ``build/site`` (or OUT), offline. Every warning of Sphinx is an error.

Pages of notebooks have links to Colab and Binder where the project has a public address: ``NSVD_REPOSITORY``, or Repository under
[project.urls] of pyproject.toml, such as https://github.com/OWNER/NAME.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import yaml
from nbformat.v4 import new_markdown_cell

from nsvd.lab import listing, workbook
from nsvd.lab.paths import checkout
from nsvd.lab.records import Records

HERE = Path(__file__).parent
HIDDEN = {"model", "recipe", "method", "ratio", "corpus", "weights", "windows", "begin", "statistics", "ranks", "bos"}
RUNS = ("", "real-text", "smollm2-135m")  # folders of records
FIGURE = re.compile(r'save\(figure, "(\w+)"')


def repository() -> str | None:
    """OWNER/NAME of the project on GitHub, None where it has no public address.

    Raises:
        ValueError: the address is not one of GitHub.
    """
    project = tomllib.loads((checkout() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = os.environ.get("NSVD_REPOSITORY") or project.get("urls", {}).get("Repository")
    if not address:
        return None
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    if found is None:
        raise ValueError(f"the repository is {address}, but Colab and Binder take https://github.com/OWNER/NAME")
    return found[1]


def _elsewhere(file: str) -> str:
    """Links that open a notebook in Colab and Binder; nothing where the project has no public address."""
    if (place := repository()) is None:
        return ""
    links = {
        "Colab": f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{file}",
        "Binder": f"https://mybinder.org/v2/gh/{place}/main?labpath=notebooks/{file}",
    }
    shown = " ".join(f'<a class="badge" href="{link}">Open in {name}</a>' for name, link in links.items())
    return (
        f'\n\n{shown} In Colab, run <code>%pip install "nsvd[notebooks] @ git+https://github.com/{place}"</code> first.'
    )


def prepare(source: Path) -> None:
    """Fill a folder with everything that Sphinx reads."""
    shutil.copytree(
        HERE, source, dirs_exist_ok=True, ignore=shutil.ignore_patterns("build.py", "__pycache__", "notebooks.yaml")
    )
    about = yaml.safe_load((HERE / "notebooks.yaml").read_text(encoding="utf-8"))
    (source / "notebooks/source").mkdir(parents=True)
    (source / "notebooks/executed").mkdir()
    names = []
    for file in workbook.notebooks():
        executed = checkout() / "notebooks/executed" / file.name
        if executed.is_file():
            names.append(file.stem)
            shutil.copy(file, source / "notebooks/source")
            shutil.copy(executed, source / "notebooks/executed")
            page = _page(executed, about.get(file.stem, {}))
            nbformat.write(page, source / "notebooks" / file.name)
    (source / "gallery.md").write_text(_gallery(names, about, source), encoding="utf-8")
    shutil.copy(checkout() / "figures/00_overview.png", source / "static")
    (source / "results.md").write_text(_results(), encoding="utf-8")
    tables = (checkout() / "RESULTS.md").read_text(encoding="utf-8").replace("# Results", "# Summary tables", 1)
    tables = tables.replace("(notebooks/executed)", "(gallery.md)").replace("(docs/site/", "(")
    (source / "tables.md").write_text(tables, encoding="utf-8")
    guide = (source / "guide.md").read_text(encoding="utf-8").replace("(../../notebooks/executed/", "(notebooks/")
    (source / "guide.md").write_text(guide, encoding="utf-8")


def _page(file: Path, about: dict) -> nbformat.NotebookNode:
    """An executed notebook with its code folded, its checks folded away, figures captioned, and downloads under its title."""
    notebook = nbformat.read(file, as_version=4)
    captions = about.get("figures", {})
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        tags = set(cell.metadata.get("tags", []))
        kept = bool(tags & {"parameters", "injected-parameters"})
        fold = "hide-cell" if cell is code[-1] and "assert" in cell.source else "hide-input"
        cell.metadata = nbformat.from_dict({"tags": sorted(tags | (set() if kept else {fold}))})
        if named := FIGURE.search(cell.source):
            words = captions.get(named[1], named[1].split("_", 1)[-1].replace("_", " "))
            image = {"alt": words.replace("`", "")}
            cell.metadata["mystnb"] = {"image": image, "figure": {"caption": words}}
    load = f"{{download}}`source <source/{file.name}>`, {{download}}`executed <executed/{file.name}>`"
    notebook.cells.insert(
        1,
        new_markdown_cell(f"*Download this notebook:* {load}. Code is folded: click to see it.{_elsewhere(file.name)}"),
    )
    run = notebook.metadata.get("nsvd", {})
    facts = [f"{name} {value}" for name, value in run.get("origin", {}).items()]
    facts += [f"took {run['seconds']} s"] if "seconds" in run else []
    facts += [f"parameters {run.get('parameters') or 'as declared'}"]
    notebook.cells.append(new_markdown_cell(f'<p class="footer-of-run">This run: {escape(", ".join(facts))}.</p>'))
    return notebook


def _gallery(names: list[str], about: dict, source: Path) -> str:
    (source / "static/thumbnails").mkdir()
    cards = []
    for name in names:
        one, told = listing.entry(checkout() / f"notebooks/{name}.ipynb"), about.get(name, {})
        pictures = (
            [told["picture"]]
            if "picture" in told
            else sorted(p.stem for p in (checkout() / "figures").glob(f"{name[:2]}_*.png"))
        )
        image = ""
        if pictures and (figure := checkout() / f"figures/{pictures[-1]}.png").is_file():
            _thumbnail(figure, source / f"static/thumbnails/{name}.png")
            words = told.get("figures", {}).get(pictures[-1], one.question).replace("`", "")
            image = f'<img loading="lazy" src="_static/thumbnails/{name}.png" alt="{escape(words)}">'
        finding = re.sub(r"`(.*?)`", r"<code>\1</code>", escape(told.get("finding", "")))
        cards.append(f'<a href="notebooks/{name}.html">{image}<b>{escape(one.question)}</b><span>{finding}</span></a>')
    tree = "\n".join(f"notebooks/{name}" for name in names)
    return (
        f'# Gallery\n\nEvery notebook with its main finding.\n\n<div class="gallery">{"".join(cards)}</div>\n\n'
        f"```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{tree}\n```\n"
    )


def _thumbnail(figure: Path, target: Path) -> None:
    from PIL import Image

    with Image.open(figure) as picture:
        picture.thumbnail((560, 360))
        picture.save(target, optimize=True)


def _results() -> str:
    """A page of one table: every perplexity that the workbook has measured."""
    rows = []
    for file in (file for run in RUNS for file in sorted((checkout() / "data/results" / run).glob("*.jsonl"))):
        for row in Records(file).rows(stale=True):
            told, numbers = row["parameters"], row["numbers"]
            if "corpus" in told and isinstance(numbers.get("perplexity"), float):
                method = told.get("recipe") or told.get("method")
                rest = [f"{n} {told[n]}" for n in told if n not in HIDDEN and told[n] not in (None, "", False)]
                rows.append((file.stem[:2], told.get("model", ""), method, _plain(told.get("ratio")), told["corpus"],
                             f"{numbers['perplexity']:.2f}", f"{numbers['perplexity'] * (numbers.get('standard_error') or 0):.2f}",
                             ", ".join(rest)))  # fmt: skip
    heads = (("notebook", True), ("model", True), ("method", True), ("ratio", True), ("set", True), ("perplexity", False),
             ("± standard error", False), ("other parameters", False))  # fmt: skip
    head = "".join(f"<th{' data-filter' if menu else ''}>{name}</th>" for name, menu in heads)
    number = {3, 5, 6}
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{' class=number' if i in number else ''}>{escape(str(c))}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    table = f'<table class="results"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'
    return (
        f"# Results\n\nAll {len(rows):,} perplexities that the notebooks have measured. Click a title to sort, choose from a menu "
        "to filter.\n`nsvd results data/results --format csv` writes all records.\n\n"
        f'<div class="results-scroll">{table}</div>\n'
    )


def _plain(value: object) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)


def build(out: Path) -> int:
    """Write the site into a folder; what was there before is replaced. Returns Sphinx's exit code."""
    with TemporaryDirectory() as scratch:
        prepare(Path(scratch) / "source")
        made = Path(scratch) / "html"
        command = [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-W",
            "--keep-going",
            "-b",
            "html",
            f"{scratch}/source",
            str(made),
        ]
        code = subprocess.run(command).returncode
        if code == 0:
            shutil.rmtree(made / ".doctrees", ignore_errors=True)
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(made, out)
    return code


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else checkout() / "build/site"
    failed = build(target)
    print("failed" if failed else f"site: {target}/index.html")
    sys.exit(failed)
