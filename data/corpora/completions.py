"""Write the questions of ``completion_en``, ``completion_zh`` and ``completion_ja`` from the embedded test texts.

A sentence is cut in the middle. The question is what stands before the cut, with the sentence before it; the right choice is what
follows there. In one half of the questions the wrong ones are what follows in three other sentences of the same set, of other
documents, about as long. In the other half they are the right one with two of its words exchanged (in Chinese and Japanese, pieces
of two characters). Run again, it writes the same files.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = {
    "completion_en": ("encyclopedia", "newswire", "web", "instructions", "stories"),
    "completion_zh": ("reading_zh",),
    "completion_ja": ("instructions_ja",),
}
COUNT = {"completion_en": 160, "completion_zh": 80, "completion_ja": 80}
OTHERS, LIKE, SEED = 3, 1.25, 0  # wrong choices, at most so many times as long or short as the right one


def sentences(text: str, spaced: bool) -> list[list[str]]:
    """The sentences of every paragraph, headings left out."""
    mark = r"(?<=[.!?])\s+" if spaced else r"(?<=[。！？])"
    lines = [line.strip() for line in text.split("\n") if line.strip() and not line.startswith("=") and "_" not in line]
    return [[part for part in re.split(mark, line) if part] for line in lines]


def cut(sentence: str, spaced: bool, rng: random.Random) -> tuple[str, str] | None:
    """A sentence in two parts, the second a half to a third of it; None where it is too short or too long."""
    units, joint = (sentence.split(), " ") if spaced else (list(sentence), "")
    if not (12 <= len(units) <= 32 if spaced else 20 <= len(units) <= 60):
        return None
    at = round(len(units) * rng.uniform(0.5, 0.65))
    return joint.join(units[:at]), joint.join(units[at:])


def parts(role: str, spaced: bool, rng: random.Random) -> list[tuple[int, str, str]]:
    """(document, question, ending) of every sentence that can be cut."""
    found = []
    for document, line in enumerate((HERE / role / "test.jsonl").read_text(encoding="utf-8").splitlines()):
        for paragraph in sentences(json.loads(line)["text"], spaced):
            for before, sentence in zip([None, *paragraph], paragraph, strict=False):
                if both := cut(sentence, spaced, rng):
                    question = both[0] if before is None else before + (" " if spaced else "") + both[0]
                    found.append((document, question, both[1]))
    return found


def exchanged(ending: str, spaced: bool, rng: random.Random) -> list[str]:
    """Different texts, in each of which two words that are no neighbours have changed places; the last one stays."""
    units = ending.split() if spaced else re.findall("..?", ending)
    pairs = [(i, j) for j in range(len(units) - 1) for i in range(j - 1) if units[i] != units[j]]
    found = {}
    for i, j in rng.sample(pairs, len(pairs)):
        order = list(range(len(units)))
        order[i], order[j] = j, i
        found[(" " if spaced else "").join(units[k] for k in order)] = None
    return [text for text in found if text != ending]


def ask(name: str) -> list[dict]:
    """The questions of a task."""
    rng, spaced, rows = random.Random(f"{name} {SEED}"), name == "completion_en", []
    for role in SOURCES[name]:
        every, asked = parts(role, spaced, rng), []
        rng.shuffle(every)
        for document, question, ending in every:
            if len(asked) == COUNT[name] // len(SOURCES[name]):
                break
            if len(asked) % 2:
                others = exchanged(ending, spaced, rng)
            else:
                others = [
                    e for d, _, e in every if d != document and e != ending and 1 / LIKE <= len(e) / len(ending) <= LIKE
                ]
            if len(others) >= OTHERS:
                choices = [ending, *rng.sample(others, OTHERS)]
                rng.shuffle(choices)
                asked.append({"question": question, "choices": choices, "answer": choices.index(ending)})
        rows += asked
    return rows


if __name__ == "__main__":
    for name in SOURCES:
        file = HERE / name / "test.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ask(name)), encoding="utf-8")
