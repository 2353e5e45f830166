"""Corpora: txt and jsonl files, damaged none to three times, cut into windows, or read by ``nsvd evaluate``.

Windows are compared with what a second, plain reading of the file gives: refused where that finds no text or too little of it,
else as many as there are, of the shape asked for, each a stretch of the text's own bytes, in order where that is promised.
"""

import functools
import gzip
import json
import math
import os
import random
import shutil
import stat
from pathlib import Path

import torch

import nsvd
from nsvd import cli
from nsvd.lab.tokens import beginning
from tests.fuzz import damage
from tests.fuzz.harness import Case, refusing
from tests.tiny import tiny_model, tiny_tokenizer

PIECES = (
    "The cat sat on the mat. ", "naïve café, ", "日本語の文章です。", "слово ", "🙂🙃", "a\tb ", "x" * 300, "line\nline ",
    "é\u0301",
)  # fmt: skip
ODD = (
    b"\xed\xa0\xbd", b"\0", b"\xef\xbb\xbf", b"\r\n", b"\r", "\u2028".encode(), "\x85".encode(),
    b"\xff", b"\n\n\n", b"\x1a", b"\x1c", b'{"text": "x"}', b"\n[]\n", b"\\ud83d", b"\\ud83d\\ude00", b'"', b"\\",
    b"\\u0000", b"<unk>", b"{", b"}",
)  # fmt: skip
LINES = (
    '{"txt": "x"}', '{"text": "x", "text": 5}', '["text"]', '"text"', '{"text": "\\ud83d"}',
    '{"text": "\\ud83d\\ude00 fine"}', "", '{"text": ["x"]}', '{"text": {"text": "x"}}', "[" * 100_000,
    '{"a":' * 100_000, '{"text": "x", "n": ' + "9" * 5000 + "}", "NaN", '{"text": "x", "n": NaN}', '{"text": ""}',
    '{"text": "  \\n"}', '{"text": "a\\u2028b\\u0000c\\r"}', '  {"text": "x"}  ', '{"text": "x"} {"text": "y"}',
    "{'text': 'x'}", '{"text": "x"',
)  # fmt: skip
MANY = 10_000  # windows that are looked at
FEW = 20_000  # bytes that ``nsvd evaluate`` reads whole


@functools.cache
def originals():
    """Tokenizers with and without a BOS, and a model, saved with either."""
    torch.set_default_dtype(torch.float32)
    tokenizers = {name: tiny_tokenizer(bos=name == "bos") for name in ("plain", "bos")}
    for name, tokenizer in tokenizers.items():
        nsvd.save(tiny_model(), tokenizer, Path(name))
    return tokenizers


@functools.cache
def _values() -> dict[str, int]:
    """The byte that each letter of the tokenizer stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(plain)))}


def corpora(seed: int) -> Case:
    """One file, damaged as the seed tells."""
    originals()
    rng, folder = random.Random(seed), Path("case")
    shutil.rmtree(folder, ignore_errors=True)
    split, kind = rng.choice(("test", "calibration")), rng.choice(("txt", "jsonl"))
    in_folder = kind == "jsonl" and rng.random() < 0.2
    file = folder / (f"deep/{split}.jsonl" if in_folder else f"text.{kind}")
    file.parent.mkdir(parents=True)
    documents = ["".join(rng.choices(PIECES, k=rng.randrange(40))) for _ in range(rng.randrange(1, 12))]
    if kind == "txt":
        file.write_text("\n\n".join(documents), encoding="utf-8", newline="")
    else:
        lines = [json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5) for text in documents]
        file.write_text("\n".join(lines) + "\n" * (rng.random() < 0.9), encoding="utf-8", newline="")
    done = [_damage(file, rng) for _ in range(rng.choice((0, 1, 1, 1, 2, 3)))]
    name = "case:deep" if in_folder else rng.choice((str(file), str(file.absolute())))
    how = {
        "length": rng.choice(
            (None, 2, 3, 8, 16, 64, 1, 0, -1, 10**6, 10**18, 2**63, 10**30) if rng.random() < 0.3 else (2, 8, 16)
        )
    }
    how["count"] = rng.choice((None, 1, 2, 5) if rng.random() < 0.8 else (0, -1, 50, 10**6, 10**18, 2**63, 10**30))
    how |= {"seed": rng.choice((0, 1, -1, 2**63)), "bos": rng.choice((None, None, True, False))}
    tokenizer = rng.choice(("plain", "bos"))
    whole = file.is_file() and file.stat().st_size > FEW and how["count"] is None
    if split == "test" and not whole and rng.random() < 0.4:
        asked = [
            word for key in ("length", "count", "seed") if how[key] is not None for word in (f"--{key}", str(how[key]))
        ]
        asked += [] if how["bos"] is None else ["--bos" if how["bos"] else "--no-bos"]
        run = functools.partial(_evaluate, file, tokenizer, name, how, asked)
    else:
        run = functools.partial(_cut, file, tokenizer, name, how, split)
    return Case(f"{name}: {'; '.join(done)}; {split}, {tokenizer}, {how}", run)


def _damage(file: Path, rng: random.Random) -> str:
    way = rng.choice(
        ("bytes", "bytes", "whole", "odd", "odd", "lines", "lines", "encoded", "newlines", "large", "special")
    )
    if not file.is_file() or way == "whole":
        return rng.choice((damage.overwrite, damage.misplace))(file, rng) if file.is_file() else "left alone"
    if way == "bytes":
        return rng.choice((damage.flip, damage.cut))(file, rng)
    if way == "special":
        return _special(file, rng)
    return {"odd": _odd, "lines": _lines, "encoded": _encoded, "newlines": _newlines, "large": _large}[way](file, rng)


def _odd(file: Path, rng: random.Random) -> str:
    data, piece = file.read_bytes(), rng.choice(ODD)
    place = rng.choice((0, len(data), rng.randrange(len(data) + 1)))
    file.write_bytes(data[:place] + piece + data[place:])
    return f"{piece!r} at {place}"


def _lines(file: Path, rng: random.Random) -> str:
    lines = file.read_bytes().split(b"\n")
    new = (
        rng.choice(LINES)
        if rng.random() < 0.6
        else json.dumps(rng.choice(({"text": damage.value(rng)}, damage.value(rng))))
    )
    number = rng.randrange(len(lines))
    lines[number : number + rng.choice((0, 1))] = [new.encode("utf-8", "surrogatepass")]
    file.write_bytes(b"\n".join(lines))
    return f"line {number + 1} is {new[:40]!r}"


def _encoded(file: Path, rng: random.Random) -> str:
    name = rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp1252", "utf-7", "gzip"))
    data = file.read_bytes()
    if name == "gzip":
        file.write_bytes(gzip.compress(data, mtime=0))
    else:
        file.write_bytes(data.decode("utf-8", "replace").encode(name, "replace"))
    return f"in {name}"


def _newlines(file: Path, rng: random.Random) -> str:
    new = rng.choice((b"\r\n", b"\r", b"\n\n", "\u2028".encode(), b"", b" ", b"\n\r"))
    file.write_bytes(file.read_bytes().replace(b"\n", new))
    return f"lines end in {new!r}"


def _large(file: Path, rng: random.Random) -> str:
    """A long line, many lines, or (seldom) more than is tokenized as a whole."""
    what, times = rng.choice((("x", 10**6), ("日", 10**5), (" ", 10**6), ("\n", 10**5), ("word ", 10**5)))
    if rng.random() < 0.05:
        what, times = "The cat sat. ", 400_000
    text = json.dumps({"text": what * times}) + "\n" if file.suffix == ".jsonl" else what * times
    if what == "\n" and file.suffix == ".jsonl":
        text = '{"text": ""}\n' * 10**5
    with file.open("a", encoding="utf-8", newline="") as stream:
        stream.write(text)
    return f"{times} times {what!r} added"


def _special(file: Path, rng: random.Random) -> str:
    how = rng.choice(("pipe", "zero", "itself", "null", "holes", "empty", "link"))
    if how == "link":
        file.rename(file.with_name("elsewhere"))
        file.symlink_to("elsewhere")
        return how
    file.unlink()
    if how == "pipe":
        os.mkfifo(file)
    elif how in ("zero", "null"):
        file.symlink_to(f"/dev/{how}")
    elif how == "itself":
        file.symlink_to(file.name)
    else:
        file.write_bytes(b"")
        os.truncate(file, 10**8 if how == "holes" else 0)
    return how


def _read(file: Path) -> bytes | None:
    """The text of a file in UTF-8, documents joined, or None where it is none."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return None
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        if file.suffix == ".txt":
            documents = [text]
        else:
            lines = text.split("\n")
            documents = [json.loads(line)["text"] for line in (lines if lines[-1] else lines[:-1])]
        if file.suffix == ".txt" and "\0" in text:
            return None
        return "\n\n".join(text for text in documents if text.strip()).encode() or None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _expected(file: Path, tokenizer, how: dict, split: str) -> tuple[bytes, int, int, int | None] | None:
    """The text, number and length of its windows and the token that they begin with; None for what is to be refused."""
    text, first = _read(file), beginning(tokenizer, how["bos"])
    length = tokenizer.model_max_length if how["length"] is None else how["length"]
    if text is None or length < 2 or (how["count"] is not None and how["count"] < 1):
        return None
    there = len(text) // (length - (first is not None))
    if there < (how["count"] or 1):
        return None
    most = 256 if split == "calibration" else there
    return text, min(there, most if how["count"] is None else how["count"]), length, first


def _cut(file: Path, tokenizer: str, name: str, how: dict, split: str) -> int | None:
    tokenizer, cut = originals()[tokenizer], []
    expected = _expected(file, tokenizer, how, split)
    culprit = "" if _never(how) else "deep" if name == "case:deep" else file.name
    code = refusing(lambda: cut.append(nsvd.windows(name, tokenizer, split=split, **how)), culprit)
    assert (code is None) == (expected is not None), "refused" if code else "not refused"
    if code is None:
        text, count, length, first = expected
        (windows,) = cut
        assert (windows.dtype, *windows.shape) == (torch.long, count, length), f"windows {tuple(windows.shape)}"
        assert first is None or (windows[:, 0] == first).all(), "no BOS"
        ids = windows[:MANY, first is not None :]
        letters = tokenizer.convert_ids_to_tokens(ids.flatten().tolist())
        said = bytes(_values()[letter] for letter in letters)
        parts = [said[start : start + ids.shape[1]] for start in range(0, len(said), ids.shape[1])]
        assert all(part in text for part in parts), "not the text"
        assert split != "test" or how["count"] is not None or text.startswith(said), "not in order"
    return code


def _never(how: dict) -> bool:
    """Whether no file has such windows."""
    return (how["length"] is not None and how["length"] < 2) or (how["count"] is not None and how["count"] < 1)


def _evaluate(file: Path, tokenizer: str, name: str, how: dict, asked: list[str]) -> int:
    expected, numbers = _expected(file, originals()[tokenizer], how, "test"), Path("case/numbers.json")
    code = cli.main(["evaluate", tokenizer, "--data", name, *asked, "--json", str(numbers), "--device", "cpu"])
    assert (code == 0) == (expected is not None), f"exit code {code}"
    assert numbers.exists() == (code == 0), "numbers are left"
    if code == 0:
        (row,) = json.loads(numbers.read_text(encoding="utf-8"))["results"]
        assert (row["windows"], row["length"]) == expected[1:3], row
        assert 50 < row["perplexity"] < 5000, row
        assert math.isfinite(row["bits_per_byte"]), row
    return code
