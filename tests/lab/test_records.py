"""Results are found again by their parameters, as long as the code that made them is the same."""

import json
import math
import os

import pytest

from nsvd.lab import records
from nsvd.lab.records import DOCUMENTS, Records, origin
from tests.tiny import file_limit

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


def test_a_record_of_code_that_is_known_to_be_alike_is_found(file, tmp_path, monkeypatch):
    """As long as that is said of today's code: after the next change it counts no more. A record of times never does."""
    with monkeypatch.context() as then:
        pretend(then, "slow")
        Records(file).add(FIRST, {"nll": 1.0})
    told = tmp_path / "alike.json"
    told.write_text(json.dumps({"code": "fast", "alike": ["slow"], "shown": "by measuring again"}), encoding="utf-8")
    monkeypatch.setattr(records, "ALIKE", told)
    assert Records(file).find(**FIRST) is None
    for code, found in (("fast", {"nll": 1.0}), ("other", None)):
        pretend(monkeypatch, code)
        assert Records(file).find(**FIRST) == found
        assert Records(file, times=True).find(**FIRST) is None


@pytest.mark.skipif(not records.ALIKE.is_file(), reason="no earlier code is known to be alike")
def test_what_is_said_to_be_alike_is_whole():
    """The committed file names codes of twelve digits, and says how it was shown."""
    told = records._alike(records.ALIKE)
    assert told.keys() == {"code", "alike", "shown"}
    assert all(len(code) == 12 for code in [told["code"], *told["alike"]])
    assert told["shown"].endswith(".")


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


def test_what_another_process_adds_is_kept_and_found(file):
    """When a record is appended, and when one is replaced; with ``fresh``, too."""
    ours, fresh, other = Records(file), Records(file, fresh=True), Records(file)
    ours.add(FIRST, {"nll": 1.0})
    other.add(SECOND, {"nll": 2.0})
    ours.add(FIRST, {"nll": 1.5})
    assert [row["numbers"]["nll"] for row in lines(file)] == [1.5, 2.0]
    assert ours.find(**SECOND) == {"nll": 2.0}
    fresh.add({"method": "asvd"}, {"nll": 3.0})
    assert fresh.find(**FIRST) == {"nll": 1.5}
    assert len(lines(file)) == 3


def test_what_was_there_before_is_not_fresh_until_it_is_measured(file):
    """Also where the numbers turn out to be the same."""
    Records(file).add(FIRST, {"nll": 1.0})
    ours = Records(file, fresh=True)
    assert ours.find(**FIRST) is None
    ours.add(SECOND, {"nll": 2.0})
    assert ours.find(**FIRST) is None
    ours.add(FIRST, {"nll": 1.0})
    assert ours.find(**FIRST) == {"nll": 1.0}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_add_at_the_same_time_lose_nothing(file):
    """Three of them, each a new record and an old one replaced at every turn."""
    children = []
    for name in "abc":
        children.append(os.fork())
        if children[-1] == 0:
            try:
                ours = Records(file)
                for turn in range(20):
                    ours.add({"by": name, "turn": turn}, {"nll": turn})
                    ours.add({"by": name}, {"nll": turn})
                os._exit(0)
            finally:
                os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    rows = {(row["parameters"]["by"], row["parameters"].get("turn")): row["numbers"]["nll"] for row in lines(file)}
    assert rows == {(name, turn): 19 if turn is None else turn for name in "abc" for turn in (None, *range(20))}
    assert len(lines(file)) == len(rows)
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("text", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b", "\r", "\n", "\0", "\ud83d", "😀"])
def test_any_character_may_stand_in_a_parameter(text, file):
    """Those that Python takes for ends of lines, and lone surrogates, among them."""
    Records(file).add({"text": text}, {"nll": 1.0})
    Records(file).add(FIRST, {"nll": 2.0})
    assert Records(file).find(text=text) == {"nll": 1.0}
    assert list(Records(file).frame().text[:1]) == [text.encode("utf-8", "backslashreplace").decode()]
    assert file.read_bytes().count(b"\n") == 2


def test_a_failed_write_leaves_file_and_memory_as_they_were(file):
    """Of a new record and of one to replace: neither is found, and the next one is read again."""
    ours = Records(file)
    ours.add(FIRST, {"nll": 1.0})
    before = file.read_bytes()
    for parameters in (SECOND, FIRST):
        with (
            file_limit(len(before) + 20),
            pytest.raises(OSError, match=r"^cannot write .*numbers\.jsonl: File too large$"),
        ):
            ours.add(parameters, {"nll": 2.0, "text": "x" * 99})
        assert file.read_bytes() == before
    with pytest.raises(TypeError):
        ours.add(SECOND, {"nll": object()})
    assert ours.find(**SECOND) is None
    assert ours.find(**FIRST) == {"nll": 1.0}
    ours.add(SECOND, {"nll": 3.0})
    assert [row["numbers"]["nll"] for row in lines(file)] == [1.0, 3.0]
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(
    "line",
    [b"{}", b"[]", b"null", b"3", b'{"parameters": {}}', b'{"parameters": [], "numbers": {}, "origin": {}}', b"\xff", b"",
     b"[" * 100_000, b'{"parameters": {}, "numbers": {}, "origin": 3}', b"1" * 5000],
)  # fmt: skip
def test_a_line_that_is_no_result_is_named(line, file):
    """By its number, whatever it is; nothing is written then."""
    ours = Records(file)
    ours.add(FIRST, {"nll": 1.0})
    broken = file.read_bytes() + line + b"\n"
    file.write_bytes(broken)
    for use in (lambda: Records(file), lambda: ours.add(SECOND, {"nll": 2.0})):
        with pytest.raises(ValueError, match=r"numbers\.jsonl is not a file of results: line 2: "):
            use()
    assert file.read_bytes() == broken


def test_reading_writes_nothing(file):
    """A last line without its end is left to the next record; if it is whole, it counts."""
    Records(file).add(FIRST, {"nll": 1.0})
    Records(file).add(SECOND, {"nll": 2.0})
    whole = file.read_bytes()
    for cut, found in ((whole[:-1], {"nll": 2.0}), (whole[:-9], None)):
        file.write_bytes(cut)
        ours = Records(file)
        assert ours.find(**SECOND) == found
        assert file.read_bytes() == cut
        ours.add({"method": "asvd"}, {"nll": 3.0})
        assert [row["numbers"]["nll"] for row in lines(file)] == ([1.0, 2.0, 3.0] if found else [1.0, 3.0])


def test_a_folder_is_no_file_of_results(tmp_path):
    """Named in one sentence."""
    with pytest.raises(OSError, match=str(tmp_path)):
        Records(tmp_path)


def test_what_is_not_finite_is_null_however_deep_it_stands(tmp_path):
    """The file stays JSON for every reader."""
    Records(tmp_path / "r.jsonl").add(
        {"a": 1}, {"losses": [1.0, math.nan, (math.inf, 2)], "by": {"x": -math.inf}, "n": 3}
    )
    (line,) = (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["numbers"] == {
        "losses": [1.0, None, [None, 2]],
        "by": {"x": None},
        "n": 3,
    }


def test_the_documents_of_windows_are_joined_to_what_was_measured_on_them(tmp_path):
    """They are no row of their own, and other windows have none."""
    records = Records(tmp_path / "records.jsonl")
    records.add({"corpus": "one", "windows": "a"}, {"nll": 1.0})
    records.add({"measure": DOCUMENTS, "corpus": "one", "windows": "a"}, {DOCUMENTS: [0, 0, 1]})
    records.add({"corpus": "one", "windows": "b"}, {"nll": 2.0})
    frame = records.frame()
    assert list(frame.nll) == [1.0, 2.0]
    assert frame.documents[0] == [0, 0, 1]
    assert not isinstance(frame.documents[1], list)
    assert "measure" not in frame
