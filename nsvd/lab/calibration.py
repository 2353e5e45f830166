"""Calibration text by name: corpora, text that the model samples from itself, random tokens, and sums of them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from nsvd.lab.corpora import MAX_CALIBRATION, MAX_LENGTH, windows
from nsvd.model.sampling import own_text, random_tokens


def domains(
    name: str, model: nn.Module, tokenizer, *, length: int | None = None, count: int | None = None, seed: int = 0
) -> list[Tensor]:
    """Windows (count, length) of every part of a name: ``self``, ``random``, ``wikitext2``, ``self+wikitext2``, …

    Those of ``self`` are half as long, see ``own_text``.

    ``count`` windows are shared out evenly among the parts. Where none is asked for, 256; 128 where own text or random tokens
    stand alone.

    Raises:
        ValueError: as ``windows``; or fewer windows than parts.
    """
    whole = Path(name).exists() or Path(name.rpartition(":")[0] or "no folder").is_dir()
    parts = [name] if whole else name.split("+")
    length = min(tokenizer.model_max_length, MAX_LENGTH) if length is None else length
    each = (MAX_CALIBRATION if count is None else count) // len(parts)
    if each < 1:
        raise ValueError(f"{count} windows for the {len(parts)} parts of {name}; 1 each is the least")
    how = {"length": length, "seed": seed}
    if count is not None or len(parts) > 1:
        how["count"] = each
    found = []
    for part in parts:
        if part == "self":
            found.append(own_text(model, **how))
        elif part == "random":
            found.append(random_tokens(model.config.get_text_config().vocab_size, **how))
        else:
            found.append(windows(part, tokenizer, split="calibration", **how))
    return found
