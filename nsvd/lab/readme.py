"""The tables of README.md and RESULTS.md, from the measurements of the executed notebooks.

    python -m nsvd.lab.readme

writes them between the two ``results`` comments of each file: the first table into README.md, all into RESULTS.md. Everything
else is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import cast

import pandas as pd

from nsvd.lab import tables
from nsvd.lab.corpora import EMBEDDED
from nsvd.lab.paths import checkout
from nsvd.lab.records import Records
from nsvd.stored.files import replacing

BEGIN, END = "<!-- results -->", "<!-- /results -->"
CELL = ["model", "recipe", "method", "ratio", "k1", "alpha", "allocation", "cache_ratio", "joint", "corpus", "measure"]
HOME, PLACES = EMBEDDED[0], tables.places(EMBEDDED)
AWAY = {place: PLACES[place] for place in ("near", "far")}
REAL = "smollm2-135m"  # the folder of the runs of a model that people know
ROWS = ("ASVD-I", "NSVD-I", "SoLA", "AA-SVD, its objective", "KFAC-SVD", "ZS-SVD, one shot", "KFAC-SVD, LEMS")
ROWS = (*ROWS, "ASVD-I, far text too", "best")
MODELS = ("mini-llama-s", "mini-llama", "mini-llama-l", "mini-vicuna", "mini-opt", "mini-mistral")


def headline(folder: Path, **_stale: bool) -> str:
    """The one table of README.md, in Markdown, from a run of a real model, whichever code made it."""
    return _rivals(_read_real(folder, "15_rivals"))


def results(folder: Path, *, stale: bool = False) -> str:
    """All tables, in Markdown, of the default runs; ``folder`` holds the records of the notebooks.

    Raises:
        ValueError: if a notebook's were not all made by today's code (with ``stale``, whatever made them), or are of several runs.
    """
    read = partial(_read, folder, stale=stale)
    return "\n\n".join(
        [
            headline(folder),
            _nested(_read_real(folder, "04_evaluation")),
            _beyond(read("10_beyond_nsvd")),
            _families(read("06_model_families")),
            _evaluation(read("04_evaluation")),
            _rank_split(read("05_rank_split")),
            _rank_search(read("08_rank_search")),
            _cache(read("07_kv_cache")),
        ]
    )


def _read(folder: Path, name: str, stale: bool) -> pd.DataFrame:
    """The records of a notebook's default run."""
    frame = Records(folder / f"{name}.jsonl").frame(stale=stale)
    if frame.empty:
        raise ValueError(f"{folder / name}.jsonl holds nothing that today's code measured; run notebook {name} first")
    frame = frame.loc[frame.model.isin(MODELS if name == "06_model_families" else MODELS[1:2])]
    frame = frame.loc[frame.weights == frame.groupby("model").weights.transform("first")]  # 04 changes them at the end
    if frame.duplicated([column for column in CELL if column in frame]).any():
        raise ValueError(f"{folder / name}.jsonl holds several runs; run notebook {name} into an empty file")
    return frame


def _read_real(folder: Path, name: str) -> pd.DataFrame:
    """The records of a run that is no part of the workbook, whichever code made them: it takes hours."""
    frame = Records(folder / REAL / f"{name}.jsonl").frame(stale=True)
    if frame.empty:
        raise ValueError(f"{folder / REAL / name}.jsonl holds nothing; run `make smollm2-workbook`")
    return frame


def _table(caption: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return caption + "\n\n" + "\n".join(f"| {' | '.join(line)} |".replace("| --- ", "|---") for line in lines)


def _share(row: pd.Series) -> str:
    return f"{row.closed:.0%} [{row.low:.0%}, {row.high:.0%}]"


def _gain(row: pd.Series) -> str:
    return f"{row.improvement:+.1%} [{row.low:+.1%}, {row.high:+.1%}]"


def _only(values: pd.Series) -> float:
    """The one value that a column has; raises ``ValueError`` where there are several."""
    (value,) = set(values.dropna())
    return value


def _windows(frame: pd.DataFrame) -> str:
    return f"{_only(frame.losses.dropna().map(len))} windows a set"


def _removed(frame: pd.DataFrame) -> str:
    return f"at {_only(frame.ratio[frame.method != 'dense']):.0%} removed".replace("%", " %")


def _short(corpus: str) -> str:
    return corpus.split("/")[-1].replace("_", " ")


def _times(frame: pd.DataFrame, kind: str) -> pd.Series:
    """Perplexity over the dense one at home / near / far, geometric means, by ratio and ``kind``, a column of the frame."""
    times = tables.times(frame, list(dict.fromkeys(frame.corpus)), by=["ratio", kind]).xs("times", axis=1, level=1)
    said = times.map(lambda x: f"{x:,.{2 if x < 10 else 1 if x < 100 else 0}f}")
    return cast(pd.Series, said.agg(" / ".join, axis=1))


def _places(frame: pd.DataFrame) -> dict[str, list[str]]:
    """The sets, in their order: the domain that calibrates first, two that are far last."""
    return tables.places(list(dict.fromkeys(frame.corpus)))


def _rivals(frame: pd.DataFrame) -> str:
    ratios, times = sorted(set(frame.ratio.dropna()) - {0.0}), _times(frame, "recipe")
    rows = [[f"`{name}`" if name == "best" else name, *(times[ratio, name] for ratio in ratios)] for name in ROWS]
    caption = (
        "SmolLM2-135M-Instruct, the same number of stored parameters for every method. Each cell is perplexity divided by the "
        "dense model's on three kinds of text: home (WikiText-2, which is also what calibrates) / near (five other English sets) "
        f"/ far (a Chinese and a Japanese one). Notebook 15 of `make smollm2-workbook EVAL=folder`, {_windows(frame)}:"
    )
    return _table(caption, ["method", *(f"{ratio:.0%} removed" for ratio in ratios)], rows)


def _nested(frame: pd.DataFrame) -> str:
    places, times, rows = _places(frame), _times(frame, "method"), []
    gains = {
        place: tables.improvements(frame.loc[frame.method.isin(["dense", "asvd-1", "nsvd-1"])], corpora).set_index(
            "ratio"
        )
        for place, corpora in places.items()
    }
    for ratio in sorted(set(frame.ratio) - {0.0}):
        rows.append([f"{ratio:.0%}", times[ratio, "asvd-1"], *(_gain(gains[place].loc[ratio]) for place in places)])
    caption = (
        f"SmolLM2-135M-Instruct on the same sets (notebook 04 of `make smollm2-workbook EVAL=folder`, {_windows(frame)}): "
        "perplexity of ASVD-I over the dense one (home / near / far), and the mean reduction of perplexity by NSVD-I:"
    )
    return _table(caption, ["removed", "ASVD-I", *(f"NSVD-I, {place}" for place in places)], rows)


def _beyond(frame: pd.DataFrame) -> str:
    shares = {place: tables.shares_closed(frame, corpora, ["ratio"]) for place, corpora in PLACES.items()}
    recipes = {
        "NSVD-I, k1 = 0.95 k": "NSVD-I",
        "ASVD-I, far text too": "ASVD-I, far text too",
        "best, no corpus": "`best`, no corpus",
        "best": "`best`, corpus and own text",
        "best + distillation": f"and {_only(frame.distill):.0f} steps of `distill`",
    }
    rows = [
        [f"{ratio:.0%}", told, *(_share(share.loc[(ratio, name)]) for share in shares.values())]
        for ratio in (0.2, 0.3, 0.5)
        for name, told in recipes.items()
    ]
    caption = (
        "At equal stored parameters (`nsvd run 10`): share of what ASVD-I loses that is won back at home, near and far, "
        f"{_windows(frame)}:"
    )
    return _table(caption, ["removed", "method", *PLACES], rows)


def _families(frame: pd.DataFrame) -> str:
    rows = []
    for name in MODELS:
        part = frame.loc[frame.model == name]
        home = part.loc[part.corpus == HOME].set_index("method").perplexity
        paper = part.loc[part.method.isin(["dense", "asvd-1", "nsvd-1"])]
        gains = [_gain(tables.improvements(paper, sets).set_index("method").loc["nsvd-1"]) for sets in AWAY.values()]
        told = part.assign(recipe=part.method, all=0)
        shares = [_share(tables.shares_closed(told, sets, ["all"]).loc[(0, "best")]) for sets in AWAY.values()]
        path = " → ".join(f"{home[method]:.1f}" for method in ("dense", "asvd-1", "best"))
        rows.append([name, path, *gains, *shares])
    caption = (
        f"Other models {_removed(frame)} (`nsvd run 06`), {_windows(frame)}: perplexity at home, dense → ASVD-I → `best` with no "
        "corpus; then the reduction of perplexity by NSVD-I, and the share of what ASVD-I loses that `best` wins back:"
    )
    head = [f"{what}, {place}" for what in ("NSVD-I over ASVD-I", "`best`") for place in AWAY]
    return _table(caption, ["model", "at home", *head], rows)


def _evaluation(frame: pd.DataFrame) -> str:
    gains = {place: tables.improvements(frame, sets).set_index(["ratio", "method"]) for place, sets in AWAY.items()}

    def row(ratio: float, method: str) -> list[str]:
        some = frame[(frame.method == method) & ((frame.ratio == ratio) | (method == "dense"))]
        here = some.set_index("corpus").perplexity
        none = method in ("dense", "asvd-1")
        last = ["" if none else _gain(gain.loc[(ratio, method)]) for gain in gains.values()]
        first = "" if method == "dense" else f"{ratio:.0%}"
        return [first, tables.label(method), *(f"{here[corpus]:,.1f}" for corpus in EMBEDDED), *last]

    methods = ("svd", "asvd-0", "asvd-1", "nsvd-1")
    rows = [row(0.0, "dense"), *(row(ratio, method) for ratio in (0.2, 0.3, 0.5) for method in methods)]
    caption = (
        "Perplexity of `mini-llama`, calibrated on `mini/encyclopedia` (`nsvd run 04`; all ratios, sets and intervals in the "
        "notebook):"
    )
    last = [f"improvement over ASVD-I, {place}" for place in AWAY]
    return _table(caption, ["removed", "method", *map(_short, EMBEDDED), *last], rows)


def _rank_split(frame: pd.DataFrame) -> str:
    gains = [tables.improvements(frame, sets).set_index(["method", "k1"]).improvement for sets in AWAY.values()]
    known = gains[0].index
    splits = sorted({k1 for method, k1 in known if method == "nsvd-1"}, reverse=True)

    def cell(method: str, k1: float) -> str:
        return " / ".join(f"{gain[method, k1]:+.1%}" for gain in gains) if (method, k1) in known else ""

    rows = [[tables.label(name), *(cell(name, k1) for k1 in splits)] for name in ("nsvd-1", "nid-1", "nid-2")]
    caption = f"The split of the rank {_removed(frame)} (`nsvd run 05`), average improvement over ASVD-I, near / far:"
    return _table(caption, ["k1 / k", *(f"{k1:g}" for k1 in splits)], rows)


def _rank_search(frame: pd.DataFrame) -> str:
    removed, frame = _removed(frame), frame.loc[frame.corpus.notna() & frame.allocation.notna()]
    gains = [tables.gains(frame.loc[frame.method != "dense"], sets) for sets in AWAY.values()]
    home = frame[frame.corpus == HOME].set_index(["method", "allocation"]).perplexity
    rows = [
        [tables.label(method), f"{home[method, 'uniform']:.1f}"]
        + [
            " / ".join([f"{home[method, name]:.1f}", *(_gain(gain.loc[(method, name)]) for gain in gains)])
            for name in ("strs", "spectrum")
        ]
        for method in ("asvd", "asvd-1")
    ]
    caption = (
        f"Ranks searched layer by layer {removed} (`nsvd run 08`), {_windows(frame)}: perplexity at home / average "
        "improvement over uniform ranks near / far, with one draw of the text that is searched on:"
    )
    return _table(caption, ["method", "uniform", "STRS", "spectrum"], rows)


def _cache(frame: pd.DataFrame) -> str:
    def pair(kept: float, method: str, joint: bool | None) -> str:
        some = frame.loc[(frame.cache_ratio == kept) & (frame.method == method)]
        some = some if joint is None else some.loc[some.joint == joint]
        here = some.drop_duplicates("corpus").set_index("corpus").perplexity
        return f"{here[HOME]:.1f} / {here[EMBEDDED[-1]]:,.1f}"

    kept, dense = (0.7, 0.5, 0.35, 0.2), pair(1.0, "dense", False)
    recipes = {
        "SVD": ("svd", False),
        "ASVD": ("asvd", False),
        "ASVD-I": ("asvd-1", False),
        "ASVD-I, one latent for K and V": ("asvd-1", True),
        "NSVD-I, k1 = 0.8": ("nsvd-1", False),
        "`best`, from the model's own text": ("best", None),
    }
    rows = [[name, dense, *(pair(ratio, *how) for ratio in kept)] for name, how in recipes.items()]
    caption = (
        f"KV cache of latents (`nsvd run 07`), {_windows(frame)}: perplexity at home / in Japanese, by the fraction of the dense "
        "cache's bytes allowed, which is never exceeded:"
    )
    return _table(caption, ["method", "1", *(f"{ratio:g}" for ratio in kept)], rows)


def with_results(text: str, shown: str) -> str:
    """The text with the tables in their place; raises ``ValueError`` where there is none."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the text has no one place for results, from {BEGIN} to {END}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{shown}\n{END}{rest.partition(END)[2]}"


FILES = {"README.md": headline, "RESULTS.md": results}


def main() -> None:
    """Write the tables into README.md and RESULTS.md."""
    found = {checkout() / name: made(checkout() / "data/results") for name, made in FILES.items()}
    for file, shown in found.items():
        text = with_results(file.read_text(encoding="utf-8"), shown)
        with replacing(file) as part:
            part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
