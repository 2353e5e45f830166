"""The tables of README and RESULTS are those of the measurements beside it."""

import json
import shutil

import pytest

from nsvd.lab import readme
from nsvd.lab.paths import checkout
from nsvd.lab.tables import improvements

RESULTS = checkout() / "data/results"
pytestmark = pytest.mark.once  # our own files and numbers


@pytest.mark.parametrize("name", readme.FILES)
def test_the_tables_are_those_of_the_measurements(name):
    """Written again they are the same, to the character; with another number they are not."""
    text = (checkout() / name).read_text(encoding="utf-8")
    tables = readme.FILES[name](RESULTS, stale=True)
    assert readme.with_results(text, tables) == text
    assert readme.with_results(text, tables.replace("1", "2", 1)) != text


def test_on_the_real_model_best_is_ahead_of_every_other_row():
    """At every ratio and place, as the front page of the site says."""
    rows = [line.split(" | ") for line in readme.headline(RESULTS).splitlines() if " / " in line and "|" in line]
    assert [row[0].strip("| `") for row in rows] == list(readme.ROWS)
    numbers = [
        [float(number.replace(",", "")) for cell in row[1:] for number in cell.strip(" |").split(" / ")] for row in rows
    ]
    *others, best = numbers
    assert len(best) == 3 * readme.headline(RESULTS).count("% removed")
    assert all(ours < theirs for other in others for ours, theirs in zip(best, other, strict=True))


def test_a_changed_measurement_changes_its_table(tmp_path):
    """And no other."""
    shutil.copytree(RESULTS, tmp_path / "results")
    file = tmp_path / "results/06_model_families.jsonl"
    about = lambda line: tuple(line["parameters"].get(name) for name in ("model", "method", "corpus"))  # noqa: E731
    lines = [json.loads(line) for line in file.open(encoding="utf-8")]
    changed = next(line for line in lines if about(line) == ("mini-opt", "asvd-1", readme.HOME))
    changed["numbers"]["perplexity"] *= 2
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    before, after = (readme.results(folder, stale=True).split("\n\n") for folder in (RESULTS, tmp_path / "results"))
    assert [number for number, parts in enumerate(zip(before, after, strict=True)) if len(set(parts)) > 1] == [7]


def test_measurements_of_other_code_are_not_shown(tmp_path):
    """The notebook to run is named."""
    shutil.copytree(RESULTS, tmp_path / "results")
    file = tmp_path / "results/04_evaluation.jsonl"
    code = next(json.loads(line) for line in file.open(encoding="utf-8"))["origin"]["code"]
    file.write_text(file.read_text(encoding="utf-8").replace(code, "0" * len(code)), encoding="utf-8")
    with pytest.raises(ValueError, match="today's code measured; run notebook"):
        readme.results(tmp_path / "results")
    assert readme.results(tmp_path / "results", stale=True)


def test_two_runs_in_one_file_are_refused(tmp_path):
    """Neither is taken for the other."""
    shutil.copytree(RESULTS, tmp_path / "results")
    file = tmp_path / "results/05_rank_split.jsonl"
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    row = next(row for row in rows if "model" in row["parameters"])
    row["parameters"]["windows"] = "0" * 12
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"05_rank_split.*several runs"):
        readme.results(tmp_path / "results", stale=True)


@pytest.mark.parametrize(
    "text", ["", "<!-- results -->", "<!-- /results --> <!-- results -->", 2 * "<!-- results --><!-- /results -->"]
)
def test_a_text_with_no_one_place_for_tables_is_refused(text):
    with pytest.raises(ValueError, match="no one place"):
        readme.with_results(text, "| |")


def test_intervals_are_over_the_documents_that_are_recorded(tmp_path):
    """The same measurements without that record have another interval, and the same numbers."""
    file, kept = tmp_path / "05_rank_split.jsonl", RESULTS / "05_rank_split.jsonl"
    shutil.copy(kept, file)
    told = readme._read(tmp_path, "05_rank_split", stale=True)
    assert all(len(row.documents) == len(row.losses) for row in told.itertuples())
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(line for line in lines if '"measure": "documents"' not in line), encoding="utf-8")
    alone = readme._read(tmp_path, "05_rank_split", stale=True)
    assert "documents" not in alone
    (one, two) = (improvements(frame, [readme.HOME]) for frame in (told, alone))
    assert (one.improvement == two.improvement).all()
    assert ((one.high - one.low) != (two.high - two.low)).all()


def test_what_is_around_the_tables_stays():
    assert (
        readme.with_results("a <!-- results -->old<!-- /results --> b", "new")
        == "a <!-- results -->\nnew\n<!-- /results --> b"
    )


def test_the_table_of_readme_is_the_first_of_results():
    assert readme.results(RESULTS, stale=True).startswith(readme.headline(RESULTS, stale=True) + "\n\n")
