"""Files that we wrote and read again: results, and statistics; damaged none to three times.

Results: every line that a plain reading accepts is found and outlives a new record; else the file is refused and as it was.
Statistics: what is read is what was written, to the bit; where only the sums were written anew it is finite, and fit to use.
"""

import functools
import json
import random
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nsvd
from nsvd.lab.records import Records, origin
from tests.fuzz import damage
from tests.fuzz.harness import Case, refusing
from tests.tiny import statistics, tiny_model

ROWS = [
    ({"method": "nsvd-1", "k1": 0.95, "text": text}, {"nll": n + 0.5})
    for n, text in enumerate(("日本語", "a\u2028b", "c", "", "\\"))
]
NEW = {"method": "new", "corpus": "x"}, {"nll": 1.0}
LINES = (
    "", "{}", "[]", "null", "5", '"x"', "x", "[" * 100_000, '{"parameters": {}, "numbers": {}, "origin": {}}',
    '{"parameters": {}}', '{"parameters": [], "numbers": {}, "origin": {}}',
    '{"parameters": {"a": 1}, "numbers": {"a": 2}, "origin": {"code": []}}',
    '{"parameters": {"a": NaN}, "numbers": {}, "origin": {}}',
    '{"parameters": {"a": ' + "9" * 5000 + '}, "numbers": {}, "origin": {}}',
    '{"parameters": {"a": {"b": [1]}}, "numbers": {"c": {"d": []}}, "origin": {"code": "x"}}', "\ufeff", "\0", "\r",
    '{"parameters": {"a": "\\ud83d"}, "numbers": {"\\ud83d": 1}, "origin": {}}',
    '{"parameters": 1, "parameters": {}, "numbers": {}, "origin": {}}',
)  # fmt: skip


@functools.cache
def originals() -> tuple[nsvd.Statistics, bytes]:
    """Statistics, and a file of results."""
    torch.set_default_dtype(torch.float32)
    stats = statistics(tiny_model())
    stats.save("statistics.safetensors")
    Path("results.jsonl").unlink(missing_ok=True)
    for parameters, numbers in ROWS:
        Records("results.jsonl").add(parameters, numbers)
    return stats, Path("results.jsonl").read_bytes()


def records(seed: int) -> Case:
    """One file, damaged as the seed tells."""
    originals()
    rng, folder = random.Random(seed), Path("case")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if rng.random() < 0.5:
        file = Path(shutil.copy("results.jsonl", folder))
        done = [_damage_lines(file, rng) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
        return Case(f"results: {'; '.join(done)}", functools.partial(_results, file))
    file = Path(shutil.copy("statistics.safetensors", folder))
    done = [_damage_statistics(file, rng) for _ in range(rng.choice((0, 1, 1, 1, 2, 3)))]
    return Case(f"statistics: {'; '.join(done)}", functools.partial(_statistics, file))


def _damage_lines(file: Path, rng: random.Random) -> str:
    if not file.is_file():
        return "left alone"
    way = rng.choice(("bytes", "bytes", "whole", "line", "line", "value", "value", "value", "newlines", "doubled"))
    if way in ("bytes", "whole"):
        return rng.choice((damage.flip, damage.cut) if way == "bytes" else (damage.overwrite, damage.misplace))(
            file, rng
        )
    lines = file.read_bytes().split(b"\n")
    number = rng.randrange(len(lines))
    if way == "line":
        lines[number : number + rng.choice((0, 1))] = [rng.choice(LINES).encode()]
    elif way == "doubled":
        lines.insert(rng.randrange(len(lines)), lines[number])
    elif way == "value":
        one = file.with_name("line.json")
        one.write_bytes(lines[number])
        done = damage.change_json(one, rng, {"parameters": {}, "numbers": {"nll": [1]}, "origin": origin()})
        lines[number] = one.read_bytes() if one.is_file() else b""
        one.unlink(missing_ok=True)
        way = done
    end = rng.choice((b"\r\n", b"\r", b"\n\n", "\u2028".encode())) if way == "newlines" else b"\n"
    file.write_bytes(end.join(lines))
    return f"line {number + 1}: {way} {lines[number][:60] if number < len(lines) else ''}"


def _rows(file: Path) -> list[dict] | None:
    """Plainly read: the rows, or None where a line is none. The last may be cut short."""
    if not file.exists():
        return []
    if not file.is_file():
        return None
    *lines, tail = file.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate([*lines, tail] if tail else lines):
        try:
            row = json.loads(line)
            if not all(isinstance(row[part], dict) for part in ("parameters", "numbers", "origin")):
                raise TypeError
            rows.append(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):
                return None
    return rows


def _results(file: Path) -> int | None:
    rows, before, ours = _rows(file), file.read_bytes() if file.is_file() else None, []
    code = refusing(lambda: ours.append(Records(file)), file.name)
    assert (code is None) == (rows is not None), "refused" if code else "not refused"
    if code is None:
        last = {_key(row["parameters"]): row for row in rows}
        for row in last.values():
            if row["origin"].get("code") == origin()["code"]:
                assert _key(ours[0].find(**row["parameters"])) == _key(row["numbers"]), "not found"
        assert len(ours[0].frame(stale=True)) == len(last), "a row is missing"
        if file.is_symlink():  # to nowhere
            return refusing(lambda: ours[0].add(*NEW), file.name)
        assert ours[0].add(*NEW) == NEW[1]
        last[_key(NEW[0])] = {"parameters": NEW[0], "numbers": NEW[1], "origin": origin()}
        there = {_key(row["parameters"]): _key(row) for row in _rows(file)}
        assert there == {key: _key(row) for key, row in last.items()}, "a row is lost"
        assert Records(file).find(**NEW[0]) == NEW[1]
    assert code is None or (file.read_bytes() if file.is_file() else None) == before, "the file is another"
    return code


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _damage_statistics(file: Path, rng: random.Random) -> str:
    if not file.is_file():
        return "left alone"
    way = rng.choice(("bytes", "whole", "header", "tensors", "about", "about", "about"))
    if way == "about":
        return _damage_about(file, rng)
    if way in ("header", "tensors"):
        return (damage.change_header if way == "header" else damage.change_tensors)(file, rng)
    return rng.choice((damage.flip, damage.cut) if way == "bytes" else (damage.overwrite, damage.misplace))(file, rng)


def _damage_about(file: Path, rng: random.Random) -> str:
    """What stands beside the tensors; now and then without the sum of it all."""
    try:
        with safe_open(file, "pt") as stored:
            about = json.loads((stored.metadata() or {})["nsvd_statistics"])
        tensors = load_file(file)
    except Exception:
        return damage.flip(file, rng)
    one = file.with_name("about.json")
    one.write_text(json.dumps(about), encoding="utf-8")
    done = damage.change_json(
        one, rng, {"sum": "x", "n": {}, "inputs": {}, "gradients": ["x"], "origin": {"weights": "x"}}
    )
    text = one.read_text(encoding="utf-8") if one.is_file() else "{}"
    if rng.random() < 0.3 and isinstance(json.loads(text), dict):
        text = json.dumps({key: value for key, value in json.loads(text).items() if key != "sum"})
        done += ", no sum"
    one.unlink(missing_ok=True)
    save_file(tensors, file, metadata={"nsvd_statistics": text})
    return done


def _summed(file: Path) -> bool:
    with safe_open(file, "pt") as stored:
        return json.loads(stored.metadata()["nsvd_statistics"]).get("sum") is not None


def _statistics(file: Path) -> int | None:
    wrote, read = originals()[0], []
    code = refusing(lambda: read.append(nsvd.Statistics.load(file)), file.name)
    if code is None:
        (stats,) = read
        if _summed(file):
            assert (stats.inputs, stats.origin) == (wrote.inputs, wrote.origin), "told otherwise"
            for name in wrote:
                ours, theirs = (vars(each[name]) for each in (stats, wrote))
                assert all(_same(ours[letter], theirs[letter]) for letter in theirs), f"other moments of {name}"
        code = refusing(lambda: _use(stats), "layer")
        assert code is None or not _summed(file), "unfit for use"
    return code


def _same(one: object, other: object) -> bool:
    return torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


def _use(stats: nsvd.Statistics) -> None:
    model = tiny_model()
    nsvd.compress_(model, stats, method="asvd-1", ratio=0.3)
    assert all(parameter.isfinite().all() for parameter in model.parameters()), "not finite"
