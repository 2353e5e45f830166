"""Token ids of a text: all of it or of some places only, the token that begins it, and the bytes that tokens stand for.

A text is tokenized in pieces: the tokens of a whole one take some 230 bytes a character.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PIECE = 2**18  # characters tokenized at a time, at most
ROOM = 16  # characters of a place for every token wanted there; English has 4 or 5 to a token, other languages fewer
LEAD = 16  # tokens left out at the beginning of a place, which may cut through a word
BREAKS = (("\n\n", 1), ("\n", 0), (" ", 0))  # where a piece may end: tokenizers part words here, and two newlines
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def beginning(tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> int | None:
    """The token that every window begins with (BOS), or None.

    ``bos=None`` does as the tokenizer does: whether it puts its BOS before a text is tried on a short one.

    Raises:
        ValueError: if one is asked for, and the tokenizer has none; ``bos`` is something else.
    """
    if bos is not None and not isinstance(bos, bool):
        raise ValueError(f"bos is {bos!r}; it is to be True, False or None, which does as the tokenizer does")
    token = tokenizer.bos_token_id
    if bos is None and token is not None:
        told, bare = (tokenizer("a", add_special_tokens=special)["input_ids"][:1] for special in (True, False))
        bos = told == [token] != bare
    if bos and token is None:
        raise ValueError("windows cannot begin with a BOS token: the tokenizer has none (bos_token)")
    return token if bos and isinstance(token, int) else None


def common_beginning(windows: Int[Tensor, "count length"]) -> int | None:
    """The token that all of several windows begin with, or None."""
    first = windows[:, 0].unique()
    return int(first) if len(first) == 1 < len(windows) else None


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Int[Tensor, " n"]:
    """All tokens of a text, without special ones."""
    return torch.cat([_tokens(tokenizer, piece) for piece in _pieces(text)])


def token_places(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The same, and the character of the text at which each begins; for tokenizers that say it (``is_fast``)."""
    ids, starts, before = [], [], 0
    for piece in _pieces(text):
        told = tokenizer(piece, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        ids += told["input_ids"]
        starts += [before + start for start, _ in told["offset_mapping"]]
        before += len(piece)
    return torch.tensor(ids, dtype=torch.long), torch.tensor(starts, dtype=torch.long)


def drawn(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    length: int,
    count: int,
    generator: torch.Generator,
    *,
    in_order: bool,
) -> Int[Tensor, "count length"] | None:
    """``count`` stretches of ``length`` tokens from random places of a text, or None if it has too few places.

    The text is cut, at a random offset, into places of ``ROOM`` characters for every token. Places are drawn without
    replacement, and only what is drawn is tokenized. So every character is as likely as any other to be where a stretch begins, and
    no two stretches overlap. A place of fewer tokens (of very long ones) is passed over.
    """
    room = ROOM * (length + LEAD)
    offset = int(torch.randint(room, (1,), generator=generator))
    found: dict[int, Tensor] = {}
    for place in torch.randperm(max(0, len(text) - offset) // room, generator=generator).tolist():
        start = offset + place * room
        ids = _tokens(tokenizer, text[start : start + room])[LEAD : LEAD + length]
        if len(ids) == length:
            found[start] = ids
        if len(found) == count:
            return torch.stack([found[start] for start in (sorted(found) if in_order else found)])
    return None


def bytes_per_token(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> float:
    """Mean number of UTF-8 bytes of the text that a token stands for; a special token stands for none."""
    tokens, counts = ids.unique(return_counts=True)
    sizes = torch.tensor([_bytes(tokenizer, token) for token in tokens.tolist()], dtype=torch.float64)
    return (sizes @ counts.double()).item() / ids.numel()


def _bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> int:
    """Bytes of one token inside a text; at its beginning, some tokenizers take a space off."""
    once, twice = (str(tokenizer.decode([token] * n, skip_special_tokens=True)) for n in (1, 2))
    if "\ufffd" in twice:  # a piece of a character; its name is <0xE6>, or has a letter for every byte
        name = str(tokenizer.convert_ids_to_tokens(token))
        return 1 if BYTE.fullmatch(name) else len(name)
    return len(twice.encode()) - len(once.encode())


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most ``PIECE`` characters, cut between documents or paragraphs, else lines, else words."""
    start = 0
    while len(text) - start > PIECE:
        low, end = start + PIECE // 2, start + PIECE
        for mark, kept in BREAKS:
            if (found := text.rfind(mark, low, end)) >= 0:
                end = found + kept
                break
        yield text[start:end]
        start = end
    yield text[start:]
