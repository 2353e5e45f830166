"""The lowest versions that pyproject.toml allows, as pip constraints: ``python tests/lowest.py > constraints-lowest.txt``.

torch is left out: which build of it is installed depends on the machine.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def requirements(file: Path = PYPROJECT) -> list[str]:
    """All requirements, those of the extras too."""
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]


def lowest(lines: list[str]) -> list[str]:
    """``name==version`` for the lower bound of every requirement but torch.

    Raises:
        ValueError: if a requirement has no lower bound.
    """
    found = []
    for line in lines:
        bound = re.fullmatch(r"([\w-]+)>=([\d.]+)(,<[\d.]+)?", line)
        if not bound:
            raise ValueError(f"pyproject.toml: {line!r} is not of the form name>=version")
        if bound[1] != "torch":
            found.append(f"{bound[1]}=={bound[2]}")
    return found


if __name__ == "__main__":
    print("\n".join(lowest(requirements())))
