"""What one layer costs to decompose, beside the published route in the same run: one ratio, and five ratios of three splits.

python -m benchmarks.decompose [--shapes 4096x4096 11008x4096] [--device auto] [--out FILE]

The published route is written from its description (SVD-LLM, arXiv 2403.07378): Cholesky's factor S of G, the full SVD of W S, the
inverse of S, in float64; nested (NSVD, arXiv 2503.17101) the full SVD of the residual, too. It runs once, and counts once for every
ratio and split: it shares nothing between them. Of the sweep the numbers are given with and without its second SVD. Weight and
inputs are random, of falling spectra. Results are JSON lines: seconds, how many times faster, and both losses.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product

import torch
from torch import Tensor

from benchmarks.machine import described, seconds
from nsvd.linalg import METHODS, LowRank, Moments, pivoted, rank_for_ratio
from nsvd.linalg.errors import calibration_loss, weight_error
from nsvd.linalg.factors import split_rank

RATIOS, SPLITS = (0.1, 0.2, 0.3, 0.4, 0.5), (0.95, 0.9, 0.8)


def published(W: Tensor, G: Tensor, k: int) -> LowRank:
    """Ŵ = [W S]_k S⁻¹, S Sᵀ = G."""
    S = torch.linalg.cholesky(G)
    U, s, Vh = torch.linalg.svd(W @ S, full_matrices=False)
    root = s[:k].sqrt()
    return LowRank(U[:, :k] * root, root[:, None] * Vh[:k] @ torch.linalg.inv(S))


def published_inner(W: Tensor, outer: LowRank, k: int) -> LowRank:
    """The best approximation of what the outer step leaves, beside it."""
    U, s, Vh = torch.linalg.svd(W - outer.dense(), full_matrices=False)
    root = s[:k].sqrt()
    return outer + LowRank(U[:, :k] * root, root[:, None] * Vh[:k])


def layer(d_out: int, d_in: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """W and G: random matrices, the columns of W and the channels of the inputs of very different sizes."""
    random = torch.Generator(device).manual_seed(seed)
    how = {"generator": random, "device": device, "dtype": torch.float64}
    W = torch.randn(d_out, d_in, **how) * torch.logspace(0, -1, d_in, device=device, dtype=torch.float64)
    X = torch.randn(d_in, 2 * d_in, **how) * torch.logspace(0, -1.5, d_in, device=device, dtype=torch.float64)[:, None]
    mixed = torch.randn(d_in, 64, **how)
    return W, (X @ X.mT) / X.shape[1] + mixed @ mixed.mT / 64  # some directions in common, as of activations


class Timed:
    """Results of functions and how long they took; on a GPU the second time, when its libraries are loaded."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.processor = device, {}, {}

    def __call__(self, name: str, function):
        if self.device.type == "cuda":
            function()
        found, before = [], time.process_time()
        self.seconds[name] = seconds(lambda: found.append(function()), self.device)
        self.processor[name] = time.process_time() - before
        return found[0]


def measured(shape: tuple[int, int], ratio: float, k1: float, device: torch.device, seed: int) -> dict:
    """One ratio by ASVD-I and NSVD-I, the sweep by NSVD-I, and the ranks alone, for one layer."""
    W, G = layer(*shape, device, seed)
    moments, k = Moments(G), rank_for_ratio(*shape, ratio)
    first, second = split_rank(k, k1)
    outer, nested, time = METHODS["asvd-1"], METHODS["nsvd-1"], Timed(device)
    theirs = time("published", lambda: published(W, G, k))
    ours = time("ours, one ratio", lambda: outer(W, moments, k))
    time("ours, ranks alone", lambda: outer.prepare(W, moments, k=0))
    inner = time(
        "published, inner step",
        lambda: published_inner(W, LowRank(theirs.left[:, :first], theirs.right[:first]), second),
    )
    one = time("ours, nested, one ratio", lambda: nested(W, moments, k, k1=k1))
    time("ours, pivoted", lambda: pivoted(ours))

    def sweep() -> None:
        prepared = nested.prepare(W, moments)
        for some, split in product(RATIOS, SPLITS):
            nested.cut(prepared, rank_for_ratio(*shape, some), k1=split)

    time("ours, sweep", sweep)
    routes = {"asvd-1": (theirs, ours), "nsvd-1": (inner, one)}
    losses = {name: [calibration_loss(W, value.dense(), G) for value in pair] for name, pair in routes.items()}
    errors = {name: [weight_error(W, value.dense()) for value in pair] for name, pair in routes.items()}
    found = {
        "shape": shape,
        "ratio": ratio,
        "k1": k1,
        "rank": k,
        "seconds": time.seconds,
        "faster": faster(time.seconds),
    }
    if device.type == "cpu":  # where others use the machine, too, this is what counts
        found |= {"processor seconds": time.processor, "faster by processor seconds": faster(time.processor)}
    return found | {"calibration loss, published and ours": losses, "weight error, published and ours": errors}


def faster(known: dict[str, float]) -> dict[str, float]:
    """How many times the published seconds are ours; of the sweep without the published inner step, and with it."""
    cells, whole = len(RATIOS) * len(SPLITS), known["published"] + known["published, inner step"]
    return {
        "one ratio": known["published"] / known["ours, one ratio"],
        "ranks alone": known["published"] / known["ours, ranks alone"],
        "one ratio, nested": whole / known["ours, nested, one ratio"],
        f"{cells} cells, one published SVD each": cells * known["published"] / known["ours, sweep"],
        f"{cells} cells": cells * whole / known["ours, sweep"],
    }


def main() -> None:
    """Print a JSON line a shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096"], help="d_out x d_in")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--k1", type=float, default=0.95)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a file that the lines are added to")
    chosen = parser.parse_args()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if chosen.device == "auto" else chosen.device
    device = torch.device(name)
    for text in chosen.shapes:
        d_out, d_in = (int(size) for size in text.split("x"))
        found = measured((d_out, d_in), chosen.ratio, chosen.k1, device, chosen.seed)
        line = json.dumps({"benchmark": "decompose"} | found | {"machine": described(device)}, ensure_ascii=False)
        print(line, flush=True)
        if chosen.out:
            with open(chosen.out, "a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
