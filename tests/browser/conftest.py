"""A headless Chromium, where one is installed with the package that drives it."""

import os
import shutil

import pytest

MINUTE = 60_000  # in milliseconds, as playwright counts
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def chromium():
    """The browser, for as long as the tests run."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'nsvd[browser]'")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"needs a browser, one of {', '.join(NAMES)}; on Debian: apt-get install chromium")
    flags = ["--disable-dev-shm-usage"]  # a container may have little of it
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for the superuser
    with driver.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=program, args=flags)
        except driver.Error as error:
            pytest.skip(f"{program} does not start here: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A window of its own; what its console calls an error, and every request that leaves this machine, is in ``page.faults``."""
    context = chromium.new_context(viewport={"width": 1300, "height": 1000})
    context.set_default_timeout(2 * MINUTE)  # on a machine that has other work to do
    window = context.new_page()
    window.faults = []
    window.on("console", lambda told: told.type == "error" and window.faults.append(told.text))
    window.on(
        "response", lambda answer: answer.status >= 400 and window.faults.append(f"{answer.status} for {answer.url}")
    )
    window.on("pageerror", lambda error: window.faults.append(str(error)))
    window.on("request", lambda asked: _local(asked.url) or window.faults.append(f"asks for {asked.url}"))
    yield window
    context.close()


def _local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "about:"))
