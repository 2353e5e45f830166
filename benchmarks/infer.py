"""Tokens a second of a dense model and of the same model with factors, prefill and decoding, taking turns in one run.

python -m benchmarks.infer MODEL [--ratios 0.1 0.3 0.5] [--dtypes float32 bfloat16] [--compile] [--out FILE]

MODEL is a name or folder that ``nsvd.load`` reads, or 1b or 7b: these shapes with random weights. Speed depends on shapes and
not on values, so the factors are random, too; nothing is calibrated. Results are JSON lines: tokens a second, and how many
times as fast as dense.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Iterator

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import nsvd
from benchmarks.machine import described
from benchmarks.scale import BILLION, SEVEN
from nsvd.lab.speed import seconds
from nsvd.linalg.factors import FACTORS, rank_for_ratio
from nsvd.stored.layers import KINDS
from nsvd.walk.caches import caches_of

SHAPES = {"1b": (BILLION, 22), "7b": (SEVEN, 32)}  # sizes and depth
LAYER = dict(zip(FACTORS, KINDS, strict=False))


def loaded(name: str, device: str, blocks: int | None) -> nn.Module:
    """The dense model in float32."""
    if name not in SHAPES:
        return nsvd.load(name, dtype="float32", device=device)[0]
    shape, depth = SHAPES[name]
    config = LlamaConfig(**shape, num_hidden_layers=blocks or depth, bos_token_id=0, eos_token_id=1)
    with torch.device(nsvd.default_device() if device == "auto" else device):
        return LlamaForCausalLM(config).eval()


@torch.no_grad()
def factored(model: nn.Module, ratio: float, factors: str) -> nn.Module:
    """The same model with random factors; what is not compressed is shared with it."""
    made = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for name, layer in nsvd.targets(model).items():
        k = rank_for_ratio(*layer.weight.shape, ratio, factors)
        new = LAYER[factors].like(layer, rank=k).requires_grad_(False)
        for bias in (p for p in new.parameters() if p.ndim == 1):
            bias.copy_(layer.bias)
        for order in new.buffers():
            order.copy_(torch.randperm(len(order)))
        made.set_submodule(name, new)
    return made


class Runner:
    """A model that reads a prompt and goes on from there, token by token."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, new: int, compiled: bool):
        self.ids, self.new, self.device, self.given = ids, new, ids.device, {}
        if compiled:
            (name,) = caches_of(model(input_ids=ids[:, :1], use_cache=True))
            self.given = {name: StaticCache(config=model.config, max_cache_len=ids.shape[1] + new)}
        mode = "reduce-overhead" if ids.device.type == "cuda" else None
        self.step = torch.compile(model, fullgraph=True, mode=mode) if compiled else model
        self.first = model  # a prompt is long enough to hide what compiling saves

    def prefill(self) -> None:
        for cache in self.given.values():
            cache.reset()
        self.said = self.first(input_ids=self.ids, use_cache=True, logits_to_keep=1, **self.given)

    def decode(self) -> None:
        said = self.said
        for _ in range(self.new):
            token = said.logits[:, -1].argmax(-1, keepdim=True)
            said = self.step(input_ids=token, use_cache=True, **caches_of(said))

    def timed(self) -> tuple[float, float]:
        """Seconds of both."""
        return seconds(self.prefill, self.device), seconds(self.decode, self.device)


@torch.inference_mode()
def compared(model: nn.Module, ratio: float, chosen: argparse.Namespace) -> Iterator[dict]:
    """One line for dense, one for each way to store factors; a round of all that is not counted comes first."""
    models = {"dense": model} | {factors: factored(model, ratio, factors) for factors in chosen.factors}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.config.vocab_size, (chosen.batch, chosen.prompt), generator=generator).to(model.device)
    runners = {name: Runner(one, ids, chosen.new, chosen.compile) for name, one in models.items()}
    rounds = [{name: one.timed() for name, one in runners.items()} for _ in range(chosen.repeat + 1)][1:]
    for name, one in models.items():
        line = {"factors": name, "ratio": ratio, "parameters": sum(p.numel() for p in one.parameters())}
        for i, (what, tokens) in enumerate({"prefill": chosen.prompt, "decode": chosen.new}.items()):
            taken = statistics.median(times[name][i] for times in rounds)
            faster = statistics.median(times["dense"][i] / times[name][i] for times in rounds)
            line |= {f"{what}_tokens_per_second": chosen.batch * tokens / taken, f"{what}_times_dense": faster}
        yield line


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.infer", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="name or folder of a dense model, or 1b, 7b: random weights")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--factors", nargs="+", choices=FACTORS, default=list(FACTORS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens read at once (default: 512)")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded after them (default: 32)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5, help="rounds, of which the median counts (default: 5)")
    parser.add_argument("--blocks", type=int, help="of 1b and 7b (default: all)")
    parser.add_argument("--compile", action="store_true", help="decode by torch.compile with a static cache")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", metavar="FILE", help="JSON lines are added to this file")
    chosen = parser.parse_args()
    model = loaded(chosen.model, chosen.device, chosen.blocks)
    told = {"model": chosen.model, "compiled": chosen.compile}
    told |= {name: getattr(chosen, name) for name in ("prompt", "new", "batch", "repeat", "blocks")}
    for dtype in chosen.dtypes:
        model = model.to(getattr(torch, dtype))
        for ratio in chosen.ratios:
            for line in compared(model, ratio, chosen):
                line = told | {"dtype": dtype} | line | {"machine": described(model.device)}
                if chosen.out:
                    with open(chosen.out, "a", encoding="utf-8") as out:
                        out.write(json.dumps(line) + "\n")
                both = ", ".join(
                    f"{what} {line[f'{what}_tokens_per_second']:,.1f} tokens/s, {line[f'{what}_times_dense']:.2f} × dense"
                    for what in ("prefill", "decode")
                )
                print(f"{dtype}, {ratio:.0%} removed, {line['factors']}: {both}", flush=True)


if __name__ == "__main__":
    main()
