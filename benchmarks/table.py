"""What a folder of results says: every line of it in short, and what it has reached of what must hold on a GPU.

python -m benchmarks.table FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

SECONDS = {"asvd-1": 120, "nsvd-1": 120, "best": 600}  # of a whole model of LLaMA-7B's shapes
DEVICE = 24 * 2**30  # bytes of a GPU's memory while it is compressed
PER_LAYER, DECODE, LATENT = 20, 1.5, 1 / 1.15  # times the published route's, the dense model's, the dense cache's speed
Row = tuple[str, str, str | None, bool]  # what, what must hold, what was reached (None: not measured), whether it holds


def lines(folder: Path, name: str) -> list[dict]:
    """The results of one benchmark; none where it has not run."""
    file = folder / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def summary(folder: Path) -> list[dict[str, str]]:
    """A row for each result: the benchmark, what was measured, what came out, and on which machine."""
    return [
        {"benchmark": name, "what": what(line), "result": result(line), "machine": machine(line.get("machine", {}))}
        for name, (what, result) in SAID.items()
        for line in lines(folder, name)
    ]


def machine(told: dict) -> str:
    """In short, with the load of the minute before: how many processes wanted to run."""
    load = f"{told['load'][0]:.1f}" if "load" in told else "not told"
    cores = f"{told.get('threads')} of {told.get('cores')} cores"
    return f"{told.get('processor')}, {told.get('device')}, {cores}, load {load}"


def text_of(line: dict) -> str:
    return f"{Path(line['model']).name}, {' × '.join(map(str, line['windows']))} tokens"


def speeds(line: dict) -> dict[str, float]:
    """How many times as fast, by the processor's seconds where there are such: other work disturbs them less."""
    return line.get("faster by processor seconds") or line["faster"]


def clock(line: dict) -> str:
    return ", in processor seconds" if line.get("faster by processor seconds") else ""


def scaled(line: dict) -> str:
    peak = f", {line['peak']['anonymous'] / 2**20:.0f} MiB" if "peak" in line else ", on a line through two depths"
    return f"{line['wall']:.0f} s{peak}"


SAID = {  # what was measured and what came out, by benchmark
    "decompose": (
        lambda line: f"{' × '.join(map(str, line['shape']))}, times the published speed{clock(line)}",
        lambda line: ", ".join(f"{name} {value:.1f}" for name, value in speeds(line).items()),
    ),
    "calibrate": (
        lambda line: f"{text_of(line)}, in plain forward passes",
        lambda line: ", ".join(f"{name} {value:.2f}" for name, value in line["in forward passes"].items()),
    ),
    "compress": (
        lambda line: f"{text_of(line)}, {line['method']}, {line['ratio']:.0%} removed",
        lambda line: f"{line['seconds']['wall']:.0f} s, {line['seconds']['cpu']:.0f} of the processor",
    ),
    "scale": (
        lambda line: (
            f"{line['depth']} blocks, {line['count']} × {line['length']} tokens, {line['method']}, {line['source']}"
        ),
        scaled,
    ),
    "infer": (
        lambda line: (
            f"{Path(line['model']).name}, {line['dtype']}, {line['ratio']:.0%} removed, {line['factors']}, times dense"
        ),
        lambda line: ", ".join(f"{what} {line[f'{what}_times_dense']:.2f}" for what in ("prefill", "decode")),
    ),
    "cache": (
        lambda line: (
            f"{Path(line['model']).name}, {line['cache_ratio']:.0%} of the cache, {line['held']} tokens, times dense"
        ),
        lambda line: f"decode {line['decode_times_dense']:.2f}",
    ),
}


def whole_models(folder: Path) -> Iterator[Row]:
    """Seconds and bytes of each method; a line through two depths gives the seconds of all blocks."""
    found = {line["method"]: line for line in lines(folder, "scale") if "from_depths" in line}
    for method, limit in SECONDS.items():
        line = found.get(method)
        text = line and f"{line['wall']:.0f} s, {line['depth']} blocks, {line['count']} × {line['length']} tokens"
        yield f"calibrate and compress, {method}", f"≤ {limit} s", text, bool(line) and line["wall"] <= limit
        peak = (line or {}).get("device_peak")
        text = None if peak is None else f"{peak / 2**30:.1f} GiB"
        yield f"memory of the device, {method}", "≤ 24 GiB", text, peak is not None and peak <= DEVICE


def layers(folder: Path) -> Iterator[Row]:
    """How many times as fast as the published route, by shape; the best of its figures where it is asked for several ratios."""
    for line in lines(folder, "decompose"):
        what = f"decomposition, {' × '.join(map(str, line['shape']))}"
        for name, value in speeds(line).items():
            yield f"{what}, {name}", f"≥ {PER_LAYER} ×", f"{value:.1f} ×", value >= PER_LAYER
    if not lines(folder, "decompose"):
        yield "decomposition", f"≥ {PER_LAYER} ×", None, False


def decoding(folder: Path) -> Iterator[Row]:
    """Tokens a second at half of the parameters removed, and with half of the cache."""
    half = [line for line in lines(folder, "infer") if line["ratio"] == 0.5 and line["factors"] != "dense"]
    for line in half:
        value, how = line["decode_times_dense"], "compiled" if line["compiled"] else "eager"
        yield (
            f"decode, 50 % removed, {line['factors']}, {how}",
            f"≥ {DECODE} × dense",
            f"{value:.2f} ×",
            value >= DECODE,
        )
    if not half:
        yield "decode, 50 % removed", f"≥ {DECODE} × dense", None, False
    held = lines(folder, "cache")
    for line in held:
        value, what = line["decode_times_dense"], f"decode, latent cache at 0.5, {line['held']} tokens held"
        yield what, f"≥ {LATENT:.2f} × dense", f"{value:.2f} ×", value >= LATENT
    if not held:
        yield "decode, latent cache at 0.5", f"≥ {LATENT:.2f} × dense", None, False


def table(folder: Path) -> str:
    """All rows as a table in Markdown."""
    rows = [*whole_models(folder), *layers(folder), *decoding(folder)]
    said = [
        (what, must, text or "not measured", "yes" if holds else "no" if text else "")
        for what, must, text, holds in rows
    ]
    cells = [("what", "must hold", "reached", "holds"), ("---",) * 4, *said]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
