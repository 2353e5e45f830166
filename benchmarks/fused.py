"""One matrix or several: layers that read one input, compressed by ASVD-I as one matrix and apart, with as many parameters.

    python -m benchmarks.fused mini-llama --calibration mini/encyclopedia --data mini/encyclopedia mini/newswire mini/reading_zh

prints a line a case: perplexity over the dense model's on every text, when nothing else is compressed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math

import torch
from torch import nn

import nsvd
from nsvd.linalg import METHODS
from nsvd.linalg.precision import double
from nsvd.walk.moments import shared_inputs
from nsvd.walk.text import trial


def groups(model: nn.Module) -> list[list[str]]:
    """Layers that read one input, two at least."""
    layers = nsvd.targets(model)
    leader = shared_inputs(model, layers, trial(model))
    found: dict[str, list[str]] = {}
    for name in layers:
        found.setdefault(leader[name], []).append(name)
    return [names for names in found.values() if len(names) > 1]


def rank(d_out: int, d_in: int, kept: float, factors: str) -> int:
    """The largest rank whose factors hold ``kept`` of the parameters."""
    total, budget = d_out + d_in, kept * d_out * d_in
    return int(budget / total if factors == "plain" else (total - math.sqrt(total**2 - 4 * budget)) / 2)


@torch.no_grad()
def compressed(
    model: nn.Module, stats: nsvd.Statistics, parts: list[list[str]], kept: float, factors: str
) -> nn.Module:
    """A copy with every part, the layers one above the other, at its rank; as dense weights, for their perplexity."""
    changed = copy.deepcopy(model)
    for names in parts:
        rows = [changed.get_submodule(name).weight for name in names]
        W = double(torch.cat(rows))
        k = min(rank(*W.shape, kept, factors), *W.shape)
        new = METHODS["asvd-1"](W, stats[names[0]], k).dense()
        for row, part in zip(rows, new.split([len(row) for row in rows]), strict=True):
            row.copy_(part)
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default="mini/encyclopedia")
    parser.add_argument("--data", nargs="+", default=["mini/encyclopedia", "mini/newswire", "mini/reading_zh"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4], help="fractions removed from the layers")
    parser.add_argument("--count", type=int, default=48, help="calibration windows")
    parser.add_argument("--test-count", type=int, default=8, help="test windows a text")
    parser.add_argument("--length", type=int, default=256)
    chosen = parser.parse_args()
    model, tokenizer = nsvd.load(chosen.model, dtype="float32")
    how = {"length": chosen.length}
    windows = nsvd.windows(chosen.calibration, tokenizer, split="calibration", count=chosen.count, **how)
    texts = {name: nsvd.windows(name, tokenizer, count=chosen.test_count, **how) for name in chosen.data}
    stats, dense = nsvd.calibrate(model, windows), {name: nsvd.evaluate(model, ids).nll for name, ids in texts.items()}
    every = groups(model)
    for size in sorted({len(names) for names in every}, reverse=True):
        some = [names for names in every if len(names) == size]
        for ratio in chosen.ratios:
            for factors in ("plain", "pivoted"):
                ways = {"one matrix": some, "apart": [[name] for names in some for name in names]}
                for way, parts in ways.items():
                    changed = compressed(model, stats, parts, 1 - ratio, factors)
                    times = {
                        name: math.exp(nsvd.evaluate(changed, ids).nll - dense[name]) for name, ids in texts.items()
                    }
                    kinds = [name.rsplit(".", 1)[1] for name in some[0]]
                    about = {"layers": kinds, "ratio": ratio, "factors": factors, "way": way}
                    print(json.dumps(about | {name: round(value, 3) for name, value in times.items()}), flush=True)


if __name__ == "__main__":
    main()
