"""What a latent KV cache costs and saves: perplexity, bytes held, speed of decoding."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from statistics import median

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from nsvd.lab.evaluation import evaluate
from nsvd.lab.records import Records
from nsvd.lab.sweep import DENSE, fingerprint
from nsvd.linalg import by_name
from nsvd.model.compress_kv import compress_kv_
from nsvd.model.latent import bytes_per_token, cache_bytes
from nsvd.model.moments import Statistics


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

    Beside the parameters a row holds ``perplexity``, ``standard_error`` and ``bytes``, what the cache takes a token. Measurements
    in ``records`` are not repeated.
    """
    weights, moments = fingerprint(model.parameters()), fingerprint(m.G for m in stats.moments.values())
    texts, rows = {corpus: fingerprint([windows]) for corpus, windows in corpora.items()}, []
    todo = [(DENSE, 1.0, False, {}), *cells]
    for method, ratio, joint, options in tqdm(todo, "cache sweep", disable=not progress, leave=False):
        about = {"model": name, "weights": weights, "method": method, "cache_ratio": ratio, "joint": joint}
        if method != DENSE:
            about |= by_name(method).resolve(options) | {"statistics": moments}
        parameters = {corpus: about | {"corpus": corpus, "windows": texts[corpus]} for corpus in corpora}
        missing = [corpus for corpus in corpora if records.find(**parameters[corpus]) is None]
        if missing:
            changed = model if method == DENSE else copy.deepcopy(model)
            if method != DENSE:
                compress_kv_(changed, stats, cache_ratio=ratio, method=method, joint=joint, **options)
            for corpus in missing:
                result = evaluate(changed, corpora[corpus])
                numbers = {"perplexity": result.perplexity, "standard_error": result.standard_error}
                records.add(parameters[corpus], numbers | {"bytes": bytes_per_token(changed)[1]})
        rows += [parameters[corpus] | records.find(**parameters[corpus]) for corpus in corpora]
    return pd.DataFrame(rows)


@torch.no_grad()
def bytes_by_length(model: PreTrainedModel, ids: Tensor, lengths: Iterable[int]) -> dict[int, int]:
    """Bytes held by the tensors of the cache after the first so many tokens of ids (batch, length)."""
    held = {}
    for length in lengths:
        if length > ids.shape[1]:
            raise ValueError(f"{length} tokens wanted, {ids.shape[1]} given")
        cache = model.base_model(input_ids=ids[:, :length].to(model.device), use_cache=True).past_key_values
        held[length] = cache_bytes(cache)
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
            model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False
            ).cpu()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    speed = {name: prompts.shape[0] * new / median(times) for name, times in seconds.items()}
    return pd.DataFrame({"tokens per second": speed})
