"""Argument lists of every command: options in any number and order, repeated, contradicting, with values of every sort.

A model compressed loads, is finite, and was not there before; a file of numbers is strict JSON. What is refused leaves every file
as it was; what succeeds changes only what it was told to write. A usage error is one line, too, and 2.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import stat
import sys
from pathlib import Path
from unittest import mock

import torch

import nsvd
from nsvd import cli
from nsvd.lab import workbook
from tests.fuzz import presets
from tests.fuzz.harness import Case
from tests.tiny import compressed, tiny_model, tiny_tokenizer

NUMBERS = (
    "0", "1", "2", "3", "4", "8", "-1", "0.3", "0.5", "0.9", "1.0", "1.5", "1e-9", "nan", "inf", "-inf", "-0.0",
    "1e308", "1e400", "0x10", "1_0", "٣", "1/2", "2/1", "0/0", "9999999999999", str(2**63), str(2**64), str(-(2**63)),
    "1" + "0" * 30, "9" * 5000, "1e-400", "+2",
)  # fmt: skip
WORDS = (
    "", " ", "x", "日本語", "🙂", "\udcff", "a\nb", "\t", "-", "--", "../case", "..", ".", "/dev/null", "/dev/full",
    "/nowhere/at/all", "x" * 300, "a/" * 3000, "m", "low", "m/config.json", "m/", "./m", "t.txt", "t.jsonl", "folder",
    "folder/x", "link", "dangling", "~", "*", "a:b", ":", "self", "random", "self+t.txt", "random+self", "+",
    "mini/web", "mini/", "mini/../x", "wikitext2", "%s", "{}", "@t.txt", "None", "new", "new/deeper", "keep.json",
    "t.txt/x", "x.gguf", "a/b", "org/model", "auto", "cpu", "cuda", "meta", "float16", "bfloat16", "float64", "int8",
    "svd", "asvd-1", "nsvd-1", "best", "kfac", "sola", "nid-2", "worst-case", "fisher", "strs", "true",
)  # fmt: skip
GOOD = {
    "--method": ("svd", "asvd-0", "asvd-1", "asvd-2", "nsvd-1", "ridge", "asvd", "kfac", "best", "sola"),
    "--ratio": ("0.3", "0.5", "0"), "--cache-ratio": ("0.5", "1"), "--k1": ("0.8", "0.5", "1"), "--alpha": ("0.5",),
    "--mu": ("0.01",), "--eta": ("0.01",), "--prime": ("0.2",), "--inner": ("svd", "asvd-1"), "--grid": ("1", "4"),
    "--floor": ("0.5",), "--keep-outer": ("0", "1"), "--o-from": ("0.5",),
    "--calibration": ("t.txt", "random", "self", "t.txt+random"), "--weights": ("uniform", "worst-case"),
    "--allocation": ("uniform", "strs", "spectrum", "fisher", "lems", "zero-sum", "svd-llm-v2", "sola"),
    "--factors": ("plain", "pivoted"),
    "--refine": ("0", "2"), "--distill": ("0", "2"), "--search-count": ("1", "2"), "--count": ("2", "4"),
    "--length": ("8", "16"), "--seed": ("0", "7"), "--device": ("cpu", "auto"),
    "--dtype": ("float32", "auto", "bfloat16", "float64"), "--data": ("t.txt", "t.jsonl"),
    "--json": ("numbers.json", "keep.json", "deep/numbers.json"), "--preset": ("p.yaml",), "--out": ("new", "folder"),
    "--jobs": ("1", "2"), "--shard": ("1/2", "2/2"),
}  # fmt: skip
SHORT = {"--count": ("4",), "--length": ("16",)}
FEW = {
    "compress": {"--method": ("svd", "asvd-1"), "--ratio": ("0.3",), "--calibration": ("t.txt",)} | SHORT,
    "evaluate": {"--data": ("t.txt",)} | SHORT,
    "run": {"--out": ("new",)},
    "info": {},
}


@functools.cache
def originals() -> Path:
    """A folder with a dense and a compressed model, texts, a preset, and files that nobody told us to change."""
    torch.set_default_dtype(torch.float32)
    presets.originals()
    place = Path("original")
    shutil.rmtree(place, ignore_errors=True)
    model = tiny_model()
    nsvd.save(model, tiny_tokenizer(), place / "m")
    nsvd.save(compressed(model), tiny_tokenizer(), place / "low")
    text = "The cat sat on the mat, 猫はマットの上. " * 60
    (place / "t.txt").write_text(text, encoding="utf-8")
    (place / "t.jsonl").write_text(f"{json.dumps({'text': text})}\n", encoding="utf-8")
    (place / "p.yaml").write_text("seed: 3\n", encoding="utf-8")
    (place / "keep.json").write_text("mine", encoding="utf-8")
    (place / "folder").mkdir()
    (place / "folder" / "mine").write_text("mine", encoding="utf-8")
    (place / "link").symlink_to("m")
    (place / "dangling").symlink_to("nowhere")
    return place


def arguments(seed: int) -> Case:
    """One list of arguments, as the seed tells."""
    original, rng = originals(), random.Random(seed)
    shutil.rmtree("case", ignore_errors=True)
    shutil.copytree(original, "case", symlinks=True)
    name = rng.choice(("compress", "compress", "compress", "evaluate", "evaluate", "run", "info"))
    options = {key: [rng.choice(values)] for key, values in FEW[name].items()}
    words = _draw(name, options, rng)
    return Case(" ".join(map(ascii, words))[:600], functools.partial(_run, words))


def _draw(name: str, options: dict[str, list[str]], rng: random.Random) -> list[str]:
    known = _options(name)
    places = {"compress": ["m", "new"], "evaluate": ["m"], "info": ["m"], "run": ["02"]}[name]
    parts = [[key, *values] for key, values in options.items()]
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        action = known[rng.choice(sorted(known))]
        key, count = rng.choice(action.option_strings), rng.choice((1, 1, 1, 0, 2, 3))
        count = {None: 1, 0: 0}.get(action.nargs, count)
        part = [key, *(_value(action.option_strings[0], rng) for _ in range(count))]
        same = [n for n, each in enumerate(parts) if each[0] == key]
        if same and rng.random() < 0.7:
            parts[same[0]] = part  # in its place
        else:
            parts.append(part)
        if rng.random() < 0.1:
            parts[-1] = ["=".join(part[:2]), *part[2:]]
        if rng.random() < 0.1 and parts:
            parts.pop(rng.randrange(len(parts)))
    for number in range(len(places)):
        if rng.random() < 0.15:
            places[number] = rng.choice(WORDS)
    if rng.random() < 0.1:
        rng.choice((places.pop, lambda: places.append(rng.choice(WORDS))))()
    if rng.random() < 0.2:
        rng.shuffle(parts)
    words = [word for part in parts for word in part]
    words = [*places, *words] if rng.random() < 0.8 else [*words, *places]
    first = [name] if rng.random() < 0.98 else rng.choice(([], [""], ["Info"], ["fly"]))
    return first + words


def _options(name: str) -> dict[str, argparse.Action]:
    """The options that the command really has, by their first name."""
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    every = commands.choices[name]._actions
    return {action.option_strings[0]: action for action in every if action.option_strings}


def _value(option: str, rng: random.Random) -> str:
    if option in GOOD and rng.random() < 0.6:
        return rng.choice(GOOD[option])
    if option == "-p":
        return rng.choice((*presets.VALUES, "seed", "seed", "seed")).replace("\0", "").replace("\ud83d", "")
    if option in ("--distill", "--refine"):  # more of it is not wrong, but takes its time
        return rng.choice([number for number in NUMBERS if len(number) < 4])
    return rng.choice(NUMBERS if rng.random() < 0.5 else WORDS)


def _look(folder: Path) -> dict[str, object]:
    """Everything below a folder: contents of files, targets of links."""
    found = {}
    for path in folder.rglob("*"):
        held = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = held
    return found


def _run(words: list[str]) -> int:
    def note(source, values, folder):
        return workbook.Outcome(source.stem, folder / source.name)

    top, place = Path.cwd(), Path.cwd() / "case"
    checkout = top / "checkout"
    before, beside = _look(place), sorted(os.listdir(top))
    os.chdir(place)
    try:
        with mock.patch.multiple(workbook, checkout=lambda: checkout, _execute=note):
            code = _told(words)
    except SystemExit as stopped:
        code = stopped.code
    finally:
        os.chdir(top)
    assert all(stat.S_ISCHR(os.stat(device).st_mode) for device in ("/dev/null", "/dev/full")), "a device is gone"
    assert sorted(os.listdir(top)) == beside, "something lies beside"
    after = _look(place)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name, 0) != after.get(name, 0))
    assert not changed or code == 0, f"refused, but {changed[:5]} changed"
    ours = {"compress": ("m", "low"), "evaluate": ("keep.json",)}.get(words[0] if words else "", ())
    harmed = [name for name in changed if name in before and Path(name).parts[0] not in ours]
    assert not harmed, f"{harmed[:5]} changed"
    if code == 0 and changed:
        _judge(words, place, after, changed)
    return code


def _told(words: list[str]) -> int:
    """Run a command. What it will take, which it says before it works, is no fault; all else on standard error stays there."""
    code = None
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = cli.main(words)
    finally:
        for line in said.getvalue().splitlines(keepends=True):
            if code or not re.match(r"nsvd compress: [\d.]+ passes over [\d,]+ tokens; ", line):
                sys.stderr.write(line)
    return code


def _judge(words: list[str], place: Path, after: dict, changed: list[str]) -> None:
    """What was written is what was asked for, whole."""
    if words[0] == "compress":
        (out,) = {Path(name).parts[0] for name in changed}
        folder = next(
            path for path in (place / out, *sorted((place / out).rglob("*"))) if (path / "config.json").is_file()
        )
        model, _ = nsvd.load(folder, device="cpu")
        with torch.no_grad():
            said = model(torch.arange(2, 10)[None]).logits
        assert said.isfinite().all(), "not finite"
    elif words[0] == "evaluate":
        (name,) = (name for name in changed if after[name] is not None)
        table = json.loads(after[name], parse_constant=_no_json)
        assert table["results"], "no numbers"
    elif words[0] == "run":
        assert all(after[name] is None for name in changed), changed  # folders alone: nothing was executed
    else:
        raise AssertionError(changed)


def _no_json(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
