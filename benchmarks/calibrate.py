"""What the statistics pass costs, in units of a plain forward pass of the same tokens, beside the published route's pass.

python -m benchmarks.calibrate MODEL [--count 16] [--length 512] [--threads 1] [--device auto] [--out FILE]

The passes take turns in one run. The published route's pass is written from its description: a hook on every linear layer, and a
float64 product of each layer's own input, see ``benchmarks.published``; once more with float32 products, as its code has them.
Results are JSON lines: seconds by the clock and of the process, and how often the forward pass goes into them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import nsvd
from benchmarks import published
from benchmarks.machine import described, seconds


def both(function: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds by the clock, and of the process: the machine may have other work."""
    before = time.process_time()
    wall = seconds(function, device)
    return {"wall": wall, "cpu": time.process_time() - before}


def measured(model, windows: torch.Tensor, batch: int, repeat: int) -> dict:
    """Median seconds of every pass over ``repeat`` rounds after a short one, and ratios to the plain pass.

    On a CPU they are of the process's seconds, on a GPU of the clock's.
    """
    names, device = list(nsvd.targets(model)), model.device
    passes = {
        "forward": lambda ids: published.forward(model, ids, batch),
        "forward without head": lambda ids: published.forward(model.base_model, ids, batch),
        "statistics": lambda ids: nsvd.calibrate(model, ids),
        "published, float64": lambda ids: published.moments(model, ids, names, batch),
        "published, float32": lambda ids: published.moments(model, ids, names, batch, torch.float32),
    }
    for one in passes.values():
        one(windows[:1])
    rounds = [{name: both(lambda one=one: one(windows), device) for name, one in passes.items()} for _ in range(repeat)]
    clock = "cpu" if device.type == "cpu" else "wall"
    found = {n: {c: statistics.median(r[n][c] for r in rounds) for c in ("wall", "cpu")} for n in passes}
    ratios = {name: found[name][clock] / found["forward"][clock] for name in passes}
    return {"seconds": found, "in forward passes": {name: round(value, 3) for name, value in ratios.items()}}


def arguments(description: str) -> argparse.ArgumentParser:
    """The model, the text and the machine."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="a name or folder that nsvd.load reads")
    parser.add_argument("--calibration", default="mini/encyclopedia", help="a corpus, or random")
    parser.add_argument("--count", type=int, default=16, help="windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=4, help="windows that a plain pass reads at a time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", help="a file that the lines are added to")
    return parser


def prepared(chosen: argparse.Namespace) -> tuple:
    """The model, its windows and what the line tells of them."""
    torch.set_num_threads(chosen.threads)
    model, tokenizer = nsvd.load(chosen.model, device=chosen.device, dtype=chosen.dtype)
    windows = nsvd.domains(chosen.calibration, model, tokenizer, count=chosen.count, length=chosen.length)[0]
    told = {"model": chosen.model, "dtype": str(model.dtype), "windows": list(windows.shape)}
    return model, windows, told | {"machine": described(model.device)}


def tell(line: dict, out: str | None) -> None:
    """Print a line of JSON, and add it to a file."""
    text = json.dumps(line, ensure_ascii=False)
    print(text, flush=True)
    if out:
        with open(out, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def main() -> None:
    """Print one line."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=1)
    chosen = parser.parse_args()
    model, windows, told = prepared(chosen)
    tell({"benchmark": "calibrate"} | measured(model, windows, chosen.batch, chosen.repeat) | told, chosen.out)


if __name__ == "__main__":
    main()
