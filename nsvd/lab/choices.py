"""Multiple choice without training: the answer is the choice that a model finds most likely after the question.

A task is an embedded one (``mini/completion_en``), or ``DIR:name`` for ``DIR/name/test.jsonl``. A line is
``{"question": …, "choices": [… two at least], "answer": number of the right one, from 0}``. A question with one gap, ``_``, is
filled with each choice in turn, and what follows the gap is scored; in any other what is scored is the choice.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from nsvd.lab.intervals import mean_with_interval
from nsvd.lab.paths import data
from nsvd.lab.records import Records
from nsvd.lab.tokens import beginning
from nsvd.walk.loss import token_losses
from nsvd.walk.text import check_length, tokens_at_once

EMBEDDED_TASKS = ("mini/completion_en", "mini/completion_zh", "mini/completion_ja")
ASKED = "Question: {question}\nAnswer:"
PROMPTS = {
    "arc_easy": ASKED,
    "arc_challenge": ASKED,
    "piqa": ASKED,
}  # as in lm-evaluation-harness; others as they stand
UNSPACED = ("completion_zh", "completion_ja")  # a choice follows without a space


class Question(NamedTuple):
    """What a model reads before each choice, what of it is scored, the choice itself, and which is right."""

    contexts: tuple[str, ...]
    scored: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int


GAP = re.compile(r"(?<!\w)_(?!\w)")  # of a sentence to be filled


@dataclass(frozen=True)
class Choices:
    """What a model chose: for each question 1 where it was right, 0 where not.

    ``plain`` takes the choice of the largest log-likelihood, ``acc`` of lm-evaluation-harness. ``normalized`` first divides the
    log-likelihood by the number of characters, the space before them left out; that is ``acc_norm``. In a question with a gap the
    same words are scored after every choice, so both are equal. ``chance`` is the share of right answers that a guess gets.
    """

    plain: Tensor  # (count,), float64
    normalized: Tensor
    chance: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.plain.mean().item()

    @property
    def accuracy_normalized(self) -> float:
        """Share of right answers by likelihood per character."""
        return self.normalized.mean().item()

    @property
    def standard_error(self) -> float:
        """Of ``accuracy``, questions taken as independent."""
        return (self.plain.std() / len(self.plain) ** 0.5).item() if len(self.plain) > 1 else math.nan


def questions(task: str, *, count: int | None = None, seed: int = 0) -> list[Question]:
    """The questions of a task, ``count`` random ones if given.

    Raises:
        ValueError: if there is no such task, a line is no question, or there are fewer questions than asked for.
        FileNotFoundError: if there is no such file.
    """
    file = _file(task)
    if not file.is_file():
        raise FileNotFoundError(f"task {task}: no file {file}")
    try:
        with file.open(encoding="utf-8-sig") as stream:
            found = [_question(file, number, line) for number, line in enumerate(stream, 1)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    if len(found) < (count or 1) or (count is not None and count < 1):
        raise ValueError(f"task {task} has {len(found)} questions; {1 if count is None else count} asked for")
    if count is None:
        return found
    keep = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]
    return [found[i] for i in keep.sort().values.tolist()]


def multiple_choice(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str | Sequence[Question],
    *,
    count: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
    progress: bool = False,
) -> Choices:
    """What the model chooses in a task (see ``questions``), and whether it is right.

    A choice is scored by the sum of the log-likelihoods of its tokens. ``bos`` is as in ``windows``: whether every text begins
    with the BOS token.

    Raises:
        ValueError: as ``questions``; if a text is longer than what the model can read, or a choice adds no token to the question.
        FloatingPointError: if a likelihood is NaN or Inf.
    """
    asked = questions(task, count=count, seed=seed) if isinstance(task, str) else list(task)
    first = beginning(tokenizer, bos)
    texts = [_ids(tokenizer, *pair, first) for q in asked for pair in zip(q.contexts, q.scored, strict=True)]
    likelihoods = iter(_likelihoods(model, texts, progress))
    plain, normalized = [], []
    for q in asked:
        likely = torch.tensor([next(likelihoods) for _ in q.choices], dtype=torch.float64)
        sizes = torch.tensor([len(scored.removeprefix(" ")) for scored in q.scored], dtype=torch.float64)
        plain.append(float(likely.argmax() == q.answer))
        normalized.append(float((likely / sizes).argmax() == q.answer))
    chance = sum(1 / len(q.choices) for q in asked) / len(asked)
    right, right_normalized = (torch.tensor(x, dtype=torch.float64) for x in (plain, normalized))
    return Choices(right, right_normalized, chance)


def measure_choices(
    build: Callable[[], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Question]],
    records: Records,
    about: dict,
) -> list[dict]:
    """One model in every task: a row each, of ``about``, the task and the numbers of ``Choices``.

    ``about`` has to say all that tells this model from others; ``build()`` makes it where something is not yet recorded.
    """
    sums = {task: hashlib.sha256(repr(asked).encode()).hexdigest()[:12] for task, asked in tasks.items()}
    rows = {task: about | {"task": task, "questions": sums[task]} for task in tasks}
    if missing := [task for task in tasks if records.find(**rows[task]) is None]:
        model = build()
        for task in missing:
            found = multiple_choice(model, tokenizer, tasks[task])
            numbers = {"accuracy": found.accuracy, "normalized": found.accuracy_normalized, "chance": found.chance}
            records.add(
                rows[task], numbers | {"right": found.plain.tolist(), "right_normalized": found.normalized.tolist()}
            )
    return [row | records.found(**row) for row in rows.values()]


def accuracy_difference(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """How much higher one model's accuracy is than another's, on the average of tasks: (difference, low, high).

    Of every task there are the numbers of ``Choices`` on the same questions. For the bootstrap interval, questions are drawn with
    replacement within each task, the same ones for both models: what is left is the uncertainty of the difference on questions of
    this kind. Without any task, all three are NaN.
    """
    return mean_with_interval([a - b for a, b in zip(ours, theirs, strict=True)], level=level, draws=draws, seed=seed)


def _file(task: str) -> Path:
    if task in EMBEDDED_TASKS:
        return data() / "corpora" / task.removeprefix("mini/") / "test.jsonl"
    folder, colon, name = task.rpartition(":")
    if not colon:
        raise ValueError(f"unknown task {task!r}; use {', '.join(EMBEDDED_TASKS)}, or DIR:name for DIR/name/test.jsonl")
    return Path(folder) / name / "test.jsonl"


def _question(file: Path, number: int, line: str) -> Question:
    """A line read. The task is what its folder is called."""
    wrong = ValueError(
        f'{file}, line {number}: expected {{"question": …, "choices": [two at least], "answer": from 0}}'
    )
    try:
        row = json.loads(line)
        text, choices, answer = row["question"], row["choices"], row["answer"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise wrong from None
    if not isinstance(text, str) or not text.strip():
        raise wrong
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise wrong
    if type(answer) is not int or not 0 <= answer < len(choices) or len(choices) < 2:
        raise wrong
    name = file.parent.name
    before, *rest = GAP.split(text)
    if len(rest) == 1 and rest[0].strip():
        after = rest[0]
        return Question(
            tuple(before + choice for choice in choices), (f" {after.strip()}",) * len(choices), tuple(choices), answer
        )
    space = "" if name in UNSPACED else " "
    prompt = PROMPTS.get(name, "{question}").format(question=text)
    return Question((prompt,) * len(choices), tuple(space + choice for choice in choices), tuple(choices), answer)


def _ids(tokenizer: PreTrainedTokenizerBase, context: str, scored: str, first: int | None) -> tuple[list[int], int]:
    """Token ids of a text, and how many of them, at its end, are scored. Spaces that end the context belong to what is scored.

    As in lm-evaluation-harness the context keeps its own tokens, also where one would reach into what is scored.
    """
    bare = context.rstrip()
    whole, known = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context + scored, bare))
    if len(whole) <= len(known):
        raise ValueError(f"{scored!r} adds no token to the question {context!r}")
    begin = [] if first is None else [first]
    if not begin + known:
        raise ValueError(f"there is no token before {scored!r}")
    return begin + known + whole[len(known) :], len(whole) - len(known)


def _likelihoods(model: nn.Module, texts: Sequence[tuple[list[int], int]], progress: bool) -> list[float]:
    """Log-likelihood of what is scored of each text, in nats.

    Texts of like length are read together, filled up behind their end.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
    check_length(model, len(texts[order[-1]][0]))
    found, start = [math.nan] * len(texts), 0
    with tqdm(total=len(texts), desc="choices", disable=not progress, leave=False) as bar:
        while start < len(order):
            end, most = start + 1, tokens_at_once(model)
            while (
                end < len(order) and (end + 1 - start) * len(texts[order[end]][0]) <= most
            ):  # all are as long as the last
                end += 1
            batch = order[start:end]
            longest = len(texts[batch[-1]][0])
            ids = torch.tensor([texts[i][0] + [0] * (longest - len(texts[i][0])) for i in batch])
            for i, losses in zip(batch, token_losses(model, ids), strict=True):
                size, scored = len(texts[i][0]), texts[i][1]
                found[i] = -losses[size - 1 - scored : size - 1].sum().item()
            start += len(batch)
            bar.update(len(batch))
    if not all(map(math.isfinite, found)):
        raise FloatingPointError("the likelihood of a choice is NaN or Inf")
    return found
