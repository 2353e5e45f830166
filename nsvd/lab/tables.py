"""Tables of a sweep, laid out as in the NSVD paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import pandas as pd
import torch

from nsvd.lab.evaluation import average_improvement, excess_closed
from nsvd.lab.intervals import Documents, mean_with_interval, paired_interval
from nsvd.linalg import METHODS

CELL = ["ratio", "method", "k1"]


def label(method: str) -> str:
    """The papers' spelling of a method name."""
    return METHODS[method].label if method in METHODS else method


def places(corpora: Sequence[str]) -> dict[str, list[str]]:
    """Test sets by how far they are from the calibration text.

    ``home`` is the first, of its domain; ``far`` are the last two, which are in other languages, if there are more than three;
    ``near`` are those between. Places without a set are left out.
    """
    far = list(corpora[-2:]) if len(corpora) > 3 else []
    found = {"home": list(corpora[:1]), "near": [name for name in corpora[1:] if name not in far], "far": far}
    return {place: names for place, names in found.items() if names}


def times(
    frame: pd.DataFrame,
    corpora: Sequence[str],
    *,
    by: Sequence[str],
    base: pd.DataFrame | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How many times another model's a perplexity is, geometric mean of the sets of each place, with its paired interval.

    ``frame`` has a row a (``by``…, corpus) with ``losses``, and of each set the losses of ``base``, by default those of the rows
    whose ``method`` or ``recipe`` is ``dense``. The interval is a bootstrap over test documents, the same ones for both models;
    where rows do not say their ``documents``, over windows. A row a (``by``…); columns (place, ``times``), (place, ``low``),
    (place, ``high``).
    """
    kind = "recipe" if "recipe" in frame else "method"
    base = cast(pd.DataFrame, frame[frame[kind] == "dense"]) if base is None else base
    known = base.drop_duplicates("corpus").set_index("corpus").losses
    rows: dict[Any, dict] = {}
    for cell, group in frame[frame[kind] != "dense"].groupby(list(by), sort=False):
        each = group.set_index("corpus")
        for place, names in places(corpora).items():
            ours = each.loc[names]
            theirs = [torch.tensor(known[name], dtype=torch.float64) for name in names]
            rises = [a - b for a, b in zip(_losses(ours), theirs, strict=True)]
            found = mean_with_interval(rises, _documents(ours), level=level, seed=seed)
            for name, value in zip(("times", "low", "high"), found, strict=True):
                rows.setdefault(cell, {})[place, name] = math.exp(value)
    found = pd.DataFrame(list(rows.values()), index=pd.MultiIndex.from_tuples(rows, names=list(by)))
    return found.set_axis(pd.MultiIndex.from_tuples(found.columns), axis=1)


def told_times(table: pd.DataFrame) -> pd.DataFrame:
    """The same with one cell a place: ``1.23 [1.20, 1.26]``."""

    def show(x: float) -> str:
        return f"{x:.3g}" if x < 100 else f"{x:,.0f}"

    parts = {
        place: [
            f"{show(m)} [{show(a)}, {show(b)}]"
            for m, a, b in cast(pd.DataFrame, table[place])[["times", "low", "high"]].to_numpy()
        ]
        for place in dict.fromkeys(table.columns.get_level_values(0))
    }
    return pd.DataFrame(parts, index=table.index)


def perplexities(frame: pd.DataFrame, corpora: Sequence[str]) -> pd.DataFrame:
    """Perplexity, a row a (ratio, method, k1), a column a corpus in the order given."""
    frame = frame if "k1" in frame else frame.assign(k1=float("nan"))
    order = {method: i for i, method in enumerate(["dense", *METHODS])}
    table = frame.pivot_table(index=CELL, columns="corpus", values="perplexity", dropna=False).dropna(how="all")
    table = table[list(corpora)].reset_index()
    table = table.sort_values(CELL, key=lambda column: column.map(order) if column.name == "method" else column)
    return table.set_index(CELL)


def improvements(
    frame: pd.DataFrame, corpora: Sequence[str], *, reference: str = "asvd-1", level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Average improvement over a reference method at the same ratio, with its paired bootstrap interval.

    ``corpora`` are those averaged over (the paper leaves the calibration domain out); ``closed`` is the share of the reference's
    excess log-perplexity over the dense model that is closed; ``better`` counts the corpora on which the perplexity is
    lower.
    """
    frame = frame if "k1" in frame else frame.assign(k1=float("nan"))
    rows, dense = [], frame.loc[frame.method == "dense"].set_index("corpus").loc[list(corpora)]
    groups: Any = frame.loc[~frame.method.isin(["dense", reference])].groupby(CELL, dropna=False, sort=False)
    for cell, group in groups:
        ours = group.set_index("corpus").loc[list(corpora)]
        theirs = frame[(frame.method == reference) & (frame.ratio == cell[0])].set_index("corpus").loc[list(corpora)]
        better = int((ours.perplexity.to_numpy() < theirs.perplexity.to_numpy()).sum())
        closed = excess_closed(ours.perplexity, theirs.perplexity, dense.perplexity)
        numbers = _improvement(ours, theirs, level, seed) | {"closed": closed, "better": better}
        rows.append(dict(zip(CELL, cell, strict=True)) | numbers)
    return pd.DataFrame(rows)


def shares_closed(
    frame: pd.DataFrame,
    corpora: Sequence[str],
    by: Sequence[str],
    *,
    reference: str = "asvd-1",
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of the reference's excess log-perplexity closed, averaged over ``corpora``, with its paired interval.

    ``frame`` has a row a (``by``…, recipe, corpus) with ``perplexity`` and ``losses``; in every group of ``by`` one recipe is the
    ``reference``; the dense model is the recipe ``dense`` of any group.
    """
    dense = frame.loc[frame.recipe == "dense"].drop_duplicates("corpus").set_index("corpus").loc[list(corpora)]
    rows = []
    groups: Any = frame.loc[frame.recipe != "dense"].groupby(list(by), sort=False)
    for cell, group in groups:
        sides = {
            name: part.set_index("corpus").loc[list(corpora)] for name, part in group.groupby("recipe", sort=False)
        }
        for name, ours in sides.items():
            closed = excess_closed(ours.perplexity, sides[reference].perplexity, dense.perplexity)
            losses = map(_losses, (ours, sides[reference], dense))
            low, high = paired_interval(*losses, documents=_documents(ours), level=level, seed=seed)
            rows.append(dict(zip(by, cell, strict=True)) | {"recipe": name, "closed": closed, "low": low, "high": high})
    return pd.DataFrame(rows).set_index([*by, "recipe"])


def compared(
    frame: pd.DataFrame,
    pairs: Sequence[tuple[object, object]],
    corpora: Sequence[str],
    *,
    by: str = "recipe",
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Average improvement of the first of each pair over the second, with its paired bootstrap interval.

    ``frame`` has a row a (``by``, corpus) with ``perplexity`` and ``losses``; a pair names two values of ``by``. ``verdict`` is
    ``better`` or ``worse`` where the interval leaves out zero, and ``equal`` where it does not. Calibration is held fixed: what
    another draw of its text would change is in no interval.
    """
    sides = {name: frame[frame[by] == name].set_index("corpus").loc[list(corpora)] for pair in pairs for name in pair}
    rows = [_improvement(sides[ours], sides[theirs], level, seed) for ours, theirs in pairs]
    table = pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(pairs, names=[by, "against"]))
    table["verdict"] = "equal"
    table.loc[table.low > 0, "verdict"], table.loc[table.high < 0, "verdict"] = "better", "worse"
    return table


def bold_best(column: pd.Series) -> list[str]:
    """For ``Styler.apply``: bold where a column has its smallest value among the rows of one ratio."""
    return ["font-weight: bold" if best else "" for best in column == column.groupby("ratio").transform("min")]


def gains(
    frame: pd.DataFrame, corpora: Sequence[str], *, reference: str = "uniform", level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Average improvement of every allocation over a reference one of the same method, with its paired interval.

    Rows of ``frame`` have a ``method``, an ``allocation``, a ``corpus``, a ``perplexity`` and ``losses``.
    """
    rows = {}
    for method, group in frame.groupby("method", sort=False):
        base = group[group.allocation == reference].set_index("corpus").loc[list(corpora)]
        for name, part in group[group.allocation != reference].groupby("allocation", sort=False):
            rows[method, name] = _improvement(part.set_index("corpus").loc[list(corpora)], base, level, seed)
    return pd.DataFrame(rows.values(), index=pd.MultiIndex.from_tuples(rows, names=["method", "allocation"]))


def _improvement(ours: pd.DataFrame, theirs: pd.DataFrame, level: float, seed: int) -> dict[str, float]:
    low, high = paired_interval(_losses(ours), _losses(theirs), documents=_documents(ours), level=level, seed=seed)
    return {"improvement": average_improvement(ours.perplexity, theirs.perplexity), "low": low, "high": high}


def _losses(rows: pd.DataFrame) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.float64) for row in rows.losses]


def _documents(rows: pd.DataFrame) -> Documents:
    """Of each row, the document that each window is from; None where it does not say."""
    told = rows.documents if "documents" in rows else [None] * len(rows)
    return [known if isinstance(known, list) else None for known in told]
