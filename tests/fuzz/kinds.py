"""The kinds of input there are, by name: each a function from a seed to a ``Case``."""

from collections.abc import Callable

from tests.fuzz.folders import folders
from tests.fuzz.harness import Case

KINDS: dict[str, Callable[[int], Case]] = {"folders": folders}
