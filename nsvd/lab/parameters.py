"""Parameters of a notebook: what it declares, and values for them as YAML."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import nbformat
import yaml
from papermill.translators import PythonTranslator
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

PLAIN = {"int": int, "str": str, "bool": bool}


class _Written(yaml.SafeLoader):
    """Values that are written out: no alias (a few lines of them can stand for gigabytes), no name twice."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "an alias; write the value out", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConstructorError(None, None, f"{', '.join(twice)} given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse(text: str, what: str) -> object:
    """The value that a YAML text gives.

    Raises:
        ValueError: it is not YAML, is nested too deeply, has an alias or a name twice; named ``what``.
    """
    try:
        return yaml.load(text, Loader=_Written)
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error
    except Exception as error:  # a value that belies its tag raises what yaml happens to meet: !!bool x
        raise ValueError(f"{what} is not YAML: {error}") from error


def from_pairs(pairs: Iterable[tuple[str, str]]) -> dict[str, object]:
    """Values by name, from names and YAML texts; a name given twice is a ``ValueError``."""
    values = {}
    for name, text in pairs:
        if name in values:
            raise ValueError(f"{name} is given twice")
        values[name] = parse(text, f"the value of {name}")
    return values


def read_preset(file: str | Path) -> dict[str, object]:
    """Values by name, from a file of ``name: value`` lines in YAML, UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has other content.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no preset file {file}" + (" (it is a folder)" if Path(file).is_dir() else ""))
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"preset {file} is not UTF-8") from error
    values = parse(text, f"preset {file}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"preset {file}: expected `name: value` lines")
    if odd := [key for key in values if not isinstance(key, str)]:
        raise ValueError(f"preset {file}: {odd[0]!r} is no name of a parameter")
    return values


class Parameter(NamedTuple):
    """A parameter as the notebook declares it; ``default`` is its text, ``help`` the comment behind it."""

    name: str
    kind: str  # int, float, str, bool, list[…], or "" if unknown: the annotation's, or else that of the default
    default: str
    help: str


def declared(file: Path) -> dict[str, str]:
    """The names of a notebook's parameters with their kinds; raises as ``described``."""
    return {one.name: one.kind for one in described(file)}


def described(file: Path) -> list[Parameter]:
    """The parameters of a notebook, in order.

    Raises:
        ValueError: the file is not a notebook.
    """
    try:
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        found = PythonTranslator.inspect(cells[0]) if cells else []
    except OSError:
        raise
    except Exception as error:  # nbformat raises what its walk through the JSON happens to meet
        raise ValueError(f"{file} is not a notebook: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    return [Parameter(one.name, _kind(one.inferred_type_name, one.default), one.default, one.help) for one in found]


def check(values: Mapping[str, object], kinds: Mapping[str, str]) -> None:
    """Refuse, in one sentence, a value that is not of its parameter's kind; a whole number is a float, too."""
    for name, value in values.items():
        if not _fits(value, kinds[name]):
            kind = kinds[name] or "a number, a text, true, false, null, or a list of such"
            raise ValueError(f"{name} is {_short(value)}, of type {type(value).__name__}; it is to be {kind}")


def _kind(annotation: str, default: str) -> str:
    if annotation in (*PLAIN, "float", "list") or annotation.startswith("list["):
        return annotation
    try:
        kind = type(ast.literal_eval(default)).__name__
    except (ValueError, SyntaxError):
        return ""
    return kind if kind in (*PLAIN, "float", "list") else ""


def _fits(value: object, kind: str) -> bool:
    if kind.startswith("list"):
        inner = kind[5:-1]
        return isinstance(value, list) and all(_fits(one, inner) for one in value)
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    return _plain(value) and (kind not in PLAIN or type(value) is PLAIN[kind])


def _plain(value: object) -> bool:
    """Whether the executed notebook can tell of the value: JSON has it, and UTF-8 has its characters (no half ones)."""
    try:
        return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode()) == value
    except (TypeError, ValueError, RecursionError):
        return False


def _short(value: object) -> str:
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) < 60 else f"{text[:57]}…"
