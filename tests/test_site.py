"""The site: pages, links, formulas, tables; built offline and without a warning, where Sphinx is installed."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml

import nsvd
from nsvd.lab import listing, workbook
from nsvd.lab.paths import checkout

for library in ("sphinx", "myst_nb", "furo"):
    pytest.importorskip(library, reason="the site needs Sphinx: pip install 'nsvd[site]'")

EXECUTED = [s.stem for s in workbook.notebooks() if (checkout() / "notebooks/executed" / s.name).is_file()]
PAGES = ("index", "guide", "theory", "methods", "gallery", "tables", "results", "api", "references")


class Page(HTMLParser):
    """Names, links, sources and pictures of a page, and its text outside of code."""

    def __init__(self, file: Path):
        super().__init__()
        self.ids, self.links, self.loaded, self.alts, self.tags, self.words = set(), [], [], [], [], []
        self._code = 0
        self.feed(file.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.tags.append(tag)
        self._code += tag in ("pre", "code", "script", "style", "math")
        self.ids |= {told[name] for name in ("id", "name") if told.get(name)}
        if tag == "a" and told.get("href"):
            self.links.append(told["href"])
        if tag in ("script", "img", "iframe") and told.get("src"):
            self.loaded.append(told["src"])
        if tag == "link" and "stylesheet" in told.get("rel", ""):
            self.loaded.append(told["href"])
        if tag == "img":
            self.alts.append(told.get("alt"))

    def handle_endtag(self, tag):
        self._code -= tag in ("pre", "code", "script", "style", "math")

    def handle_data(self, data):
        if not self._code:
            self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site; every warning is an error. One that was built already is in ``NSVD_SITE``."""
    if built := os.environ.get("NSVD_SITE"):
        return Path(built)
    out = tmp_path_factory.mktemp("site") / "html"
    done = subprocess.run(
        [sys.executable, str(checkout() / "docs/site/build.py"), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {file: Page(file) for file in sorted(site.rglob("*.html"))}


def test_every_page_is_there(site):
    missing = [
        name for name in [*PAGES, *(f"notebooks/{n}" for n in EXECUTED)] if not (site / f"{name}.html").is_file()
    ]
    assert missing == []


def test_the_reference_has_every_public_name():
    text = (checkout() / "docs/site/api.md").read_text(encoding="utf-8")
    assert [name for name in nsvd.__all__ if not re.search(rf"\bnsvd\.{name}\b", text) and name != "__version__"] == []


def test_every_link_leads_somewhere(site, pages):
    """To a file of the site and, with #name, to a place on it; links to other sites are not followed."""
    broken = []
    for file, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            place = unquote(parts.fragment)
            if not target.is_file() or (place and target in pages and place not in pages[target].ids):
                broken.append(f"{file.relative_to(site)}: {link}")
    assert broken == []


def test_nothing_is_fetched_from_elsewhere(site, pages):
    """No script, style or picture of another site, in pages or style sheets."""
    assert [link for page in pages.values() for link in page.loaded if urlsplit(link).netloc] == []
    styles = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert "url(http" not in styles
    assert "@import" not in styles


def test_formulas_are_mathml(site, pages):
    """None is left as TeX."""
    assert pages[site / "theory.html"].tags.count("math") > 20
    left = {
        file.name: word.strip()
        for file, page in pages.items()
        for word in page.words
        if "$$" in word or "\\lVert" in word or "\\operatorname" in word
    }
    assert left == {}


def test_every_page_is_small_enough(site):
    assert {f.name: f.stat().st_size for f in site.rglob("*.html") if f.stat().st_size > 3e6} == {}


@pytest.mark.parametrize("name", EXECUTED)
def test_a_notebook_can_be_read_downloaded_and_left_for_the_next(site, pages, name):
    """Pictures say what they show, code and checks are folded, source and executed notebook can be had."""
    page = pages[site / f"notebooks/{name}.html"]
    assert None not in page.alts
    assert page.tags.count("details") > 3
    text = (site / f"notebooks/{name}.html").read_text(encoding="utf-8")
    assert sum(link.endswith(f"{name}.ipynb") for link in page.links) == 2
    assert 'class="prev-page"' in text or 'class="next-page"' in text
    assert "This run:" in text


def build():
    """The program that builds the site, as a module."""
    spec = importlib.util.spec_from_file_location("build_site", checkout() / "docs/site/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("address", ["https://github.com/someone/nsvd", "https://github.com/someone/nsvd.git"])
def test_a_notebook_opens_in_colab_and_binder_where_the_project_has_an_address(monkeypatch, address):
    """The links lead to a source notebook; Binder finds what to install."""
    monkeypatch.setenv("NSVD_REPOSITORY", address)
    file = workbook.notebooks()[0]
    told = build()._elsewhere(file.name)
    assert f"colab.research.google.com/github/someone/nsvd/blob/main/notebooks/{file.name}" in told
    assert f"mybinder.org/v2/gh/someone/nsvd/main?labpath=notebooks/{file.name}" in told
    assert "nsvd[notebooks] @ git+https://github.com/someone/nsvd" in told
    asked = (checkout() / "binder/requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all((checkout() / "binder" / line.split()[1]).is_file() for line in asked if line.startswith("-c"))


def test_without_an_address_there_is_no_link_to_colab(monkeypatch):
    """None is invented; one that is not of GitHub is refused."""
    monkeypatch.delenv("NSVD_REPOSITORY", raising=False)
    urls = tomllib.loads((checkout() / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    assert bool(build()._elsewhere("00_overview.ipynb")) == ("Repository" in urls)
    monkeypatch.setenv("NSVD_REPOSITORY", "https://example.org/nsvd")
    with pytest.raises(ValueError, match=r"example\.org"):
        build()._elsewhere("00_overview.ipynb")


def test_the_gallery_leads_to_every_notebook(site, pages):
    page = pages[site / "gallery.html"]
    assert {f"notebooks/{name}.html" for name in EXECUTED} <= set(page.links)
    questions = {listing.entry(checkout() / f"notebooks/{name}.ipynb").question for name in EXECUTED}
    assert questions <= {word.strip() for word in page.words}


def test_the_table_of_results_has_every_perplexity(site, pages):
    records = sum(
        line.count('"perplexity": ') and '"corpus": ' in line
        for file in (checkout() / "data/results").rglob("*.jsonl")
        if file.parent.name != "speed"
        for line in file.read_text(encoding="utf-8").splitlines()
    )
    page = pages[site / "results.html"]
    assert page.tags.count("tr") == records + 1
    assert "data-filter" in (site / "results.html").read_text(encoding="utf-8")


def test_what_is_said_of_notebooks_is_of_figures_that_they_save():
    """A caption for a figure that is no longer made would stay unseen."""
    about = yaml.safe_load((checkout() / "docs/site/notebooks.yaml").read_text(encoding="utf-8"))
    for name, told in about.items():
        source = "".join(cell.source for cell in nbformat.read(checkout() / f"notebooks/{name}.ipynb", 4).cells)
        assert [figure for figure in told["figures"] if f'"{figure}"' not in source] == []
        assert told["picture"] in told["figures"]
        assert told["finding"].endswith(".")
