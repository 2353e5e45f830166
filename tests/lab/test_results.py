"""Results as a table, and two runs beside each other."""

import io
import json

import pandas as pd
import pytest

import nsvd
from nsvd.lab.results import compared, written


def put(folder, perplexities, name="x.jsonl", **more):
    """A file of one measurement a corpus."""
    folder.mkdir(exist_ok=True)
    rows = [
        {
            "parameters": {"method": "asvd-1", "ratio": 0.3, "corpus": corpus, "windows": "12ab"} | more,
            "numbers": {"perplexity": value, "losses": [1.0, 2.0]},
            "origin": {"code": "old"},
        }
        for corpus, value in perplexities.items()
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / name


def test_results_are_a_row_a_measurement(tmp_path):
    """Lists are left out unless they are wanted; a folder stands for its files."""
    put(tmp_path, {"a": 10.0, "b_c": 20.0})
    put(tmp_path, {"a": 30.0}, "y.jsonl")
    frame = nsvd.results(tmp_path)
    assert list(frame.file) == ["x", "x", "y"]
    assert list(frame.perplexity) == [10.0, 20.0, 30.0]
    assert "losses" not in frame
    assert list(nsvd.results([tmp_path / "x.jsonl"], losses=True).losses) == [[1.0, 2.0], [1.0, 2.0]]
    assert nsvd.results(tmp_path, stale=False).empty


def test_what_is_no_file_of_results_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder of results"):
        nsvd.results(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no file of results"):
        nsvd.results(tmp_path)
    (tmp_path / "x.jsonl").write_text("{}\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1"):
        nsvd.results(tmp_path)


def test_a_table_is_written_in_three_ways(tmp_path):
    """CSV reads back as it was; the two others leave out what is the same in every row, and escape."""
    frame = nsvd.results(put(tmp_path, {"a": 10.0, "b_c": 1234.56}))
    assert pd.read_csv(io.StringIO(written(frame, "csv"))).equals(pd.DataFrame(frame.to_dict("list")))
    latex = written(frame, "latex")
    assert r"b\_c & 1,234.6 \\" in latex
    assert r"\begin{tabular}{lr}" in latex
    assert "% file x, method asvd-1, ratio 0.3" in latex
    assert "12ab" not in latex
    assert "| a | 10 |" in written(frame, "markdown")
    with pytest.raises(ValueError, match="unknown format 'pdf'; there are csv, latex, markdown"):
        written(frame, "pdf")


def test_two_runs_are_matched_by_their_parameters(tmp_path):
    """Fingerprints of windows may differ; the largest change comes first."""
    put(tmp_path / "one", {"a": 10.0, "b": 20.0, "only here": 1.0})
    put(tmp_path / "two", {"a": 11.0, "b": 10.0}, windows="34cd")
    frame = compared(tmp_path / "one", tmp_path / "two")
    assert list(frame.corpus) == ["b", "a"]
    assert list(frame["perplexity, second"]) == [10.0, 11.0]
    assert list(frame.change) == pytest.approx([-0.5, 0.1])
    assert "method" not in frame


def test_runs_that_share_nothing_are_refused(tmp_path):
    one, two = put(tmp_path / "one", {"a": 10.0}), put(tmp_path / "two", {"a": 10.0}, ratio=0.5)
    with pytest.raises(ValueError, match="share no measurement"):
        compared(one, two)
    with pytest.raises(ValueError, match="the first run holds no bits"):
        compared(one, two, "bits")
