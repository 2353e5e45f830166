"""Calibration text by name: corpora, text that the model samples from itself, random tokens, and sums of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nsvd.lab.corpora import MAX_CALIBRATION, MAX_LENGTH, windows
from nsvd.lab.tokens import beginning
from nsvd.walk.sampling import own_text, random_tokens


def domains(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int | None = None,
    count: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
    write: Callable[..., Tensor] = own_text,
) -> list[Tensor]:
    """Windows (count, length) of every part of a name: ``self``, ``random``, ``wikitext2``, ``self+wikitext2``, …

    Those of ``self`` are half as long, see ``own_text``.

    ``count`` windows are shared out evenly among the parts. By default there are 256, or 128 where own text or random tokens stand
    alone. ``bos`` is as in ``windows``: whether each begins with a BOS token. Own text begins with the tokenizer's; where the
    tokenizer adds none by itself, with the one that the model's configuration names. ``write`` is the function that lets the
    model write.

    Raises:
        ValueError: as ``windows``; or fewer windows than parts.
    """
    whole = Path(name).exists() or Path(name.rpartition(":")[0] or "no folder").is_dir()
    parts = [name] if whole else name.split("+")
    length = min(tokenizer.model_max_length, MAX_LENGTH) if length is None else length
    each = (MAX_CALIBRATION if count is None else count) // len(parts)
    if each < 1:
        raise ValueError(f"{count} windows for the {len(parts)} parts of {name}; 1 each is the least")
    first, how = beginning(tokenizer, bos), {"length": length, "seed": seed}
    if count is not None or len(parts) > 1:
        how["count"] = each
    found = []
    for part in parts:
        if part == "self":
            found.append(write(model, **how, start=first, bos=bos is not False))
        elif part == "random":
            found.append(random_tokens(model.config.get_text_config().vocab_size, **how, start=first))
        else:
            found.append(windows(part, tokenizer, split="calibration", **how, bos=bos))
    return found


def begins_with_bos(windows: Tensor, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> bool:
    """Whether every window begins with the BOS token of the tokenizer, or with the one that the model's configuration names."""
    tokens = [tokenizer.bos_token_id, None if model is None else model.config.get_text_config().bos_token_id]
    return any(isinstance(token, int) and bool((windows[:, 0] == token).all()) for token in tokens)
