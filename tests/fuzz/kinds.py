"""The kinds of input there are, by name: each a function from a seed to a ``Case``."""

from collections.abc import Callable

from tests.fuzz.commands import arguments
from tests.fuzz.corpora import corpora
from tests.fuzz.folders import folders
from tests.fuzz.harness import Case
from tests.fuzz.presets import presets
from tests.fuzz.records import records

KINDS: dict[str, Callable[[int], Case]] = {
    "folders": folders,
    "corpora": corpora,
    "presets": presets,
    "records": records,
    "arguments": arguments,
}
