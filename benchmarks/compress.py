"""What a compression takes, calibration and all, beside the published route in the same run.

python -m benchmarks.compress MODEL [--count 16] [--length 512] [--ratio 0.3] [--methods asvd-1 best] [--threads 1] [--out FILE]

The published route is written from its description, see ``benchmarks.published``. Every way begins with the dense model and the
windows, and ends with the compressed model. Results are JSON lines, one for each way: seconds by the clock and of the process,
by stage for ours, how many times as fast as the published route, and the perplexity on some of the windows.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

from torch import Tensor, nn

import nsvd
from benchmarks import published
from benchmarks.calibrate import arguments, both, prepared, tell


def measured(model: nn.Module, windows: Tensor, method: str, chosen: argparse.Namespace) -> dict:
    """One way, on a copy of the model."""
    model, stages = copy.deepcopy(model), []

    def ours() -> None:
        stages.append(nsvd.compress_(model, windows=windows, method=method, ratio=chosen.ratio).seconds)

    way = partial(published.compress_, model, windows, chosen.ratio, chosen.batch) if method == "published" else ours
    found = {"method": method, "ratio": chosen.ratio, "seconds": both(way, model.device)}
    found |= {"stages": stages[0]} if stages else {}
    if chosen.judged:
        found["perplexity"] = nsvd.perplexity(model, windows[: chosen.judged])
    return found


def main() -> None:
    """Print a line for every way."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--methods", nargs="+", default=["published", "asvd-1", "best"])
    parser.add_argument("--judged", type=int, default=4, help="windows that the perplexity is told of; 0: none")
    chosen = parser.parse_args()
    model, windows, told = prepared(chosen)
    clock, first = "cpu" if model.device.type == "cpu" else "wall", None
    for method in chosen.methods:
        found = measured(model, windows, method, chosen)
        first = first or (method, found["seconds"][clock])
        found[f"times as fast as {first[0]}"] = round(first[1] / found["seconds"][clock], 3)
        tell({"benchmark": "compress"} | found | told, chosen.out)


if __name__ == "__main__":
    main()
