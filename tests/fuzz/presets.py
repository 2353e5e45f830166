"""Parameters for notebooks: preset files and ``-p NAME VALUE``, read and checked; nothing is executed.

The notebooks are those of the project, their cells of parameters alone. What a notebook would be given is compared with
what plain YAML says; written as Python by papermill and as JSON beside the notebook, it is still the same.
"""

import functools
import json
import math
import random
import shutil
from pathlib import Path
from unittest import mock

import nbformat
import yaml
from nbformat import v4
from papermill.translators import PythonTranslator

from nsvd import cli
from nsvd.lab import parameters, paths, workbook
from tests.fuzz import damage
from tests.fuzz.harness import Case

VALUES = (
    "5", "0", "-1", "1.5", "1e999", ".nan", "-.inf", "1e-400", "0x1F", "0o17", "1_000", "190:20:30",
    "12345678901234567890", "9" * 5000, "true", "no", "null", "~", "''", '""', "x", "日本語", "🙂", '"\\0"', '"\\ud83d"',
    '"a\\nb"', "'{x}'", '"\\u2028"', "2024-05-01", "=", "2024-13-45", "2001-12-14 21:59:43.10 -5:00", "!!binary aGk=",
    "!!set {1, 2}", "!!omap [a: 1]", "!!python/object/apply:os.getcwd []", "!!float x", "!!int x", "!!timestamp x",
    "!!bool x", "!!str 5", "!x 5", "*a", "&a x", "[1, [2, 3]]", "[.nan]", "[2024-05-01]", "[0.2, 0.4]", "[mini/web]",
    "[]", "{}", "{a: 1}", "{1: 2}", "[x, 5]", "[" * 3000, "{a: " * 500, "[" * 60 + "]" * 60, "|\n  a\n  b", ">\n  a",
    "mini-llama", "a" * 10_000, "/nowhere/at/all", "/dev/null", "../x", "@x", "`x`", "%x", "- x", "? x", "a: b: c", "#",
    "\t5", "'",
)  # fmt: skip
LINES = (
    "1: 2", "? [a]\n: b", "{a: b}: c", "<<: {model: x}", "'': 1", "null: 1", "yes: 1", "2024-05-01: x", "=: 1",
    "%YAML 9.9\n---", "---", "...", "a", "- a", "\tmodel: x", "unknown: 5", "model: &a [x]\ncorpora: *a", "? ", ": ",
    "!!binary aGk=: 1", "\ufeff", "model : x", "1.5: x", "[a]: b", "{}", "&a a: *a", "!!python/name:os.system x: 1",
    "\u2028", "\x85", "\0", "\x07", "model",
)  # fmt: skip


@functools.cache
def originals() -> dict[str, dict[str, str]]:
    """A checkout in the current folder; the kinds of the parameters of every notebook."""
    folder = Path("checkout/notebooks")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted((paths.checkout() / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = [c for c in nbformat.read(file, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
        nbformat.write(v4.new_notebook(cells=cells), folder / file.name)
    return {file.stem: parameters.declared(file) for file in sorted(folder.glob("*.ipynb"))}


def presets(seed: int) -> Case:
    """One preset, one list of pairs, or both; damaged as the seed tells."""
    rng, known = random.Random(seed), originals()
    shutil.rmtree("case", ignore_errors=True)
    shutil.rmtree("out", ignore_errors=True)
    Path("case").mkdir()
    names = rng.sample(sorted(known), rng.choice((1, 1, 2, 3)))
    file, kinds, done = Path("case/preset.yaml"), {k: v for name in names for k, v in known[name].items()}, []
    chosen = rng.sample(sorted(kinds), min(len(kinds), rng.randrange(6)))
    text = "".join(f"{name}: {_plausible(kinds[name], rng)}\n" for name in chosen)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        line = f"{rng.choice(sorted(kinds))}: {rng.choice(VALUES)}" if rng.random() < 0.7 else rng.choice(LINES)
        lines = text.splitlines(keepends=True)
        lines.insert(rng.randrange(len(lines) + 1), f"{line}\n")
        text = "".join(lines)
        done.append(f"{line[:60]!r}")
    encoding = rng.choice((*["utf-8"] * 8, "utf-8-sig", "utf-16"))
    file.write_text(text, encoding=encoding, errors="surrogatepass", newline="")
    if rng.random() < 0.3:
        done.append(rng.choice((damage.flip, damage.cut, damage.overwrite, damage.misplace))(file, rng))
    pairs = {}
    for _ in range(rng.choice((0, 0, 1, 2)) if rng.random() < 0.7 else 0):
        name = rng.choice((*sorted(kinds), "unknown", "", "a b", "日本"))
        pairs[name] = rng.choice(VALUES) if rng.random() < 0.7 else _plausible(kinds.get(name, "str"), rng)
    sound = not done and not pairs and encoding != "utf-16"
    words = ["run", *names, *(["--preset", str(file)] if not pairs or rng.random() < 0.7 else []), "--out", "out"]
    words += [word for pair in pairs.items() for word in ("-p", *pair)]
    return Case(f"{names} {encoding} {done} {pairs}"[:400], functools.partial(_run, words, file, pairs, known, sound))


def _plausible(kind: str, rng: random.Random) -> str:
    """A value of a kind, in YAML."""
    simple = {"int": "3", "float": "0.5", "bool": "false", "str": "word"}
    if kind.startswith("list"):
        inner = simple.get(kind[5:-1], "word")
        return f"[{', '.join([inner] * rng.randrange(4))}]"
    return simple.get(kind, "null")


def _run(words: list[str], file: Path, pairs: dict[str, str], known: dict, sound: bool) -> int:
    given = {}

    def note(source, values, folder):
        given[source.stem] = values
        return workbook.Outcome(source.stem, folder / source.name)

    before = file.read_bytes() if file.is_file() else None

    def main() -> int:
        try:
            return cli.main(words)
        except SystemExit as stopped:  # -p NAME -.inf
            return stopped.code

    with mock.patch.multiple(workbook, checkout=lambda: Path("checkout"), _execute=note):
        code = main()
    assert (file.read_bytes() if file.is_file() else None) == before, "the preset is another"
    assert Path("out").exists() == (code == 0), "a folder is left" if code else "no folder"
    assert code == 0 or not sound, "refused"
    if code == 0:
        values = (yaml.safe_load(before.decode("utf-8")) or {}) if "--preset" in words else {}
        values |= {name: yaml.safe_load(text) for name, text in pairs.items()}
        for notebook, ours in given.items():
            for name, value in ours.items():
                if name in values or name not in ("figures", "results"):
                    _check(name, value, values[name], known[notebook][name])
            assert set(values) & set(known[notebook]) <= set(ours), "something is left out"
    return code


def _check(name: str, value: object, wanted: object, kind: str) -> None:
    """The value asked for, of its kind, in Python as in JSON."""
    told = f"{name}, {kind}, is {value!r}, not {wanted!r}"
    assert (value, type(value)) == (wanted, type(wanted)), told
    assert type(value).__name__ in {
        "": ("int", "float", "bool", "str", "list", "dict", "NoneType"),
        "float": ("int", "float"),
    }.get(kind, (kind.partition("[")[0],)), told
    assert not isinstance(value, float) or math.isfinite(value), told
    assert json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode()) == value, told
    space: dict = {}
    exec(PythonTranslator.codify({name: value}), space)
    assert space[name] == value, f"{told}; in Python {space[name]!r}"
