"""What a latent key-value cache costs when decoding: tokens a second beside the dense cache's, taking turns in one run.

python -m benchmarks.cache MODEL [--cache-ratio 0.5] [--held 4096] [--blocks 4] [--out FILE]

MODEL is a name or folder that ``nsvd.load`` reads, or 1b or 7b: these shapes with random weights. The factors are those of
``svd``, which needs no text: speed depends on shapes. Results are JSON lines.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch

import nsvd
from benchmarks.calibrate import tell
from benchmarks.infer import Runner, loaded
from benchmarks.machine import described


def measured(model: torch.nn.Module, chosen: argparse.Namespace) -> dict:
    """Both caches after ``held`` tokens."""
    latent = copy.deepcopy(model)
    report = nsvd.compress_kv_(latent, method="svd", cache_ratio=chosen.cache_ratio)
    found = {"cache_ratio": report.cache_ratio_reached, "bytes_per_token": [report.bytes_before, report.bytes_after]}
    return found | decoded(model, latent, chosen)


@torch.inference_mode()
def decoded(model: torch.nn.Module, latent: torch.nn.Module, chosen: argparse.Namespace) -> dict:
    """Median tokens a second of both, and how many times as fast as dense the latents are."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.config.vocab_size, (1, chosen.held), generator=generator).to(model.device)
    runners = [Runner(one, ids, chosen.new, False) for one in (model, latent)]
    rounds = [[one.timed()[1] for one in runners] for _ in range(chosen.repeat + 1)][1:]
    times = [statistics.median(each) for each in zip(*rounds, strict=True)]
    speeds = {name: chosen.new / one for name, one in zip(("dense", "latent"), times, strict=True)}
    faster = statistics.median(dense / latent for dense, latent in rounds)
    return {"decode_tokens_per_second": speeds, "decode_times_dense": faster}


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser("python -m benchmarks.cache", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="name or folder of a dense model, or 1b, 7b: random weights")
    parser.add_argument("--cache-ratio", type=float, default=0.5, help="fraction of the cache kept (default: 0.5)")
    parser.add_argument("--held", type=int, default=4096, help="tokens in the cache (default: 4096)")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded after them (default: 32)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds, of which the median counts (default: 3)")
    parser.add_argument("--blocks", type=int, help="of 1b and 7b (default: all)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", metavar="FILE", help="JSON lines are added to this file")
    chosen = parser.parse_args()
    model = loaded(chosen.model, chosen.device, chosen.blocks).to(getattr(torch, chosen.dtype))
    told = {name: getattr(chosen, name) for name in ("model", "held", "new", "repeat", "blocks", "dtype")}
    tell({"benchmark": "cache"} | told | measured(model, chosen) | {"machine": described(model.device)}, chosen.out)


if __name__ == "__main__":
    main()
