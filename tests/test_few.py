"""What ``--few`` leaves of the tests: every function, and of one with many cases the first two and the last two."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from tests.conftest import few


def collected(name: str, cases: int, file: str = "a.py", marks: tuple[str, ...] = ()) -> list[SimpleNamespace]:
    mark = {"get_closest_marker": lambda asked: asked if asked in marks else None}
    return [SimpleNamespace(parent=file, originalname=name, case=i, **mark) for i in range(cases)]


def test_of_many_cases_four_stay():
    """In their order, function by function; one of the same name in another file is another."""
    left = few([*collected("test_many", 6), *collected("test_some", 4), *collected("test_many", 5, file="b.py")])
    assert [(one.parent, one.originalname, one.case) for one in left] == [
        *(("a.py", "test_many", case) for case in (0, 1, 4, 5)),
        *(("a.py", "test_some", case) for case in range(4)),
        *(("b.py", "test_many", case) for case in (0, 1, 3, 4)),
    ]


def test_all_cases_stay_where_it_is_said():
    """The table of architectures is the table of every version."""
    assert len(few(collected("test_many", 9, marks=("every",)))) == 9
    assert len(few(collected("test_many", 9, marks=("once",)))) == 4


def test_the_option_leaves_out_cases(tmp_path):
    """Of functions and of methods, each for itself; what is left out is counted."""
    case = "@pytest.mark.parametrize('n', range(6))\n"
    (tmp_path / "test_it.py").write_text(
        f"import pytest\n{case}def test_many(n): pass\n@pytest.mark.every\n{case}def test_all(n): pass\n"
        f"class TestIt:\n    {case}    def test_many(self, n): pass\n"
    )
    asked = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", "/dev/null", "--collect-only", "-q", "--few"]
    top = Path(__file__).parents[1]
    said = subprocess.run([*asked, str(tmp_path)], cwd=top, capture_output=True, text=True, check=True).stdout
    assert [said.count(f"{name}[") for name in ("py::test_many", "py::test_all", "TestIt::test_many")] == [4, 6, 4]
    assert "test_many[2]" not in said
    assert "14/18 tests collected (4 deselected)" in said
