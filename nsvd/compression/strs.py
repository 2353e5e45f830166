"""STRS: a table of what the truncation of one layer alone does to the model, and the search for ranks in it.

ASVD paper, arXiv 2312.05821, section 3.4, "sensitivity-based truncation rank searching". Losses are mean negative
log-likelihoods, log-perplexities, on a calibration text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.compression.measure import check_statistics, is_mine, naming, owners, prepare_layer
from nsvd.compression.prepared import Prepared, check_prepared, check_step
from nsvd.linalg import Decomposition, LowRank, Method, matrix_method, rank_for_ratio
from nsvd.linalg.budget import cut, cut_where, strs_steps
from nsvd.linalg.precision import home
from nsvd.markup import block, shaded, table, text
from nsvd.stored.files import fingerprint
from nsvd.stored.layers import LowRankLinear
from nsvd.stored.transposed import linear_at
from nsvd.walk.calibrate import calibrate
from nsvd.walk.decoder import Decoder
from nsvd.walk.hooks import evaluating, exchanged
from nsvd.walk.loss import check_text, window_losses
from nsvd.walk.processes import gathered
from nsvd.walk.shelf import Shelf
from nsvd.walk.soundness import check_values
from nsvd.walk.statistics import Statistics
from nsvd.walk.stream import Batch, Stream, in_order, numbered
from nsvd.walk.targets import among, shape_of, shapes, targets
from nsvd.walk.text import windows_at_once

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["layer", "kept", "rank", "loss", "losses", "tokens", "seconds"]
KEPT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # the ASVD paper's candidates


class Store(Protocol):
    """Where finished measurements are kept, by their parameters; ``nsvd.lab.records.Records`` is one."""

    def find(self, **parameters) -> dict | None: ...
    def add(self, parameters: dict, numbers: dict) -> dict: ...


@dataclass(frozen=True, repr=False)
class Sensitivity:
    """Calibration loss with one layer truncated, a row a layer and kept fraction of its parameters.

    ``table`` has the columns ``layer, kept, rank, loss, losses, tokens, seconds``, with ``losses`` those of every window;
    ``rows`` are the same without pandas; ``dense`` are the losses of the model itself, a number a window.
    """

    rows: list[dict]
    dense: list[float]

    @cached_property
    def table(self) -> pd.DataFrame:
        """The rows as a DataFrame, made when it is first asked for."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=COLUMNS)

    def on(self, windows: Sequence[int]) -> Sensitivity:
        """The same from some of the windows only, by number: how much does a search depend on its text?"""
        size, rows = len(windows) / len(self.dense), []
        for row in self.rows:
            losses = [row["losses"][i] for i in windows]
            shares = {name: row[name] * size for name in ("tokens", "seconds")}
            rows.append(row | {"loss": fmean(losses), "losses": losses} | shares)
        return Sensitivity(rows, [self.dense[i] for i in windows])

    @property
    def scores(self) -> list[tuple[str, float, float]]:
        """(layer, kept, loss), as ``strs_steps`` takes them."""
        return [(row["layer"], row["kept"], row["loss"]) for row in self.rows]

    @property
    def tokens(self) -> int:
        """How many tokens the losses of this table were measured on, earlier runs included. They pass only the blocks from the
        truncated layer on."""
        return int(sum(row["tokens"] for row in self.rows))

    @property
    def seconds(self) -> float:
        """The seconds that took, decompositions not counted."""
        return float(sum(row["seconds"] for row in self.rows))

    def rises(self) -> dict[str, dict[float, float]]:
        """By layer and kept fraction, how much the loss rises (nats a token) when this layer alone is truncated."""
        dense, found = fmean(self.dense), {}
        for layer, kept, loss in self.scores:
            found.setdefault(layer, {})[kept] = loss - dense
        return found

    def __repr__(self) -> str:
        rises = self.rises()
        kept = sorted({row["kept"] for row in self.rows})
        among = f", kept {kept[0]:g} to {kept[-1]:g}" if kept else ""
        return (
            f"Sensitivity({len(rises)} layers{among}, {len(self.dense)} windows of mean loss {fmean(self.dense):.4f})"
        )

    def _repr_html_(self) -> str:
        """A row a layer, a column a kept fraction; the redder, the more the loss rises."""
        rises, kept = self.rises(), sorted({row["kept"] for row in self.rows})
        most = max((rise for row in rises.values() for rise in row.values()), default=0.0)
        cells = lambda row: [shaded(row.get(one), most, "{:+.3f}") for one in kept]  # noqa: E731
        rows = [[text(layer), *cells(row)] for layer, row in rises.items()]
        return block(
            repr(self),
            table(["layer", *(f"{one:g}" for one in kept)], rows),
            "Rise of the loss, in nats a token, when one layer alone keeps this fraction of its parameters.",
        )


@torch.inference_mode(False)
@torch.no_grad()
def sensitivity(
    model: nn.Module,
    stats: Statistics | None,
    windows: Tensor,
    *,
    method: str = "nsvd-1",
    kept: Sequence[float] = KEPT,
    factors: str = "plain",
    prepared: Prepared | None = None,
    records: Store | None = None,
    progress: bool = False,
    **options: float,
) -> Sensitivity:
    """Measure the loss on ``windows`` with each target layer truncated alone, at each kept fraction of its parameters.

    The blocks before a layer do not run again. Each layer is decomposed once, when its turn comes, for all fractions.
    Afterwards, also when something raises, the model is what it was. A rank below what the method can do (k1 leaving two
    steps of it) is no candidate.

    Args:
        stats: moments from ``calibrate`` (not needed for ``svd``).
        windows: token ids (count, length). Few suffice: the ASVD paper takes 32 of 2048.
        factors: how they will be stored, which makes a kept fraction a rank (see ``nsvd.linalg.factors``).
        prepared: what ``prepare`` returned for this model, statistics, outer step and options, else refused.
        records: finished measurements are found there and not repeated, so an interrupted table goes on where it
            stopped; weights, statistics and windows are told apart by fingerprints.

    Raises:
        ValueError: as ``compress_``; a kept fraction outside (0, 1) or leaving rank 0; a model that cannot be run block by block.
        FloatingPointError: a loss or an activation is NaN or Inf; the layer is named.
    """
    if prepared is not None:
        check_prepared(prepared, targets(model), stats, matrix_method(method), options)
    how: dict[str, Any] = {"method": method, "kept": kept, "factors": factors, "records": records, **options}
    return measured(model, stats, windows, prepared, progress=progress, **how)


def measured(
    model: nn.Module,
    stats: Statistics | None,
    windows: Tensor,
    prepared: Mapping[str, Decomposition] | None,
    *,
    method: str,
    kept: Sequence[float] = KEPT,
    factors: str = "plain",
    records: Store | None = None,
    progress: bool = False,
    **options: float,
) -> Sensitivity:
    """``sensitivity`` with decompositions that were just made for it, and are trusted. Several processes deal the layers."""
    chosen, layers = matrix_method(method), among(model, prepared)
    settings = chosen.resolve(options)
    check_values(model)
    check_statistics(layers, stats, chosen)
    about = {} if records is None else _about(model, stats, windows, method, settings)
    about |= {"factors": factors} if factors != "plain" else {}
    check_text(model, windows)
    read, rows = Text(model, windows), []
    dense, owner = read.dense_losses(), owners(model, layers)
    for name, layer in tqdm(layers.items(), "sensitivity", disable=not progress, leave=False):
        if not is_mine(owner, name):
            continue
        decomposition = None if prepared is None else prepared[name].to(home(layer.weight))
        candidates = list(_candidates(layer, name, chosen, settings, kept, factors))
        most = max((k for _, k in candidates), default=0)
        for fraction, k in candidates:
            found = None if records is None else records.find(**about, layer=name, kept=fraction)
            if found is None:
                if decomposition is None:
                    decomposition = prepare_layer(layer, name, stats, chosen, options, k=most)
                with naming(name):
                    found = _measure(read, name, chosen.cut(decomposition, k, **settings))
                if records is not None:
                    records.add(about | {"layer": name, "kept": fraction}, found)
            rows.append({"layer": name, "kept": fraction} | found)
    place = {name: number for number, name in enumerate(layers)}
    rows = sorted((row for found in gathered(rows) for row in found), key=lambda row: place[row["layer"]])
    return Sensitivity(rows, dense)


def strs(model: nn.Module, table: Sensitivity, ratio: float, factors: str = "plain") -> dict[str, int]:
    """The ASVD paper's rank search, from its table: see ``nsvd.linalg.budget``."""
    sizes = shapes(model, dict.fromkeys(row["layer"] for row in table.rows))
    return cut(strs_steps(table.scores, sizes, factors), sizes, ratio, factors)


@torch.no_grad()
def strs_within(
    model: nn.Module,
    table: Sensitivity,
    prepared: Prepared,
    windows: Tensor,
    perplexity: float,
    *,
    method: str,
    **options: float,
) -> dict[str, int]:
    """STRS with the paper's other target: the most steps that keep the perplexity on ``windows`` at most this high.

    The model is measured about log₂(steps) times and left as it was.

    Raises:
        ValueError: if the target is out of reach, or ``prepared`` is of another outer step, other options or weights.
    """
    chosen = matrix_method(method)
    check_step(prepared, targets(model), chosen, options)

    def admissible(ranks: dict[str, int]) -> bool:
        factors = {name: chosen.cut(prepared[name], k, **options) for name, k in ranks.items()}
        return fmean(losses_with(model, factors, windows)) <= math.log(perplexity)

    return cut_where(strs_steps(table.scores, shapes(model)), admissible)


class Text:
    """Windows on their way through the dense model: what a block changes is measured from that block on.

    The hidden states of all windows before every block lie on a shelf; ``stream`` has them behind the last one.
    """

    def __init__(self, model: nn.Module, windows: Tensor):
        self.model, self.windows, self.count = model, windows, windows.numel()
        self.shelf, self.last = Shelf(), (None, [])
        with evaluating(model):
            self.decoder = Decoder(model)
            self.stream = Stream(self.decoder, [windows], batch=windows_at_once(model, windows.shape[1]), dealt=False)
            for index in range(len(self.decoder)):
                self.shelf.put(str(index), numbered(self.stream.hidden))
                self.stream.step()

    def before(self, index: int) -> Iterator[tuple[Batch, Tensor]]:
        """Every batch, and its hidden states before a block."""
        if self.last[0] != index:
            self.last = index, in_order(self.shelf.get(str(index)))
        return zip(self.stream.batches, self.last[1], strict=True)

    def losses(self, name: str | None = None) -> list[float]:
        """The loss of each window, where nothing before the block of the named layer has changed."""
        index, losses = 0 if name is None else self.decoder.index(name), []
        for item, hidden in self.before(index):
            with self.decoder.resumed(index, hidden.to(self.decoder.device)):
                losses += window_losses(self.model, item.ids).tolist()
        return losses

    def dense_losses(self) -> list[float]:
        """Those of the model as it is; raises ``FloatingPointError`` naming the layer where NaN or Inf begins."""
        try:
            return self.losses()
        except FloatingPointError:
            calibrate(self.model, self.windows)
            raise


def losses_with(model: nn.Module, factors: Mapping[str, LowRank], windows: Tensor) -> list[float]:
    """Loss of each of the ``windows`` with the named layers replaced by factors for the moment."""
    with exchanged(model, stand_ins(model, factors)):
        return window_losses(model, windows).tolist()


def stand_ins(model: nn.Module, factors: Mapping[str, LowRank]) -> dict[str, LowRankLinear]:
    layers = {name: linear_at(model, name) for name in factors}
    return {n: LowRankLinear.from_factors(layer, factors[n].to(layer.weight.dtype)) for n, layer in layers.items()}


def _measure(text: Text, name: str, value: LowRank) -> dict:
    clock = time.perf_counter()
    with exchanged(text.model, stand_ins(text.model, {name: value})):
        losses = text.losses(name)
    cost = {"tokens": text.count, "seconds": round(time.perf_counter() - clock, 4)}
    return {"rank": value.rank, "loss": fmean(losses), "losses": losses} | cost


def _candidates(
    layer: nn.Linear, name: str, method: Method, settings: dict, kept: Sequence[float], factors: str
) -> Iterator[tuple[float, int]]:
    for fraction in kept:
        with naming(name):
            if not 0 < fraction < 1:
                raise ValueError(f"kept fraction {fraction} is not in (0, 1)")
            k = rank_for_ratio(*shape_of(layer), 1 - fraction, factors)
        if k >= method.least_rank(settings):
            yield fraction, k


def _about(model: nn.Module, stats: Statistics | None, windows: Tensor, method: str, settings: dict) -> dict:
    """What a measurement is one of, for the records."""
    return {
        "measure": "sensitivity",
        "weights": fingerprint(model.parameters()),
        "statistics": stats and stats.fingerprint(),
        "windows": fingerprint([windows]),
        "method": method,
        **settings,
    }
