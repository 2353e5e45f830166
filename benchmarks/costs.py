"""What the statistics pass and the decompositions cost, as ratios measured side by side in one run.

python benchmarks/costs.py [--model mini-llama] [--repeat 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

import nsvd


def median_seconds(functions: dict, repeat: int) -> dict[str, float]:
    """Median of ``repeat`` interleaved timings of each function, after one unmeasured call."""
    times = {name: [] for name in functions}
    for turn in range(repeat + 1):
        for name, function in functions.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini-llama")
    parser.add_argument("--corpus", default="mini/encyclopedia")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    chosen = parser.parse_args()
    model, tokenizer = nsvd.load(chosen.model, dtype="float32")
    windows = nsvd.windows(chosen.corpus, tokenizer, split="calibration", count=chosen.count)
    device = next(model.parameters()).device

    @torch.no_grad()
    def forward():
        for ids in windows.split(8):
            model(input_ids=ids.to(device), use_cache=False)

    stats = nsvd.calibrate(model, windows)
    prepared = nsvd.prepare(model, stats, "asvd-1")
    method, layers = nsvd.METHODS["nsvd-1"], nsvd.targets(model)
    ratios, splits = (0.1, 0.2, 0.3, 0.4, 0.5), (0.95, 0.9, 0.8)

    def ranks(layer):
        return [nsvd.linalg.rank_for_ratio(*layer.weight.shape, ratio) for ratio in ratios]

    def every_cell(start_again: bool):
        for name, layer in layers.items():
            W = layer.weight.detach().double()
            for k in ranks(layer):
                for k1 in splits:
                    outer = method.prepare(W, stats[name].to(W.device)) if start_again else prepared[name]
                    method.cut(outer, k, k1=k1)

    seconds = median_seconds(
        {
            "forward": forward,
            "statistics": lambda: nsvd.calibrate(model, windows),
            "decompose once": lambda: nsvd.prepare(model, stats, "asvd-1"),
            "15 cells, decomposed once": lambda: every_cell(False),
            "15 cells, decomposed each time": lambda: every_cell(True),
        },
        chosen.repeat,
    )
    shared = seconds["decompose once"] + seconds["15 cells, decomposed once"]
    ratios = {
        "statistics pass / forward pass of the same tokens": seconds["statistics"] / seconds["forward"],
        "5 ratios × 3 splits: decomposing each time / once": seconds["15 cells, decomposed each time"] / shared,
    }
    print(
        json.dumps(
            {"device": str(device), "threads": torch.get_num_threads(), "seconds": seconds, "ratios": ratios}, indent=1
        )
    )


if __name__ == "__main__":
    main()
