"""The site in a browser: every page opens, formulas have a size, tables sort and filter, nothing is fetched from elsewhere."""

import re
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urldefrag

import pytest

from tests.test_site import EXECUTED, PAGES, site  # noqa: F401


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_told):
        """Say nothing."""


@pytest.fixture
def address(site):  # noqa: F811
    """The site on this machine."""
    with serving(site) as found:
        yield found


@contextmanager
def serving(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_every_page_opens_from_the_first_without_a_fault(page, address):
    """By the links that a reader can follow; no error on the console, and no request to another machine."""
    links = "all => all.map(a => a.href).filter(href => href.startsWith(location.origin))"
    seen, rest = set(), [f"{address}/index.html"]
    while rest:
        seen.add(url := rest.pop())
        answer = page.goto(url)
        assert answer.ok, url
        found = {urldefrag(link).url for link in page.locator("a[href]").evaluate_all(links)}
        rest += sorted(link for link in found - seen - set(rest) if link.endswith((".html", "/")))
        assert page.faults == [], url
    wanted = [*PAGES, *(f"notebooks/{name}" for name in EXECUTED)]
    assert [name for name in wanted if f"{address}/{name}.html" not in seen] == []


def test_formulas_are_drawn(page, address):
    """Each has a size on the page, and those on lines of their own are higher than a line of text."""
    page.goto(f"{address}/theory.html")
    sizes = page.locator("math").evaluate_all(
        "all => all.map(m => m.getBoundingClientRect()).map(b => [b.width, b.height])"
    )
    assert len(sizes) > 20
    assert min(min(size) for size in sizes) > 2
    displayed = page.locator("math[display=block]").evaluate_all(
        "all => all.map(m => m.getBoundingClientRect().height)"
    )
    assert len(displayed) > 2
    assert max(displayed) > 24
    assert "12" not in page.locator("math[display=block] mfrac").all_inner_texts()


def test_the_table_sorts_and_filters(page, address):
    """A click on a title sorts up, the next one down; a menu leaves the rows of its choice."""
    page.goto(f"{address}/results.html")
    table = page.locator("table.results")
    title = table.locator("th", has_text=re.compile("^perplexity"))
    column = "all => all.filter(row => !row.hidden).map(row => Number(row.cells[5].textContent))"
    rows = table.locator("tbody tr")
    whole = rows.count()
    for up in (True, False):
        title.click()
        values = rows.evaluate_all(column)
        assert values == sorted(values, reverse=not up)
    page.locator(".filters label").filter(has_text="method").locator("select").select_option("best")
    left = rows.evaluate_all(column)
    assert 0 < len(left) < whole
    assert set(rows.evaluate_all("all => all.filter(row => !row.hidden).map(row => row.cells[2].textContent)")) == {
        "best"
    }
    assert page.faults == []


def test_code_unfolds_and_the_next_notebook_is_a_click_away(page, address):
    page.goto(f"{address}/notebooks/{EXECUTED[0]}.html")
    fold = page.locator("details").first
    code = fold.locator("pre").first
    assert not code.is_visible()
    fold.locator("summary").click()
    assert code.is_visible()
    page.locator(".next-page").first.click()
    page.wait_for_url(f"**/{EXECUTED[1]}.html")


def test_a_search_finds_a_page(page, address):
    """Without a server that searches."""
    page.goto(f"{address}/search.html?q=ridge")
    page.locator("ul.search li").first.wait_for()
    assert page.faults == []
