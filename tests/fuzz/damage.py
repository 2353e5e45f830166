"""Ways to damage a file: bytes, JSON values, tensors and their headers. Each takes a random generator and tells what it did."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HUGE = (10**6, 10**9, 10**12, 2**63, 10**30, 10**400)
VALUES = (
    None, True, False, 0, 1, -1, 2, 7, 1.5, -0.5, 1e308, float("nan"), float("inf"), "", "x", "128", "\ud83d", "a/b", "../x",
    "a" * 10_000, [], {}, [None], [1, 2], ["x"], {"x": None}, {"": {}}, [[[[[]]]]],
)  # fmt: skip
TEXTS = (
    "<html></html>",
    "null",
    "{}",
    "[]",
    "5",
    '"x"',
    "[" * 3000,
    '{"a":' * 3000,
    "\0" * 100,
    "\xff\xfe",
    "{'a': 1}",
)
DTYPES = ("BF16", "F16", "F32", "F64", "I16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "X")


def value(rng: random.Random):
    """Anything that JSON holds."""
    if rng.random() < 0.25:
        return rng.choice(HUGE) * rng.choice((1, 1, -1))
    if rng.random() < 0.03:
        deep: list = []
        for _ in range(rng.choice((50, 500))):
            deep = [deep]
        return deep
    return rng.choice(VALUES)


def flip(file: Path, rng: random.Random) -> str:
    """A few bits anywhere, or in the first hundred bytes, where headers are."""
    data = bytearray(file.read_bytes())
    count, most = rng.choice((1, 1, 2, 8)), len(data) if rng.random() < 0.7 else min(100, len(data))
    for _ in range(count if data else 0):
        data[rng.randrange(most)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"{count} bits of {file.name} flipped"


def cut(file: Path, rng: random.Random) -> str:
    """Shorter or longer than it was."""
    data = file.read_bytes()
    kept = rng.choice((0, 1, 7, 8, len(data) // 2, max(0, len(data) - 1), rng.randrange(len(data) + 1)))
    more = rng.choice((b"", b"", b"\0", b"}", b"x" * 1000))
    file.write_bytes(data[:kept] + more)
    return f"{file.name} cut to {kept} of {len(data)} bytes, {len(more)} added"


def overwrite(file: Path, rng: random.Random) -> str:
    """Something else altogether."""
    text = rng.choice(TEXTS)
    file.write_bytes(text.encode("latin-1"))
    return f"{file.name} holds {text[:12]!r}"


def misplace(file: Path, rng: random.Random) -> str:
    """Not there, elsewhere, or no file."""
    how = rng.choice(("removed", "renamed", "a folder", "a dangling link", "doubled"))
    if how == "doubled":
        name = rng.choice(
            ("adapter_config.json", "pytorch_model.bin", "model-00001-of-00002.safetensors", "vocab.json", "x")
        )
        (file.parent / name).write_bytes(file.read_bytes())
        return f"{file.name} also as {name}"
    if how == "renamed":
        file.rename(
            file.with_name(rng.choice(("x", f"{file.name}.bak", "pytorch_model.bin", "model.safetensors.index.json")))
        )
    else:
        file.unlink()
    if how == "a folder":
        file.mkdir()
    if how == "a dangling link":
        file.symlink_to("/nowhere/at/all")
    return f"{file.name} {how}"


def change_json(file: Path, rng: random.Random, extra: dict) -> str:
    """A value somewhere exchanged, taken out, renamed or added; one of ``extra`` where it is added."""
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return flip(file, rng) if file.is_file() else f"{file.name} left alone"
    places = list(_places(whole))
    how = rng.choice(("exchanged", "exchanged", "exchanged", "taken out", "renamed", "added", "swapped"))
    if not places or how == "added":
        key = rng.choice(sorted(extra)) if extra else "x"
        new = extra.get(key) if rng.random() < 0.7 else value(rng)
        if isinstance(whole, dict):
            whole[key] = new
        described = f"{key} added, {str(new)[:60]!r}"
    else:
        holder, key = rng.choice([place for place in places if place[2] < 3 or rng.random() < 0.1] or places)[:2]
        described = f"{str(key)[:60]} {how}"
        if how == "exchanged":
            holder[key] = value(rng)
            described += f" for {str(holder[key])[:60]!r}"
        elif how == "swapped":
            other, place = rng.choice(places)[:2]
            holder[key], other[place] = other[place], holder[key]
            if _places_cycle(whole):
                return f"{file.name} left alone"
        elif how == "taken out" or isinstance(holder, list):
            del holder[key]
        else:
            holder[rng.choice(("x", f"{key}_", ""))] = holder.pop(key)
    file.write_text(json.dumps(whole), encoding="utf-8")
    return f"{file.name}: {described}"


def _places(whole, depth: int = 0):
    """(holder, key, depth) of every value below."""
    pairs = whole.items() if isinstance(whole, dict) else enumerate(whole) if isinstance(whole, list) else ()
    for key, below in pairs:
        yield whole, key, depth
        if depth < 40:
            yield from _places(below, depth + 1)


def _places_cycle(whole) -> bool:
    try:
        json.dumps(whole)
    except (ValueError, RecursionError):
        return True
    return False


def change_header(file: Path, rng: random.Random) -> str:
    """The header of a safetensors file; the numbers stay."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        name = rng.choice([key for key in header if key != "__metadata__"])
    except (ValueError, IndexError, RecursionError):
        return flip(file, rng)
    entry, how = header[name], rng.choice(("dtype", "shape", "offsets", "renamed", "taken out", "size", "any"))
    if how == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif how == "shape":
        shape = entry["shape"]
        flat = [int(torch.Size(shape).numel())]
        entry["shape"] = rng.choice((shape[::-1], [1, *shape], [], [*shape, 0], [10**12, 10**12], [-1], flat))
    elif how == "offsets":
        entry["data_offsets"] = rng.choice(([0, 0], [0, 10**12], entry["data_offsets"][::-1], [-4, 4]))
    elif how == "renamed":
        header[rng.choice(("x", name.removeprefix("model."), f"model.{name}", ""))] = header.pop(name)
    elif how == "taken out":
        header.pop(name)
    elif how == "any":
        entry[rng.choice(("dtype", "shape", "data_offsets"))] = value(rng)
    text = json.dumps(header).encode()
    length = rng.choice((0, 2**40, 2**63, len(text) + 1, len(text) - 1)) if how == "size" else len(text)
    file.write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])
    return f"{file.name}: {how} of {name} in the header, {str(header.get(name))[:80]}"


def change_tensors(file: Path, rng: random.Random) -> str:
    """A whole file again, with another tensor in it."""
    try:
        tensors = load_file(file)
        name = rng.choice(sorted(tensors))
    except Exception:
        return flip(file, rng)
    tensor, how = (
        tensors.pop(name),
        rng.choice(("nan", "inf", "cut", "flat", "cast", "gone", "more", "integers", "empty", "zero")),
    )
    if how in ("nan", "inf", "zero"):
        flat = tensor.flatten().clone()
        flat[rng.randrange(len(flat))] = float(how) if how != "zero" and flat.is_floating_point() else 0
        tensors[name] = flat.view_as(tensor)
    elif how == "more":
        tensors |= {name: tensor, rng.choice((f"{name}.x", "x", "lm_head.weight", "model.layers.7.x")): torch.ones(3)}
    elif how != "gone":
        tensors[name] = {
            "cut": lambda t: t[:1].clone(),
            "flat": lambda t: t.flatten(),
            "cast": lambda t: t.to(rng.choice((torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn))),
            "integers": lambda t: t.to(torch.int64),
            "empty": lambda t: t[:0].clone(),
        }[how](tensor)
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{file.name}: {name} {how}"
