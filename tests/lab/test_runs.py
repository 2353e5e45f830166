"""The page of a folder of executed notebooks."""

import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from nsvd.cli import main
from nsvd.lab import runs
from tests.lab.test_results import put as put_results

PICTURE = "aGVsbG8="


def put(folder, name="31_x", **about):
    folder.mkdir(exist_ok=True, parents=True)
    output = new_output("display_data", {"image/png": PICTURE})
    cells = [new_markdown_cell("# Is 1 < 2?"), new_code_cell("1", outputs=[output])]
    nbformat.write(new_notebook(cells=cells, metadata={"nsvd": about}), folder / f"{name}.ipynb")


def test_a_page_shows_title_parameters_figure_and_numbers(tmp_path):
    put(tmp_path, parameters={"ratio": 0.25}, seconds=12, origin={"torch": "2.99"})
    put_results(tmp_path / "results", {"a": 10.0, "b": 1000.0}, "31_x.jsonl")
    html = runs.index(tmp_path, page=tmp_path / "page.html").read_text(encoding="utf-8")
    for part in (
        "Is 1 &lt; 2?",
        "ratio = 0.25",
        PICTURE,
        "12 s",
        "torch 2.99",
        "asvd-1",
        ">100.0<",
        'href="31_x.ipynb"',
    ):
        assert part in html


def test_runs_in_a_folder_are_all_shown_and_a_failed_one_is_marked(tmp_path):
    put(tmp_path / "a", parameters={})
    put(tmp_path / "b", "32_y.failed", parameters={})
    html = runs.index(tmp_path, page=tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'href="a/31_x.ipynb"' in html
    assert "(failed)" in html
    assert "default parameters" in html


def test_a_second_run_stands_beside_the_first(tmp_path, capsys):
    """On the page and on the terminal."""
    for name, value in (("one", 10.0), ("two", 15.0)):
        put(tmp_path / name, parameters={})
        put_results(tmp_path / name / "results", {"a": value}, "31_x.jsonl")
    page = tmp_path / "page.html"
    assert main(["runs", str(tmp_path / "one"), str(tmp_path / "two"), "--page", str(page)]) == 0
    assert "0.5" in capsys.readouterr().out
    assert "+50.00%" in page.read_text(encoding="utf-8")


def test_a_folder_that_is_looked_at_stays_as_it_is(tmp_path, monkeypatch, capsys):
    """The page goes to ``build``, its name is told, and its links lead back."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    put(tmp_path / "my runs", parameters={})
    assert main(["runs", str(tmp_path / "my runs")]) == 0
    assert [file.name for file in (tmp_path / "my runs").iterdir()] == ["31_x.ipynb"]
    page = Path(capsys.readouterr().out.strip())
    assert page == Path("build/runs/my runs.html")
    (link,) = re.findall('href="(.*?)"', page.read_text(encoding="utf-8"))
    assert (page.parent / unquote(link)).samefile(tmp_path / "my runs/31_x.ipynb")


def test_a_folder_without_notebooks_is_refused(tmp_path, capsys):
    """In one line; no page is written."""
    assert main(["runs", str(tmp_path)]) == 2
    assert "holds no executed notebook" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "nothing")]) == 2
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.ipynb").write_text("no", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.ipynb is not a notebook"):
        runs.index(tmp_path, page=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_line_lists_notebooks_and_writes_tables(tmp_path, capsys):
    assert main(["run", "--list", "04"]) == 0
    told = capsys.readouterr().out
    assert "Which method, at which ratio, on which text?" in told
    assert "fractions of the parameters removed" in told
    file = put_results(tmp_path, {"a": 10.0})
    assert main(["results", str(file), "--format", "latex"]) == 0
    assert r"\toprule" in capsys.readouterr().out
    assert main(["results", str(file), "--format", "pdf"]) == 2
