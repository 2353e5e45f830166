"""What notebooks tell of themselves."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nsvd.lab import listing, workbook

START = (
    "**Start here**: change `ratio` in the next cell, then `calibration`, set `check` to False, and run all cells. "
    "Running time: about 2 minutes on one core."
)


def put(folder, name="31_x.ipynb", first=f"# Is it so?\n\nText.\n\n{START}", **about):
    folder.mkdir(exist_ok=True)
    cell = new_code_cell("ratio: float = 0.3  # removed", metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[new_markdown_cell(first), cell], metadata={"nsvd": about} if about else {})
    nbformat.write(notebook, folder / name)
    return folder / name


@pytest.mark.parametrize("source", workbook.notebooks(), ids=lambda file: file.stem)
def test_a_notebook_says_where_to_start_and_how_long_it_takes(source):
    """In its first cell: two of its parameters, and a time."""
    one = listing.entry(source)
    assert one.question
    assert one.time
    assert len(one.start) == 2
    assert set(one.start) <= {parameter.name for parameter in one.parameters}


def test_an_entry_is_what_the_notebook_says(tmp_path):
    one = listing.entry(put(tmp_path))
    assert (one.name, one.question, one.start) == ("31_x", "Is it so?", ("ratio", "calibration"))
    assert (one.time, one.seconds) == ("about 2 minutes on one core", None)
    assert one.parameters == [("ratio", "float", "0.3", "removed")]


def test_the_time_of_the_last_run_is_told(tmp_path):
    """That of another folder is not."""
    source = put(tmp_path)
    put(tmp_path / "ran", seconds=83)
    assert listing.entry(source, tmp_path / "ran").seconds == 83
    assert listing.entry(source, tmp_path / "other").seconds is None
    assert "the last run here took 83 s" in listing.told([listing.entry(source, tmp_path / "ran")])


def test_a_notebook_that_says_nothing_is_listed_all_the_same(tmp_path):
    one = listing.entry(put(tmp_path, first="# Only a title"))
    assert (one.question, one.start, one.time) == ("Only a title", (), "")
    assert listing.told([one]).startswith("31_x  Only a title\n")
