"""Tokens of long texts: in pieces, from some places only; the token that begins a text, and the bytes that tokens stand for."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import nsvd
from nsvd.lab import tokens
from nsvd.lab.tokens import LEAD, ROOM, beginning, bytes_per_token, drawn, token_ids
from tests.tiny import tiny_tokenizer

TOKENIZER, OPENING = tiny_tokenizer(), tiny_tokenizer(bos=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def without_bos():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    return tokenizer


def sentencepiece():
    """Words that begin with ``▁``, single letters, and bytes for the rest, as LLaMA has them; a space is put before a text."""
    words = ["<s>", "▁the", "▁", *"the", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<s>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


@pytest.mark.parametrize(
    ("tokenizer", "bos", "expected"),
    [
        (TOKENIZER, None, None),
        (OPENING, None, 0),
        (TOKENIZER, True, 0),
        (OPENING, False, None),
        (without_bos(), None, None),
    ],
)
def test_a_text_begins_as_the_tokenizer_does_or_as_asked_for(tokenizer, bos, expected):
    """It is tried, not looked up."""
    assert beginning(tokenizer, bos) == expected


def test_a_bos_that_is_not_there_cannot_begin_a_text():
    with pytest.raises(ValueError, match="cannot begin with a BOS token: the tokenizer has none"):
        beginning(without_bos(), True)
    with pytest.raises(ValueError, match="the tokenizer has none"):
        nsvd.windows("mini/web", without_bos(), bos=True)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("one two\nthree\n\nfour five six", "three\n"),
        ("one two three\nfour five six", "three"),
        ("one two three four five six", "three"),
        ("一二三四五六七八九十一二三四五六七八九十一二三四", "八"),
    ],
)
def test_a_long_text_is_cut_where_it_breaks(text, ends, monkeypatch):
    """Between paragraphs, else lines, else words, else anywhere; with one token a byte nothing changes."""
    monkeypatch.setattr(tokens, "PIECE", 18)
    pieces = list(tokens._pieces(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 18 for piece in pieces)
    assert pieces[0].endswith(ends)
    assert TOKENIZER.decode(token_ids(TOKENIZER, text)) == text


@pytest.mark.parametrize("role", ["encyclopedia", "web", "stories", "reading_zh", "instructions_ja"])
def test_the_tokens_of_the_pieces_are_those_of_the_whole(role, monkeypatch):
    """For tokenizers that part words at spaces and newlines, as byte-level ones do."""
    text = "\n\n".join(nsvd.documents(f"mini/{role}", "test"))[:60_000]
    _, tokenizer = nsvd.load("mini-llama-s")
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    for size in (1_000, 3_001, tokens.PIECE):
        monkeypatch.setattr(tokens, "PIECE", size)
        assert token_ids(tokenizer, text).tolist() == whole


def numbers(count: int) -> str:
    """Four bytes a number, none like another within reach."""
    return "".join(f"{i:04d}" for i in range(count))


@pytest.mark.parametrize("in_order", [True, False])
def test_stretches_are_drawn_apart_and_by_seed(in_order):
    """Pieces of the text, none in the lead of its place, in its order or not."""
    text, length = numbers(9000), 8
    found = drawn(TOKENIZER, text, length, 12, generator(), in_order=in_order)
    starts = [text.index(TOKENIZER.decode(row)) for row in found]
    room = ROOM * (length + LEAD)
    assert found.shape == (12, length)
    assert len({start % room for start in starts}) == 1
    assert len(set(starts)) == 12
    assert (starts == sorted(starts)) == in_order
    assert torch.equal(found, drawn(TOKENIZER, text, length, 12, generator(), in_order=in_order))
    assert not torch.equal(found, drawn(TOKENIZER, text, length, 12, generator(1), in_order=in_order))
    assert drawn(TOKENIZER, text, length, len(text) // room + 1, generator(), in_order=in_order) is None


def test_every_place_of_a_text_is_as_likely_as_any_other():
    """Starts over two hundred seeds, in six parts of the text: χ² of five degrees below its 99.9 % point."""
    text = numbers(9000)
    starts = [
        text.index(TOKENIZER.decode(row))
        for seed in range(200)
        for row in drawn(TOKENIZER, text, 8, 4, generator(seed), in_order=False)
    ]
    counts = torch.tensor(starts, dtype=torch.float64).histc(6, min=0, max=len(text))
    expected = len(starts) / 6
    assert ((counts - expected).square() / expected).sum() < 20.5


def test_a_place_of_few_tokens_is_passed_over():
    """Text that is nearly all one token has no stretch there."""
    vocabulary = {"<s>": 0, "x": 1, "=" * 64: 2, "=": 3}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.Split("x", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    text = "=" * 20_000 + "x" * 20_000
    found = drawn(tokenizer, text, 8, 20, generator(), in_order=False)
    assert (found == 1).all()


def test_only_what_is_drawn_is_tokenized(monkeypatch):
    """Of a text of a million characters, a place for every window."""
    seen, whole = [], tokens._tokens
    monkeypatch.setattr(tokens, "_tokens", lambda tokenizer, text: seen.append(len(text)) or whole(tokenizer, text))
    drawn(TOKENIZER, numbers(250_000), 32, 5, generator(), in_order=True)
    assert seen == 5 * [ROOM * (32 + LEAD)]


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("the é", [4, 1, 1, 1]), ("the 文 the", [4, 1, 1, 1, 1, 4])],
)
def test_a_token_stands_for_the_bytes_of_its_text(text, sizes):
    """Spaces inside a text count, though a decoder takes off the first; pieces of characters count a byte each."""
    tokenizer = sentencepiece()
    ids = {"▁the": 1, "▁": 2}
    row, position = [], 0
    data = (" " + text).encode()
    for size in sizes:
        piece = data[position : position + size].decode(errors="replace").replace(" ", "▁")
        row.append(ids.get(piece) or tokenizer.convert_tokens_to_ids(f"<0x{data[position]:02X}>"))
        position += size
    assert position == len(data)
    assert bytes_per_token(tokenizer, torch.tensor([row])) == len(data) / len(sizes)


def test_bytes_of_special_tokens_and_of_cut_characters():
    """A BOS stands for none; every byte of a character for one, wherever a window cuts."""
    ids = torch.tensor([TOKENIZER("文é", add_special_tokens=False)["input_ids"]])
    assert bytes_per_token(TOKENIZER, ids) == 1
    assert bytes_per_token(TOKENIZER, ids[:, 1:4]) == 1
    assert bytes_per_token(TOKENIZER, torch.tensor([[0, 70, 71, 0]])) == 0.5
