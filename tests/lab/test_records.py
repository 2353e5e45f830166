"""Results are found again by their parameters, as long as the code that made them is the same."""

import json

import pytest

from nsvd.lab import records
from nsvd.lab.records import Records, origin

FIRST, SECOND = {"method": "nsvd-1", "k1": 0.95}, {"method": "svd", "text": "日本語"}


@pytest.fixture
def file(tmp_path):
    """In a folder that is not there yet."""
    return tmp_path / "results" / "numbers.jsonl"


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def pretend(monkeypatch, code: str) -> None:
    """As if the package were another version of itself."""
    about = origin() | {"code": code}
    monkeypatch.setattr(records, "origin", lambda: about)


def test_a_record_is_found_by_all_its_parameters_in_any_order(file):
    """Also by another reader of the file; not by some of the parameters, nor by others."""
    ours = Records(file)
    assert ours.find(**FIRST) is None
    assert ours.add(FIRST, {"nll": 2.5}) == {"nll": 2.5}
    for kept in (ours, Records(file)):
        assert kept.find(k1=0.95, method="nsvd-1") == {"nll": 2.5}
        assert kept.find(method="nsvd-1") is None
        assert kept.find(method="nsvd-1", k1=0.9) is None


def test_the_file_is_json_lines_with_the_origin(file):
    """A line a record, parameters, numbers, versions, commit and code; characters as they are."""
    ours = Records(file)
    ours.add(FIRST, {"nll": 2.5})
    ours.add(SECOND, {"nll": 3.5})
    assert [row["parameters"] for row in lines(file)] == [FIRST, SECOND]
    assert [row["numbers"] for row in lines(file)] == [{"nll": 2.5}, {"nll": 3.5}]
    assert {"nsvd", "torch", "transformers", "python", "commit", "code"} == lines(file)[0]["origin"].keys()
    assert "日本語" in file.read_text(encoding="utf-8")


def test_the_same_parameters_are_one_record(file):
    """The later numbers stand in the earlier one's place."""
    ours = Records(file)
    for nll in (1.0, 2.0, 3.0):
        ours.add(FIRST, {"nll": nll})
        ours.add(SECOND, {"nll": 10 * nll})
    assert [row["numbers"]["nll"] for row in lines(file)] == [3.0, 30.0]
    assert [place.name for place in file.parent.iterdir()] == [file.name]


def test_a_record_of_other_code_is_not_found_and_is_replaced(file, monkeypatch):
    """It stays in the file until it is measured again."""
    with monkeypatch.context() as then:
        pretend(then, "old")
        Records(file).add(FIRST, {"nll": 1.0})
        Records(file).add(SECOND, {"nll": 2.0})
    ours = Records(file)
    assert ours.find(**FIRST) is None
    assert ours.frame().empty
    assert len(lines(file)) == 2
    ours.add(FIRST, {"nll": 1.5})
    assert ours.find(**FIRST) == {"nll": 1.5}
    assert [(row["numbers"]["nll"], row["origin"]["code"]) for row in lines(file)] == [
        (1.5, origin()["code"]),
        (2.0, "old"),
    ]


def test_the_frame_has_a_column_for_each_parameter_and_number(file):
    """A row a record; what a record has not is missing."""
    ours = Records(file)
    ours.add(FIRST, {"nll": 2.5})
    ours.add(SECOND, {"nll": 3.5})
    frame = ours.frame()
    assert list(frame.columns) == ["method", "k1", "nll", "text"]
    assert list(frame.nll) == [2.5, 3.5]
    assert frame.k1.isna().tolist() == [False, True]


def test_the_code_hash_covers_what_computes():
    """Twelve digits, the same at every call."""
    assert len(origin()["code"]) == 12
    assert origin() == origin()


def test_a_line_cut_short_by_a_kill_is_measured_again(tmp_path):
    """The whole lines before it stay; anything else that is not JSON is named."""
    file = tmp_path / "records.jsonl"
    Records(file).add({"ratio": 0.1}, {"nll": 1.0})
    Records(file).add({"ratio": 0.2}, {"nll": 2.0})
    whole = file.read_text()
    file.write_text(whole[:-20])
    records = Records(file)
    assert records.find(ratio=0.1) == {"nll": 1.0}
    assert records.find(ratio=0.2) is None
    records.add({"ratio": 0.2}, {"nll": 2.0})
    assert file.read_text() == whole
    file.write_text("no json\n" + whole)
    with pytest.raises(ValueError, match=r"records\.jsonl is not a file of results"):
        Records(file)
