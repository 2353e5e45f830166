"""A model to look around in: statistics are taken once, and every question about a layer is answered from them at once.

Each answer is a plain call that returns a table; ``figure`` draws them together, ``panel`` puts sliders before the figure.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from functools import cached_property, lru_cache
from html import escape
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from torch import Tensor
from transformers import PreTrainedModel

from nsvd.compression.compress import compress_
from nsvd.lab.analysis import place
from nsvd.lab.corpora import windows
from nsvd.lab.figures import PALETTE, log_scale
from nsvd.lab.models import load
from nsvd.linalg import Decomposition, LowRank, matrix_method, rank_for_ratio
from nsvd.linalg.errors import calibration_loss, weight_error
from nsvd.linalg.methods import Method
from nsvd.linalg.precision import double
from nsvd.walk.calibrate import calibrate
from nsvd.walk.gradients import fisher
from nsvd.walk.targets import targets

if TYPE_CHECKING:
    import ipywidgets as widgets

METRICS = ("svd", "asvd-0", "asvd-1", "ridge", "kfac")  # methods whose outer step is one decomposition in one metric
SPLITS = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
MUS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
POINTS = 16  # ranks on a curve


class Bench:
    """A model with its statistics at home and away.

    Args:
        model: embedded name, folder, .gguf file or hub id.
        home: corpus that the statistics of the methods come from.
        away: corpus that errors are measured on as well.
        count, length: windows of either text, and their tokens.

    Raises:
        ValueError, OSError: as ``nsvd.load``, ``nsvd.windows`` and ``nsvd.calibrate``.
    """

    def __init__(self, model: str, home: str, away: str, *, count: int = 32, length: int = 128, seed: int = 0):
        self.name, self.home, self.away = model, home, away
        self.model, self.tokenizer = load(model, dtype="float32")
        how: dict[str, Any] = {"length": length, "count": count, "seed": seed}
        texts = [
            windows(name, self.tokenizer, split=split, **how) for name, split in ((home, "calibration"), (away, "test"))
        ]
        stats, self.elsewhere = (calibrate(self.model, ids) for ids in texts)
        self.stats = stats.with_gradients(fisher(self.model, texts[0], seed=seed))
        self.layers = targets(self.model)
        self.compressed = lru_cache(maxsize=4)(self._compressed)
        self._drawn_errors, self._drawn_shares = lru_cache(maxsize=64)(self.errors), lru_cache(maxsize=64)(self.shares)
        self._whole = lru_cache(maxsize=None)(lambda layer: self._squares(layer, torch.zeros_like(self._weight(layer))))
        self._prepared: dict[tuple, Decomposition] = {}

    def spectrum(self, layer: str, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
        """The share of the squared error that is left at every rank, a column a metric, a row a rank from 0 on."""
        columns = {}
        for name in metrics:
            squares = self._decomposition(layer, name).s.square()
            left = squares.sum() - torch.cat([squares.new_zeros(1), squares.cumsum(0)])
            columns[name] = (left.clamp(min=0) / squares.sum()).tolist()
        return pd.DataFrame({name: pd.Series(values) for name, values in columns.items()}).rename_axis("rank")

    def errors(self, layer: str, method: str = "nsvd-1", k1: float = 0.95) -> pd.DataFrame:
        """Relative output errors ‖(W − Ŵ) X‖ / ‖W X‖ ``home`` and ``away``, and ``weight``, a row a rank."""
        chosen, (W, one) = matrix_method(method), (self._weight(layer), self._decomposition(layer, method))
        options = {"k1": k1} if "k1" in chosen.options else {}
        most, least = min(W.shape) - 1, chosen.least_rank(options)
        ranks = sorted({round(least + (most - least) * i / (POINTS - 1)) for i in range(POINTS)})
        rows = [{"rank": k} | self._errors(layer, chosen.cut(one, k, **options)) for k in ranks]
        return pd.DataFrame(rows).set_index("rank")

    def pareto(self, layer: str, ratio: float) -> pd.DataFrame:
        """Calibration loss against weight error at the rank of a ratio: NSVD-I by its split, the ridge by its μ."""
        k, rows = self._rank(layer, ratio), []
        nested, ridge, one = matrix_method("nsvd-1"), matrix_method("ridge"), self._decomposition(layer, "nsvd-1")
        for k1 in SPLITS:
            if round(k1 * k) not in (0, k) or k1 in (0, 1):
                rows.append({"method": "nsvd-1", "at": k1} | self._errors(layer, nested.cut(one, k, k1=k1)))
        for mu in MUS:
            value = ridge.cut(self._decomposition(layer, "ridge", mu=mu), k)
            rows.append({"method": "ridge", "at": mu} | self._errors(layer, value))
        return pd.DataFrame(rows)

    def shares(self, method: str = "asvd-1", ratio: float = 0.3, k1: float = 0.95) -> pd.DataFrame:
        """By layer, the rise of the loss that its truncation is predicted to cost, in nats a token, and its share of all."""
        chosen, rows = matrix_method(method), []
        options = {"k1": k1} if "k1" in chosen.options else {}
        for layer in self.layers:
            W = self._weight(layer)
            k = max(self._rank(layer, ratio), chosen.least_rank(options))
            E = W - chosen.cut(self._decomposition(layer, method), k, **options).dense()
            moments = self.stats[layer]
            rows.append(
                place(layer) | {"rise": 0.5 * ((moments.slopes().to(E) @ E @ moments.G.to(E)) * E).sum().item()}
            )
        frame = pd.DataFrame(rows)
        return frame.assign(share=frame.rise / frame.rise.sum())

    def continued(
        self, prompt: str, method: str = "best", ratio: float = 0.3, k1: float = 0.95, new: int = 30
    ) -> pd.Series:
        """What the dense and the compressed model make of a prompt, most likely token by token.

        A model that was not asked for before is compressed first; the last four are kept.

        Raises:
            ValueError: the prompt has no token; and as ``compress_``.
        """
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        if not ids.numel():
            raise ValueError("the prompt has no token to continue from")
        told = {}
        for name, one in (
            ("dense", self.model),
            (f"{method}, {ratio:.0%} removed", self.compressed(method, ratio, k1)),
        ):
            here, pad = ids.to(one.device), self.tokenizer.pad_token_id
            pad = self.tokenizer.eos_token_id if pad is None else pad
            how = {"attention_mask": torch.ones_like(here), "max_new_tokens": new, "do_sample": False}
            generate: Any = one.generate  # of a class that transformers mixes in
            out = generate(here, pad_token_id=pad, **how)
            told[name] = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return pd.Series(told, name=prompt)

    def figure(self, layer: str, *, method: str = "nsvd-1", k1: float = 0.95, ratio: float = 0.3) -> Figure:
        """Four panels: the layer's spectra, its errors at home and away, its trade of two errors, its share of the loss."""
        figure, axes = plt.subplots(
            1, 4, figsize=(14, 3.2), layout="none"
        )  # a layout that is searched for takes longest of all
        figure.subplots_adjust(left=0.06, right=0.99, bottom=0.17, top=0.9, wspace=0.28)
        k = self._rank(layer, ratio)
        for name, column in self.spectrum(layer).items():
            axes[0].plot(
                column.index,
                column.clip(lower=1e-4),
                label=matrix_method(str(name)).label,
                color=PALETTE.get(str(name)),
            )
        log_scale(axes[0], "y", subs=(1,))
        axes[0].minorticks_off()  # hundreds of ticks without a label take as long as everything else
        axes[0].set(xlabel="rank", ylabel="share of squared error left")
        for name, column in self._drawn_errors(layer, method, k1).items():
            axes[1].plot(column.index, column, label=name)
        axes[1].set(xlabel="rank", ylabel="relative error")
        for axis in axes[:2]:
            axis.axvline(k, color="black", lw=0.8)
            axis.legend(fontsize=7)
        for name, part in self.pareto(layer, ratio).groupby("method", sort=False):
            axes[2].plot(
                part.home, part.weight, marker=".", label=matrix_method(str(name)).label, color=PALETTE[str(name)]
            )
        axes[2].set(xlabel="error at home", ylabel="error of the weight")
        axes[2].legend(fontsize=7)
        shares = self._drawn_shares(method, ratio, k1)
        colors = [PALETTE["nsvd-1"] if name == layer else "#bbbbbb" for name in shares.layer]
        axes[3].vlines(range(len(shares)), 0, 100 * shares.share, colors=colors, lw=3)
        axes[3].set_ylim(bottom=0)
        axes[3].set(xlabel="layer, in the order they run", ylabel="share of the loss, %")
        trade, errors = f"the trade, {ratio:.0%} removed", f"errors of {matrix_method(method).label}"
        for axis, title in zip(axes, ("spectrum", errors, trade, "where the loss is"), strict=True):
            axis.set_title(title, y=1.0)  # a place that is searched for takes a third of the drawing
        return figure

    def picture(self, layer: str, *, method: str = "nsvd-1", k1: float = 0.95, ratio: float = 0.3) -> bytes:
        """``figure`` as a PNG file, in half the time that ``savefig`` takes: it is drawn once, nothing is laid out anew."""
        figure, file = self.figure(layer, method=method, k1=k1, ratio=ratio), io.BytesIO()
        FigureCanvasAgg(figure).print_png(file)
        plt.close(figure)
        return file.getvalue()

    def _errors(self, layer: str, value: LowRank) -> dict[str, float]:
        square, whole = self._squares(layer, value.dense()), self._whole(layer)
        return {name: (max(square[name], 0.0) / whole[name]) ** 0.5 for name in square}

    def _squares(self, layer: str, dense: Tensor) -> dict[str, float]:
        W = self._weight(layer)
        texts = {"home": self.stats, "away": self.elsewhere}
        found = {name: calibration_loss(W, dense, stats[layer].G.to(W)) for name, stats in texts.items()}
        return found | {"weight": weight_error(W, dense)}

    def _weight(self, layer: str) -> Tensor:
        if layer not in self.layers:
            raise ValueError(f"no layer {layer!r} to look at; the model has {', '.join(list(self.layers)[:3])}, …")
        return self._weights[layer]

    def _rank(self, layer: str, ratio: float) -> int:
        d_out, d_in = self._weight(layer).shape
        return rank_for_ratio(d_out, d_in, ratio)

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return {name: double(layer.weight.detach().cpu()) for name, layer in self.layers.items()}

    def _decomposition(self, layer: str, method: str, **options: Any) -> Decomposition:
        W, chosen = self._weight(layer), matrix_method(method)
        key = (layer, str(chosen.outer_step(options)))
        if key not in self._prepared:
            self._prepared[key] = chosen.prepare(W, self.stats[layer].to(W), **options)
        return self._prepared[key]

    def _compressed(self, method: str, ratio: float, k1: float) -> PreTrainedModel:
        changed = copy.deepcopy(self.model)
        options: dict[str, Any] = (
            {"k1": k1} if isinstance(known := _known(method), Method) and "k1" in known.options else {}
        )
        compress_(changed, None if method == "best" else self.stats, method=method, ratio=ratio, **options)
        return changed


def _known(method: str) -> Method | None:
    return None if method == "best" else matrix_method(method)


def whole_text(told: pd.Series) -> Styler:
    """A series of texts as a table that shows them whole, line by line."""
    return told.to_frame("continued").style.set_properties(**{"white-space": "pre-wrap", "text-align": "left"})


def panel(bench: Bench, prompt: str = "The") -> widgets.VBox:
    """Sliders and menus for layer, method, k1 and ratio before the figure, and a prompt with both its continuations.

    The figure follows every change; a model is compressed only on a click, and the button says so while that takes.
    """
    import ipywidgets as widgets

    layer = widgets.Dropdown(options=list(bench.layers), description="layer")
    method = widgets.Dropdown(
        options=["svd", "asvd-0", "asvd-1", "nsvd-1", "ridge", "kfac"], value="nsvd-1", description="method"
    )
    k1 = widgets.FloatSlider(value=0.9, min=0.5, max=1.0, step=0.05, description="k1 / k", continuous_update=False)
    ratio = widgets.FloatSlider(value=0.3, min=0.1, max=0.8, step=0.05, description="removed", continuous_update=False)
    words, go = widgets.Text(value=prompt, description="prompt"), widgets.Button(description="compress, continue")
    # Values, not an Output: nbclient answers captured output on the socket where it waits for the cell's end, and may miss that.
    shown, told = widgets.Image(format="png"), widgets.HTML()

    def draw(_change=None) -> None:
        shown.value = bench.picture(str(layer.value), method=str(method.value), k1=k1.value, ratio=ratio.value)

    def compress(_button) -> None:
        go.disabled, go.description = True, "compressing …"
        try:
            told.value = whole_text(bench.continued(words.value, str(method.value), ratio.value, k1.value)).to_html()
        except (ValueError, ArithmeticError) as error:
            told.value = f"<b>{escape(str(error))}</b>"
        finally:
            go.disabled, go.description = False, "compress, continue"

    for control in (layer, method, k1, ratio):
        control.observe(draw, "value")
    go.on_click(compress)
    draw()
    controls = [widgets.HBox([layer, method]), widgets.HBox([k1, ratio])]
    return widgets.VBox([*controls, shown, widgets.HBox([words, go]), told])
