"""From a model to a recommendation: what each ratio costs on held-out text, and the largest ratio that is cheap enough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import fmean
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nsvd.compression.measure import prepare, take_statistics
from nsvd.compression.ranks import by_loss
from nsvd.compression.report import Clock
from nsvd.compression.request import resolve
from nsvd.compression.strs import losses_with
from nsvd.lab.calibration import domains
from nsvd.lab.compress import plan, spoken
from nsvd.linalg import LowRank, matrix_method, saves_parameters
from nsvd.linalg.factors import check_ratio, n_params
from nsvd.markup import bar, block, number, table
from nsvd.stored.checkpoint import is_compressed
from nsvd.walk.sampling import own_text, sample
from nsvd.walk.targets import shapes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

METHOD, FACTORS = "kfac", "pivoted"  # ``best`` without following shifted inputs: one pass serves all ratios
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
NOT_BEST = (
    "These numbers are of kfac. best also leaves out neurons, has a larger ridge, "
    "and fits every layer to the inputs that it will really get."
)
HELD = 4  # every fourth window is held out
CUT = 5  # times the accepted rise: larger ones would hide in a figure where the accepted one lies
FEW = 8  # tokens that are written to see how long all of them take


@dataclass(frozen=True, repr=False, eq=False)
class Advice:
    """The trade-off of a model. ``rows`` hold ``ratio, removed, perplexity, rise``; the first is the dense model, ratio 0.

    ``ratio`` counts the parameters of the layers that are compressed, ``removed`` those of the whole model. ``rise`` is that of the
    perplexity over the dense one. The rows leave out one step of ``best``, which follows shifted inputs. To see what ``best``
    itself loses, compress by it on ``used`` and give the model to ``perplexity``.
    """

    rows: list[dict]
    limit: float  # the rise that is still accepted
    calibration: str
    used: list[Tensor]  # windows (count, length) that calibrated, a tensor a part of the text
    held: list[Tensor]  # windows that were held out, to measure on

    @property
    def windows(self) -> int:
        """How many windows were held out."""
        return sum(map(len, self.held))

    @property
    def ratio(self) -> float:
        """The largest ratio up to which no rise is above the limit; 0 where the smallest one is."""
        best = 0.0
        for row in self.rows:
            if row["rise"] > self.limit:
                break
            best = row["ratio"]
        return best

    def perplexity(self, model: nn.Module) -> float:
        """Of another model of the same tokens, on the windows that were held out; measured as in the rows."""
        return _perplexity(model, self.held)

    @cached_property
    def table(self) -> pd.DataFrame:
        """The rows as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def figure(self, reached: float | None = None) -> Figure:
        """The rise of perplexity against the ratio, and the rise that is accepted; larger rises than five times that are cut off.

        ``reached`` is the rise of a model that was compressed at the recommended ratio; it is drawn as a star.
        """
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        from nsvd.lab.figures import PALETTE, style

        ratios, rises = ([100 * row[name] for row in self.rows] for name in ("ratio", "rise"))
        every = rises if reached is None else [*rises, 100 * reached]
        highest = max(100 * self.limit, min(max(every), 100 * CUT * self.limit))
        with rc_context():
            style()
            figure = Figure(figsize=(6, 3.6))
            axis = figure.subplots()
            axis.plot(ratios, rises, marker="o", color=PALETTE["kfac"], label="one pass for all ratios")
            if reached is not None:
                axis.plot(100 * self.ratio, 100 * reached, "*", ms=14, color=PALETTE["best"], label="best, written")
            axis.axhline(100 * self.limit, color="black", lw=0.8, ls=":", label="accepted")
            axis.set(xlabel="parameters of the layers removed, %", ylabel="rise of perplexity, %")
            axis.set_ylim(min(0.0, *every) - 0.05 * highest, 1.05 * highest)
            if max(every) > highest:
                axis.set_title(f"rises above {highest:.0f} % are not shown", fontsize="small")
            axis.legend()
        return figure

    def sentence(self) -> str:
        """The recommendation in words."""
        if not self.ratio:
            return (
                f"no ratio tried keeps the rise of perplexity below {self.limit:.0%}: try smaller ratios, accept a larger rise, "
                "or take more text"
            )
        row = next(row for row in self.rows if row["ratio"] == self.ratio)
        return (
            f"ratio {self.ratio:g}: {row['removed']:.1%} of the whole model's parameters go, and perplexity rises by "
            f"{row['rise']:.1%} (limit {self.limit:.0%})"
        )

    @property
    def text(self) -> str:
        """Which text the numbers are of, in words."""
        name = "the model's own text" if self.calibration == "self" else self.calibration
        return f"{self.windows} windows of {name} that did not calibrate"

    def __repr__(self) -> str:
        return f"Advice({self.sentence()}; {len(self.rows) - 1} ratios on {self.windows} windows of {self.calibration})"

    def __str__(self) -> str:
        lines = [f"{'ratio':>6}  {'of the whole model':>18}  {'perplexity':>10}  {'rise':>7}"]
        for row in self.rows:
            mark = "  <- recommended" if row["ratio"] == self.ratio and self.ratio else ""
            lines.append(
                f"{row['ratio']:6g}  {row['removed']:18.1%}  {row['perplexity']:10.2f}  {row['rise']:+7.1%}{mark}"
            )
        return "\n".join([f"Perplexity on {self.text}:", *lines, self.sentence(), NOT_BEST])

    def _repr_html_(self) -> str:
        most = max(row["rise"] for row in self.rows)
        cells = [
            [
                number(row["ratio"], "{:g}"),
                number(row["removed"], "{:.1%}"),
                number(row["perplexity"], "{:.2f}"),
                bar(row["rise"], most, "{:+.1%}"),
            ]
            for row in self.rows
        ]
        return block(
            self.sentence(), table(["ratio", "removed of the whole model", "perplexity", "rise"], cells), self.text
        )


def advise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    calibration: str = "self",
    ratios: Sequence[float] = RATIOS,
    limit: float = 0.1,
    count: int | None = None,
    length: int | None = None,
    bos: bool | None = None,
    seed: int = 0,
    progress: bool = False,
    tell: Callable[[str], None] = lambda sentence: None,
) -> Advice:
    """What each ratio costs, from one calibration; the model is left as it was.

    A quarter of the text is held out and measured on. The rest calibrates: moments and gradients are taken once, every layer is
    decomposed once, and cut for every ratio, with ranks by predicted loss. The model and its decompositions are in memory.

    Args:
        calibration: as in ``domains``: a corpus, a file, ``self`` (text of the model's own, the default), or a sum.
        ratios: fractions removed to try, each in (0, 1).
        limit: the rise of perplexity that is still accepted, 0.1 for 10 %.
        tell: gets a sentence before anything long starts: how long the model writes, where the text is its own; then what the rest
            takes.

    Raises:
        ValueError: no ratio, one out of range, a limit that is not above 0, a text of fewer than two windows; and as ``compress_``.
        FloatingPointError: NaN or Inf in an activation or a loss.
    """
    ratios = sorted(set(ratios))
    _check(ratios, limit)
    if is_compressed(model):
        raise ValueError("this model is compressed already; dequantize() it first")
    how = {"length": length, "count": count, "bos": bos, "seed": seed}
    texts = domains(calibration, model, tokenizer, **how, write=partial(_written, tell=tell))
    used, held = zip(*(_parted(ids, calibration) for ids in texts), strict=True)
    how = {"ratio": ratios[-1], "ranks": None, "shifted": None, "refine": 0, "distill": 0, "search_count": None}
    how |= {"windows": used, "weights": "uniform", "seed": seed, "progress": progress}
    tokens = sum(ids.numel() for ids in held)
    curve = plan(model, resolve(METHOD, {}, allocation="fisher", factors=FACTORS, **how))
    tell(f"for the table: {curve}; then the {tokens:,} tokens held out are read {len(ratios) + 1} times")
    tell(f"to compress by best afterwards: {plan(model, resolve('best', {}, allocation=None, factors=None, **how))}")
    stats = take_statistics(model, None, used, matrix_method(METHOD), "fisher", Clock(), seed, progress)
    prepared, sizes, whole = prepare(model, stats, METHOD, progress=progress), shapes(model), _parameters(model)

    def row(ratio: float) -> dict:
        ranks = by_loss(model, stats, prepared, ratio, method=METHOD, factors=FACTORS) if ratio else {}
        ranks = {name: k for name, k in ranks.items() if saves_parameters(*sizes[name], k, FACTORS)}
        factors = {name: matrix_method(METHOD).cut(prepared[name], k) for name, k in ranks.items()}
        removed = sum(math.prod(sizes[name]) - n_params(*sizes[name], k, FACTORS) for name, k in ranks.items())
        return {"ratio": ratio, "removed": removed / whole, "perplexity": _perplexity(model, held, factors)}

    rows = [row(ratio) for ratio in (0.0, *ratios)]
    dense = rows[0]["perplexity"]
    rows = [one | {"rise": one["perplexity"] / dense - 1} for one in rows]
    return Advice(rows, limit, calibration, list(used), list(held))


def _perplexity(model: nn.Module, texts: Sequence[Tensor], factors: Mapping[str, LowRank] | None = None) -> float:
    """Over all windows of all texts; with some layers replaced by factors for the moment."""
    return math.exp(fmean(loss for ids in texts for loss in losses_with(model, factors or {}, ids)))


def _written(model: PreTrainedModel, *, tell: Callable[[str], None], count: int = 128, length: int, **how) -> Tensor:
    """``own_text``; how long that takes is told first."""
    clock = time.perf_counter()
    sample(model, count, FEW, start=how["start"])
    seconds = (time.perf_counter() - clock) * length / 2 / FEW
    tell(f"first the model writes {count} windows of {length // 2} tokens, some {spoken(seconds)}")
    return own_text(model, count, length, **how)


def _check(ratios: Sequence[float], limit: float) -> None:
    if not ratios:
        raise ValueError("no ratio to try; give one at least")
    for ratio in ratios:
        check_ratio(ratio)
        if not ratio:
            raise ValueError("ratio 0 removes nothing; the dense model is measured anyway")
    if not 0 < limit < math.inf:
        raise ValueError(f"the limit is {limit}, but the rise that is accepted is a number above 0")


def _parted(ids: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What calibrates and what is held out."""
    if len(ids) < 2:
        raise ValueError(f"{name} gives one window; two are the least, one to calibrate and one to measure on")
    held = [i % HELD == HELD - 1 for i in range(len(ids))] if len(ids) >= HELD else [False] * (len(ids) - 1) + [True]
    keep = [i for i, out in enumerate(held) if not out]
    return ids[keep], ids[[i for i, out in enumerate(held) if out]]


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
