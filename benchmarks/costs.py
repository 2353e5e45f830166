"""What the statistics pass costs, as a ratio measured side by side in one run.

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

    seconds = median_seconds({"forward": forward, "statistics": lambda: nsvd.calibrate(model, windows)}, chosen.repeat)
    ratios = {"statistics pass / forward pass of the same tokens": seconds["statistics"] / seconds["forward"]}
    print(
        json.dumps(
            {"device": str(device), "threads": torch.get_num_threads(), "seconds": seconds, "ratios": ratios}, indent=1
        )
    )


if __name__ == "__main__":
    main()
