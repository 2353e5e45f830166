"""Text by name, and windows of token ids cut from it.

A name is an embedded corpus (``mini/encyclopedia``), one of the paper's eight from the hub (``wikitext2``, …), a ``.txt`` or
``.jsonl`` file, or ``DIR:name`` for ``DIR/name/<split>.jsonl``. In jsonl every line is ``{"text": …}``, one document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate, groupby, islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nsvd.lab.paths import data
from nsvd.lab.tokens import ROOM, beginning, drawn, token_ids, token_places

ROLES = ("encyclopedia", "newswire", "web", "commands", "instructions", "stories", "reading_zh", "instructions_ja")
EMBEDDED = tuple(f"mini/{role}" for role in ROLES)
MAX_LENGTH, MAX_CALIBRATION = 2048, 256  # window length and count where none is asked for
WHOLE = 2**24  # characters of a text that is always tokenized as a whole: WikiText-2 is, in half a minute
TOKENS_PER_CHARACTER = 32  # more than any tokenizer makes
BETWEEN = "\n\n"  # what stands between two documents
HALF = re.compile("[\ud800-\udfff]")  # of a character that JSON writes in two halves


Rows = Iterable[dict]


@dataclass(frozen=True)
class HubCorpus:
    """How one of the paper's data sets is read from the hub: arguments of ``load_dataset``, and rows made documents.

    The paper does not say which fields it joins; ``read`` is our reading of it. Sets that come with a loading script are taken
    from the hub's own conversion to parquet, so that no remote code runs.
    """

    arguments: dict
    read: Callable[[Rows], Iterable[str]]
    splits: dict[str, str] = field(default_factory=lambda: {"calibration": "train", "test": "test"})
    limit: int | None = None  # rows read from a split


def _field(name: str) -> Callable[[Rows], Iterable[str]]:
    return lambda rows: (row[name] for row in rows)


def _instructions(rows: Rows) -> Iterable[str]:
    return (f"{row['instruction']}\n{row['output']}" for row in rows)


def _mctest(rows: Rows) -> Iterable[str]:
    """A story once, then its questions, each with the four answers to choose from."""
    for story, group in groupby(rows, lambda row: row["story"]):
        lines = [story]
        for row in group:
            lines += [row["question"], *(f"{letter}) {row['answer_options'][letter]}" for letter in "ABCD")]
        yield "\n".join(lines)


def _cmrc(rows: Rows) -> Iterable[str]:
    """A passage once, then its questions, each with its first answer."""
    for context, group in groupby(rows, lambda row: row["context"]):
        yield "\n".join([context, *(line for row in group for line in (row["question"], row["answers"]["text"][0]))])


HUB: dict[str, HubCorpus] = {
    "wikitext2": HubCorpus({"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}, _field("text")),
    "ptb": HubCorpus(
        {"path": "ptb-text-only/ptb_text_only", "name": "penn_treebank", "revision": "refs/convert/parquet"},
        _field("sentence"),
    ),
    "c4": HubCorpus(
        {
            "path": "allenai/c4",
            "data_files": {
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            },
        },
        _field("text"),
        {"calibration": "train", "test": "validation"},
        limit=2000,
    ),
    "snips": HubCorpus({"path": "benayas/snips"}, _field("text")),
    "alpaca_eval": HubCorpus(
        {"path": "json", "data_files": "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"},
        _instructions,
        {"test": "train"},
    ),
    "mctest": HubCorpus({"path": "sagnikrayc/mctest", "name": "mc500", "revision": "refs/convert/parquet"}, _mctest),
    "cmrc2018": HubCorpus({"path": "hfl/cmrc2018"}, _cmrc),
    "alpaca_eval_ja": HubCorpus({"path": "junsashihara/alpaca_eval_ja"}, _instructions, {"test": "train"}),
}


def documents(name: str, split: str = "test") -> list[str]:
    """The documents of a corpus.

    Raises:
        ValueError: unknown name or split, a line that is not ``{"text": …}``, or no text at all.
        FileNotFoundError: a file or folder that is not there, or a hub that cannot be reached.
    """
    if split not in ("calibration", "test"):
        raise ValueError(f"unknown split {split!r}; the splits are calibration and test")
    if name in EMBEDDED:
        texts = _file(data() / "corpora" / name.removeprefix("mini/") / f"{split}.jsonl", name)
    elif name in HUB:
        texts = _hub(name, split)
    elif ":" in name:
        folder, _, corpus = name.rpartition(":")
        texts = _file(Path(folder) / corpus / f"{split}.jsonl", name)
    elif name.endswith((".txt", ".jsonl")):
        texts = _file(Path(name), name)
    else:
        known = ", ".join((*EMBEDDED, *HUB))
        raise ValueError(f"unknown corpus {name!r}; use {known}, a .txt or .jsonl file, or DIR:name")
    texts = [text for text in texts if text and not text.isspace()]
    if not texts:
        raise ValueError(f"corpus {name} ({split}) is empty")
    return texts


def windows(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "test",
    length: int | None = None,
    count: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
) -> Tensor:
    """Token ids of a corpus cut into windows that do not overlap: a LongTensor (count, length).

    The documents are joined by empty lines. ``test`` gives all windows in order (``count`` of them, evenly random, if
    given); ``calibration`` gives ``count`` random ones (at most 256 where none is asked for) of the text cut at a random
    offset. Of a text above ``WHOLE`` characters that has room for twice as many, random windows begin at random characters
    (``nsvd.lab.tokens.drawn``), and no more is tokenized. ``length`` is by default what the tokenizer allows, 2048 at most.

    With ``bos=True`` every window begins with the tokenizer's BOS token, with ``bos=False`` none does; by default the windows do
    as the tokenizer does by itself. The BOS is one of the ``length`` tokens.

    Raises:
        ValueError: if the corpus has fewer windows than asked for, or not even one; ``bos=True`` without a BOS token.
    """
    length = min(tokenizer.model_max_length, MAX_LENGTH) if length is None else length
    if length < 2:
        raise ValueError(f"a window needs 2 tokens at least, not {length}")
    if count is not None and count < 1:
        raise ValueError(f"{count} windows asked for; 1 is the least")
    first = beginning(tokenizer, bos)
    text = BETWEEN.join(documents(name, split))
    cut = _cut(name, split, text, tokenizer, length - (first is not None), count, torch.Generator().manual_seed(seed))
    return cut if first is None else torch.cat([torch.full((len(cut), 1), first), cut], dim=1)


def _cut(
    name: str, split: str, text: str, tokenizer, length: int, count: int | None, generator: torch.Generator
) -> Tensor:
    """Windows (count, length) of a text, without BOS."""
    asked = f"{count} windows" if count else "one window"
    if (count or 1) * length > TOKENS_PER_CHARACTER * len(text):
        raise ValueError(f"corpus {name} ({split}) is too short: {len(text)} characters for {asked} of {length} tokens")
    some = MAX_CALIBRATION if count is None and split == "calibration" else count
    if some is not None and len(text) > max(WHOLE, 2 * some * ROOM * length):
        cut = drawn(tokenizer, text, length, some, generator, in_order=split == "test")
        if cut is not None:
            return cut
    ids = token_ids(tokenizer, text)
    tokens = len(ids)
    if split == "calibration":
        ids = ids[torch.randint(len(ids) % length + 1, (1,), generator=generator) :]
    cut = ids[: len(ids) // length * length].view(-1, length)
    if len(cut) < (count or 1):
        raise ValueError(
            f"corpus {name} ({split}) is too short: {tokens} tokens give {len(cut)} of {asked} of {length}"
        )
    if some is None:
        return cut
    keep = torch.randperm(len(cut), generator=generator)[:some]
    return cut[keep.sort().values if split == "test" else keep]


def _file(file: Path, name: str) -> list[str]:
    if file.is_dir():
        raise IsADirectoryError(f"corpus {name}: {file} is a folder, not a file")
    if not file.is_file():
        raise FileNotFoundError(f"corpus {name}: no file {file}")
    try:
        with file.open(encoding="utf-8-sig") as stream:
            texts = [stream.read()] if file.suffix == ".txt" else [_text(file, *line) for line in enumerate(stream, 1)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    if file.suffix == ".txt" and "\0" in texts[0]:
        raise ValueError(f"{file} is not UTF-8 text: it holds NUL bytes")
    return texts


def _text(file: Path, number: int, line: str) -> str:
    """The text of a line of jsonl."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f'{file}, line {number}: expected {{"text": …}}')
    if half := HALF.search(text):
        raise ValueError(
            f"{file}, line {number}: the text holds \\u{ord(half[0]):04x}, half a surrogate pair, which is no character"
        )
    return text


def _hub(name: str, split: str) -> list[str]:
    from datasets import load_dataset

    corpus = HUB[name]
    if split not in corpus.splits:
        raise ValueError(f"corpus {name} has no {split} split")
    try:
        rows = load_dataset(**corpus.arguments, split=corpus.splits[split])
    except (OSError, ConnectionError) as error:
        raise FileNotFoundError(
            f"corpus {name} could not be had from the hub; use an embedded one ({', '.join(EMBEDDED)}) or a file"
        ) from error
    return list(corpus.read(islice(rows, corpus.limit)))


def beside(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    taken: Tensor,
    count: int,
    *,
    seed: int = 0,
    bos: bool | None = None,
    fewer: bool = False,
) -> Tensor:
    """Further windows (count, length) of a test set, of which ``taken`` (m, length) were drawn with the same seed; none of these.

    What a model is calibrated on must not be what it is tested on. These are for a control that knows the domain of the test set.
    With ``fewer`` they are all that are left where there are not so many, perhaps none.

    Raises:
        ValueError: if the set has no more so many; as ``windows``.
    """
    length, how = taken.shape[1], {"seed": seed, "bos": bos}
    count = min(count, len(windows(name, tokenizer, length=length, **how)) - len(taken)) if fewer else count
    whole = windows(name, tokenizer, length=length, count=len(taken) + count, **how)
    known = set(map(tuple, taken.tolist()))
    rest = [ids for ids in whole if tuple(ids.tolist()) not in known]
    if len(rest) != count:
        raise ValueError(f"corpus {name}: {len(taken)} windows of {length} tokens leave {len(rest)}, not {count}")
    return torch.stack(rest) if rest else taken[:0]


def sources(name: str, tokenizer: PreTrainedTokenizerBase, cut: Tensor, *, bos: bool | None = None) -> list[int]:
    """The number of the document that each of some test windows (m, length) of ``windows`` is from: the one its middle lies in.

    For a bootstrap over documents. A line of a file is one, and a row of a set on the hub (of WikiText-2 there, a paragraph). Every
    window gets a number of its own where this is not known: a text of one document or too long to be tokenized as a whole, and a
    tokenizer that does not tell where a token begins.

    Raises:
        ValueError: if the text has no such window; as ``windows``.
    """
    texts = documents(name)
    text = BETWEEN.join(texts)
    if len(texts) == 1 or len(text) > WHOLE or not getattr(tokenizer, "is_fast", False):
        return list(range(len(cut)))
    body = cut if beginning(tokenizer, bos) is None else cut[:, 1:]
    (ids, starts), length = token_places(tokenizer, text), body.shape[1]
    whole = ids[: len(ids) // length * length].view(-1, length)
    places = {tuple(window): place for place, window in enumerate(whole.tolist())}
    found = [places.get(tuple(window)) for window in body.tolist()]
    if None in found:
        raise ValueError(f"corpus {name} has no such window: its text, the tokenizer or bos is another one")
    ends = torch.tensor(list(accumulate(len(text) + len(BETWEEN) for text in texts)))
    middles = starts[torch.tensor(found) * length + length // 2]
    return torch.searchsorted(ends, middles, right=True).tolist()
