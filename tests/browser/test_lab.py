"""JupyterLab as ``make lab`` starts it: notebooks 20 and 21 run to their end in a browser, and a slider draws."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import pytest

from nsvd.lab import workbook
from nsvd.lab.paths import checkout
from tests.browser.conftest import MINUTE

pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install 'nsvd[notebooks]'")
SMALL = {"count": 8, "length": 64, "ratios": [0.1, 0.2], "check": False}


def small(name, folder):
    """Write a notebook with smaller parameters, its figures beside it."""
    (source,) = workbook.notebooks([name])
    notebook = nbformat.read(source, 4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for parameter, value in (SMALL | {"figures": str(folder / "figures")}).items():
        cell.source = re.sub(rf"^({parameter}: [^=]*= ).*$", lambda m, v=value: f"{m[1]}{v!r}", cell.source, flags=re.M)
    nbformat.write(notebook, folder / source.name)
    return folder / source.name


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address that JupyterLab tells, with its token, and the folder that it serves."""
    top = tmp_path_factory.mktemp("lab")
    (top / "notebooks").mkdir()
    (recipe,) = re.findall(
        r"^lab:.*\n\t\$\(BIN\)/jupyter lab (.*)$", (checkout() / "Makefile").read_text("utf-8"), re.M
    )
    settings = {
        "notebook-extension/tracker": {"windowingMode": "none"},  # cells that are out of sight are there, too
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, values in settings.items():
        file = top / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), "utf-8")
    places = {
        f"JUPYTER{name}": str(top / name.lower()) for name in ("_CONFIG_DIR", "_RUNTIME_DIR", "LAB_WORKSPACES_DIR")
    }
    places |= {"JUPYTERLAB_SETTINGS_DIR": str(top / "settings"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jupyterlab", *shlex.split(recipe), "--no-browser", f"--port={free_port()}"]
    command += ["--allow-root"] * (os.geteuid() == 0)
    python = os.pathsep.join(filter(None, (str(checkout()), os.environ.get("PYTHONPATH"))))
    log = (top / "log").open("w")
    with subprocess.Popen(command, cwd=top, env=os.environ | places | {"PYTHONPATH": python}, stderr=log) as server:
        try:
            yield _address(server, top / "log"), top / "notebooks"
        finally:
            server.terminate()
            server.wait(30)


def _address(server, log) -> str:
    while server.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\d+/lab\?token=\w+", log.read_text("utf-8")):
            return found[0]
        time.sleep(0.2)
    raise AssertionError(log.read_text("utf-8"))


def run_to_the_end(page, served, name):
    """Open a notebook, run all cells by the menu, save; returns the notebook as it was saved."""
    address, folder = served
    file = small(name, folder)
    page.goto(address.replace("/lab?", f"/lab/workspaces/{file.stem}/tree/{file.name}?"))
    page.locator(".jp-NotebookPanel-toolbar").get_by_text("Python 3").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    last = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").last
    last.filter(has_text=re.compile(r"\[\d+\]")).wait_for(timeout=5 * MINUTE)
    page.keyboard.press("Control+s")
    page.wait_for_function("!document.querySelector('.jp-mod-dirty')")
    return nbformat.read(file, 4)


def errors(notebook) -> list:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len(outputs) > 4
    return [output for output in outputs if output.output_type in ("error", "stream")]


def test_the_lab_is_on_loopback_and_asks_for_its_token(served):
    """Nobody else on the network, or on the machine, can run code with it."""
    address, _ = served
    base = address.partition("/lab")[0]
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{base}/api/contents", timeout=30)
    token = address.partition("token=")[2]
    with urllib.request.urlopen(f"{base}/api/contents?token={token}", timeout=30) as answer:
        assert answer.status == 200


def test_sliders_draw_another_figure(page, served):
    """Notebook 20 runs to its end; then a slider is moved, a menu is changed, and both change the picture."""
    assert errors(run_to_the_end(page, served, "20")) == []
    image = page.locator(".jp-OutputArea img.widget-image")
    image.wait_for()
    changed = "before => document.querySelector('img.widget-image').src !== before"
    slider = page.locator(".widget-hslider").filter(has_text="removed")
    for change in (
        lambda: slider.locator(".noUi-handle").press("ArrowRight"),
        lambda: page.locator(".widget-dropdown select").last.select_option("kfac"),
    ):
        before = image.get_attribute("src")
        change()
        page.wait_for_function(changed, arg=before)
    assert slider.locator(".widget-readout").inner_text() == "0.35"
    page.get_by_role("button", name="compress, continue").click()
    page.locator(".widget-html table").get_by_text("kfac, 35% removed").wait_for()


def test_your_model_runs_to_its_end(page, served):
    """From a name to a checkpoint."""
    notebook = run_to_the_end(page, served, "21")
    assert errors(notebook) == []
    assert "of the layers' parameters are gone" in str(notebook.cells)
    assert (served[1] / "figures/21_trade_off.png").is_file()
