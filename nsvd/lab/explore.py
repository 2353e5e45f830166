"""A model to look around in: statistics are taken once, and every question about a layer is answered from them at once.

Each answer is a plain call that returns a table; ``figure`` draws them together, ``panel`` puts sliders before the figure.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property, lru_cache

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from nsvd.compression.compress import compress_
from nsvd.lab.analysis import place
from nsvd.lab.corpora import windows
from nsvd.lab.figures import PALETTE
from nsvd.lab.models import load
from nsvd.linalg import Decomposition, LowRank, matrix_method, rank_for_ratio
from nsvd.linalg.errors import calibration_loss, weight_error
from nsvd.linalg.methods import Method
from nsvd.linalg.precision import double
from nsvd.walk.calibrate import calibrate
from nsvd.walk.gradients import fisher
from nsvd.walk.targets import targets

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
        how = {"length": length, "count": count, "seed": seed}
        texts = [
            windows(name, self.tokenizer, split=split, **how) for name, split in ((home, "calibration"), (away, "test"))
        ]
        stats, self.elsewhere = (calibrate(self.model, ids) for ids in texts)
        self.stats = stats.with_gradients(fisher(self.model, texts[0], seed=seed))
        self.layers = targets(self.model)
        self.compressed = lru_cache(maxsize=4)(self._compressed)
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
        k, rows = rank_for_ratio(*self._weight(layer).shape, ratio), []
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
            k = max(rank_for_ratio(*W.shape, ratio), chosen.least_rank(options))
            E = W - chosen.cut(self._decomposition(layer, method), k, **options).dense()
            moments = self.stats[layer]
            rows.append(place(layer) | {"rise": 0.5 * ((moments.H.to(E) @ E @ moments.G.to(E)) * E).sum().item()})
        frame = pd.DataFrame(rows)
        return frame.assign(share=frame.rise / frame.rise.sum())

    def continued(
        self, prompt: str, method: str = "best", ratio: float = 0.3, k1: float = 0.95, new: int = 30
    ) -> pd.Series:
        """What the dense and the compressed model make of a prompt, most likely token by token.

        A model that was not asked for before is compressed first; the last four are kept.
        """
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        told = {}
        for name, one in (
            ("dense", self.model),
            (f"{method}, {ratio:.0%} removed", self.compressed(method, ratio, k1)),
        ):
            here, pad = ids.to(one.device), self.tokenizer.pad_token_id
            pad = self.tokenizer.eos_token_id if pad is None else pad
            how = {"attention_mask": torch.ones_like(here), "max_new_tokens": new, "do_sample": False}
            out = one.generate(here, pad_token_id=pad, **how)
            told[name] = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return pd.Series(told, name=prompt)

    def figure(self, layer: str, *, method: str = "nsvd-1", k1: float = 0.95, ratio: float = 0.3) -> Figure:
        """Four panels: the layer's spectra, its errors at home and away, its trade of two errors, its share of the loss."""
        figure, axes = plt.subplots(
            1, 4, figsize=(14, 3.2), layout="none"
        )  # a layout that is searched for takes longest of all
        figure.subplots_adjust(left=0.05, right=0.99, bottom=0.17, top=0.9, wspace=0.28)
        k = rank_for_ratio(*self._weight(layer).shape, ratio)
        for name, column in self.spectrum(layer).items():
            axes[0].plot(
                column.index, column.clip(lower=1e-6), label=matrix_method(name).label, color=PALETTE.get(name)
            )
        axes[0].set(yscale="log", xlabel="rank", ylabel="share of squared error left", title="spectrum")
        axes[0].minorticks_off()  # hundreds of ticks without a label take as long as everything else
        for name, column in self.errors(layer, method, k1).items():
            axes[1].plot(column.index, column, label=name)
        axes[1].set(xlabel="rank", ylabel="relative error", title=f"errors of {matrix_method(method).label}")
        for axis in axes[:2]:
            axis.axvline(k, color="black", lw=0.8)
            axis.legend(fontsize=7)
        for name, part in self.pareto(layer, ratio).groupby("method", sort=False):
            axes[2].plot(part.home, part.weight, marker=".", label=matrix_method(name).label, color=PALETTE[name])
        axes[2].set(xlabel="error at home", ylabel="error of the weight", title=f"the trade, {ratio:.0%} removed")
        axes[2].legend(fontsize=7)
        shares = self.shares(method, ratio, k1)
        colors = [PALETTE["nsvd-1"] if name == layer else "#bbbbbb" for name in shares.layer]
        axes[3].bar(range(len(shares)), 100 * shares.share, color=colors)
        axes[3].set(xlabel="layer, in the order they run", ylabel="share of the loss, %", title="where the loss is")
        return figure

    def _errors(self, layer: str, value: LowRank) -> dict[str, float]:
        W, dense = self._weight(layer), value.dense()
        nothing, found = torch.zeros_like(W), {}
        for name, stats in (("home", self.stats), ("away", self.elsewhere)):
            G = stats[layer].G.to(W)
            found[name] = (max(calibration_loss(W, dense, G), 0.0) / calibration_loss(W, nothing, G)) ** 0.5
        return found | {"weight": (weight_error(W, dense) / weight_error(W, nothing)) ** 0.5}

    def _weight(self, layer: str) -> Tensor:
        if layer not in self.layers:
            raise ValueError(f"no layer {layer!r} to look at; the model has {', '.join(list(self.layers)[:3])}, …")
        return self._weights[layer]

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return {name: double(layer.weight.detach().cpu()) for name, layer in self.layers.items()}

    def _decomposition(self, layer: str, method: str, **options: float) -> Decomposition:
        W, chosen = self._weight(layer), matrix_method(method)
        key = (layer, str(chosen.outer_step(options)))
        if key not in self._prepared:
            self._prepared[key] = chosen.prepare(W, self.stats[layer].to(W), **options)
        return self._prepared[key]

    def _compressed(self, method: str, ratio: float, k1: float):
        changed = copy.deepcopy(self.model)
        options = {"k1": k1} if isinstance(known := _known(method), Method) and "k1" in known.options else {}
        compress_(changed, None if method == "best" else self.stats, method=method, ratio=ratio, **options)
        return changed


def _known(method: str) -> Method | None:
    return None if method == "best" else matrix_method(method)


def panel(bench: Bench, prompt: str = "The"):
    """Sliders and menus for layer, method, k1 and ratio before the figure, and a prompt with both its continuations.

    The figure follows every change; a model is compressed only on a click, with a bar while that takes.
    """
    import ipywidgets as widgets
    from IPython.display import display

    layer = widgets.Dropdown(options=list(bench.layers), description="layer")
    method = widgets.Dropdown(
        options=["svd", "asvd-0", "asvd-1", "nsvd-1", "ridge", "kfac"], value="nsvd-1", description="method"
    )
    k1 = widgets.FloatSlider(value=0.9, min=0.5, max=1.0, step=0.05, description="k1 / k", continuous_update=False)
    ratio = widgets.FloatSlider(value=0.3, min=0.1, max=0.8, step=0.05, description="removed", continuous_update=False)
    words, go = widgets.Text(value=prompt, description="prompt"), widgets.Button(description="compress, continue")
    bar, told = widgets.IntProgress(max=1, layout=widgets.Layout(visibility="hidden")), widgets.Output()

    def draw(layer: str, method: str, k1: float, ratio: float) -> None:
        figure = bench.figure(layer, method=method, k1=k1, ratio=ratio)
        display(figure)
        plt.close(figure)

    def compress(_button) -> None:
        bar.layout.visibility, go.disabled = "visible", True
        told.clear_output()
        try:
            with told:
                display(bench.continued(words.value, method.value, ratio.value, k1.value).to_frame("continued"))
        finally:
            bar.layout.visibility, go.disabled = "hidden", False

    go.on_click(compress)
    shown = widgets.interactive_output(draw, {"layer": layer, "method": method, "k1": k1, "ratio": ratio})
    controls = [widgets.HBox([layer, method]), widgets.HBox([k1, ratio])]
    return widgets.VBox([*controls, shown, widgets.HBox([words, go, bar]), told])
