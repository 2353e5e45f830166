"""What a latent KV cache costs and saves: perplexity, bytes held, speed of decoding."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from functools import partial
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from nsvd.cache.absorption import multiplications
from nsvd.cache.compress import compress_kv_
from nsvd.cache.latent import attach, bytes_per_token, cache_bytes, latent_layers
from nsvd.compression.request import base_method
from nsvd.lab.records import Records
from nsvd.lab.sweep import DENSE, measure
from nsvd.stored.files import fingerprint
from nsvd.stored.layers import LowRankLinear
from nsvd.walk.caches import caches_of
from nsvd.walk.statistics import Statistics


def cache_sweep(
    model: PreTrainedModel,
    stats: Statistics,
    corpora: Mapping[str, Tensor],
    cells: Iterable[tuple[str, float, bool, dict]],
    records: Records,
    *,
    name: str,
    progress: bool = False,
) -> pd.DataFrame:
    """Perplexity of the dense model and of every (method, cache_ratio, joint, options) cell on every corpus; a row each.

    The statistics serve all methods; for ``best`` they hold gradients, too. Rows are those of ``measure``, with ``bytes``, what
    the cache takes a token. Measurements in ``records`` are not repeated.
    """
    weights, moments, rows = fingerprint(model.parameters()), stats.fingerprint(), []

    def build(method: str, ratio: float, joint: bool, options: dict) -> PreTrainedModel:
        if method == DENSE:
            return model
        changed = copy.deepcopy(model)
        compress_kv_(changed, stats, cache_ratio=ratio, method=method, joint=joint, **options)
        return changed

    todo = [(DENSE, 1.0, False, {}), *cells]
    for method, ratio, joint, options in tqdm(todo, "cache sweep", disable=not progress, leave=False):
        about = {"model": name, "weights": weights, "method": method, "cache_ratio": ratio, "joint": joint}
        if method != DENSE:
            about |= base_method(method).resolve(options) | {"statistics": moments}
        made = partial(build, method, ratio, joint, options)
        rows += measure(made, corpora, records, about, also=lambda model: {"bytes": bytes_per_token(model)[1]})
    return pd.DataFrame(rows)


@torch.no_grad()
def bytes_by_length(model: PreTrainedModel, ids: Tensor, lengths: Iterable[int]) -> dict[int, int]:
    """Bytes held by the tensors of the cache after the first so many tokens of ids (batch, length)."""
    held = {}
    for length in lengths:
        if length > ids.shape[1]:
            raise ValueError(f"{length} tokens wanted, {ids.shape[1]} given")
        output = model.base_model(input_ids=ids[:, :length].to(model.device), use_cache=True)
        held[length] = sum(cache_bytes(cache) for cache in caches_of(output).values())
    return held


def decoding_speed(
    models: Mapping[str, PreTrainedModel], prompts: Tensor, *, new: int = 64, repeats: int = 3
) -> pd.DataFrame:
    """Greedily decoded tokens a second after prompts (batch, length), a row a model: median of ``repeats`` turns.

    The models take turns, so that a busy machine slows all of them. One turn before the clock runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            ids = prompts.to(model.device)
            start = time.perf_counter()
            generate: Any = model.generate  # of a class that transformers mixes in
            generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False
            ).cpu()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    speed = {name: prompts.shape[0] * new / median(times) for name, times in seconds.items()}
    return pd.DataFrame({"tokens per second": speed})


@torch.no_grad()
def absorption_gain(
    shapes: Mapping[str, tuple[int, int, int]], *, cache_ratio: float = 0.5, held: int = 1024, repeats: int = 5
) -> pd.DataFrame:
    """What one token costs an attention layer that holds ``held`` others in a latent cache: values rebuilt, and absorbed.

    A row for each shape (query heads, key-value heads, head width), of random weights, in float32, keys with a third of the ranks.
    Millions of multiplications for the values; milliseconds for all of the layer, median of turns that alternate.
    """
    rows, token = {}, torch.ones(1, 1, dtype=torch.long)
    for name, (heads, kv_heads, d) in shapes.items():
        share = int(cache_ratio * 2 * kv_heads * d)
        values = share - share // 3  # the rank of the values
        model = _one_layer(heads, kv_heads, d, share // 3, values)
        layer = next(iter(latent_layers(model).values()))
        cache, seconds = DynamicCache(config=model.config), {False: [], True: []}
        (taken_as,) = caches_of(model.base_model(input_ids=token, use_cache=True))
        cache.update(
            torch.zeros(1, 1, held, layer.width - values),
            torch.randn(1, 1, held, values),
            0,
        )
        for turn in range(repeats + 1):
            for layer.absorb in seconds:
                start = time.perf_counter()
                model.base_model(input_ids=token, use_cache=True, **{taken_as: cache})
                if turn:
                    seconds[layer.absorb].append(time.perf_counter() - start)
        counted = [count / 1e6 for count in multiplications(1, held, heads, kv_heads, d, values)]
        timed = [1e3 * median(times) for times in seconds.values()]
        rows[name] = [values, *counted, *timed, timed[0] / timed[1]]
    columns = ["rank of values", "multiplications, rebuilt", "absorbed", "ms, rebuilt", "ms, absorbed", "times faster"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _one_layer(heads: int, kv_heads: int, d: int, r_k: int, r_v: int) -> PreTrainedModel:
    """One decoder layer with a latent cache, random factors, and next to no feed-forward part or vocabulary."""
    config = LlamaConfig(
        hidden_size=heads * d, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=d, num_hidden_layers=1,
        intermediate_size=8, vocab_size=8,
    )  # fmt: skip
    model, name = AutoModelForCausalLM.from_config(config).eval(), "model.layers.0.self_attn"
    for part, rank in (("k_proj", r_k), ("v_proj", r_v)):
        new = LowRankLinear.like(model.get_submodule(f"{name}.{part}"), rank=rank)
        for weight in new.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        model.set_submodule(f"{name}.{part}", new)
    attach(model, {name: {"rotated": d, "joint": False, "absorb": True}})
    return model
