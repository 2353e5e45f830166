"""Where the files that ship with the project are."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def data() -> Path:
    """The ``data`` folder: inside an installed wheel, else at the top of the checkout."""
    return _PACKAGE / "data" if (_PACKAGE / "data").is_dir() else _PACKAGE.parent / "data"


def checkout() -> Path:
    """The top of the checkout, where the notebooks are; raises ``FileNotFoundError`` for an installed wheel."""
    if not (_PACKAGE.parent / "notebooks").is_dir():
        raise FileNotFoundError(
            "the notebooks are not part of the installed package; run this in a checkout of the project"
        )
    return _PACKAGE.parent
