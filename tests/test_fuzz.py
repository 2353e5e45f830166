"""A small share of the damaged input that ``python -m tests.fuzz`` draws."""

import time

import pytest

from tests.fuzz import harness
from tests.fuzz.harness import Case, run
from tests.fuzz.kinds import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_read_or_refused_in_one_line(kind):
    """No traceback, no wrong value, no hang, no flood of memory; both ends are met."""
    count = 60 if kind == "folders" else 40
    outcomes = list(run(KINDS[kind], range(count)))
    assert [(each.seed, each.description, each.fault) for each in outcomes if each.fault] == []
    assert 0 < sum(each.refused for each in outcomes) < count


def say(text: str, code: int | None = None) -> int | None:
    import sys

    print(text, file=sys.stderr)
    return code


CASES = [
    (lambda: None, ""),
    (lambda: 0, ""),
    (lambda: say("nsvd info: bad", 2), ""),
    (lambda: say("a warning\nnsvd info: bad", 2), "not one line"),
    (lambda: 2, "not one line"),
    (lambda: say("a warning", 0), "words on standard error"),
    (lambda: 1, "exit code 1"),
    (lambda: [][1], "IndexError: list index out of range"),
    (lambda: exec("assert 1 == 2, 'another value'"), "wrong: another value"),
    (lambda: len(b"x" * 2**27) and None, "MiB"),
    (lambda: time.sleep(9), "over 1 s"),
    (lambda: __import__("os")._exit(3), "the process died"),
    (lambda: None, ""),
]


def test_each_kind_of_fault_is_seen(monkeypatch):
    """And the cases after it are run."""
    monkeypatch.setattr(harness, "SECONDS", 1)
    monkeypatch.setattr(harness, "BYTES", 2**26)
    outcomes = list(run(lambda seed: Case(str(seed), CASES[seed][0]), range(len(CASES))))
    assert [each.seed for each in outcomes] == list(range(len(CASES)))
    for (_, fault), outcome in zip(CASES, outcomes, strict=True):
        assert (fault in outcome.fault) if fault else outcome.fault == "", outcome
