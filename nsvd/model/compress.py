"""Replace the linear layers of a model by low-rank ones, in place."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.linalg import Decomposition, LowRank, Method, by_name, rank_for_ratio, saves_parameters
from nsvd.linalg.errors import calibration_loss, weight_error
from nsvd.linalg.methods import check_finite
from nsvd.model.checkpoint import is_compressed, mark_compressed
from nsvd.model.layers import LowRankLinear, targets
from nsvd.model.moments import Statistics, calibrate
from nsvd.version import __version__


@dataclass(frozen=True)
class Report:
    """What ``compress_`` did. Parameters and bytes count the target layers' weights, biases left out."""

    method: str
    options: dict
    ratio: float | None  # asked
    ratio_reached: float
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    seconds: dict[str, float]  # by stage
    peak_memory: int  # bytes: of the GPU where there is one, else of the process so far
    versions: dict[str, str]
    table: pd.DataFrame  # a row a layer

    def as_dict(self) -> dict:
        """Everything but the table, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name != "table"}


@torch.no_grad()
def prepare(
    model: nn.Module, stats: Statistics | None, method: str, *, progress: bool = False, **options: float
) -> dict[str, Decomposition]:
    """The method's outer decomposition of every target layer, for all ranks at once.

    Give it to ``compress_(…, prepared=…)`` again and again: a sweep over ratios, over k1, or over methods with one outer
    step (``asvd-1``, ``nsvd-1``, ``nid-1``) decomposes each layer once. Computed in float64 on the layer's device, kept in memory.
    """
    chosen, layers = by_name(method), targets(model)
    _check_weights(layers)
    _check_statistics(layers, stats, chosen)
    bars = tqdm(layers.items(), "decompose", disable=not progress, leave=False)
    return {name: _prepare_layer(layer, name, stats, chosen, options) for name, layer in bars}


@torch.no_grad()
def compress_(
    model: nn.Module,
    stats: Statistics | None = None,
    *,
    method: str = "nsvd-1",
    ratio: float | None = None,
    ranks: Mapping[str, int] | None = None,
    windows: Tensor | None = None,
    prepared: Mapping[str, Decomposition] | None = None,
    progress: bool = False,
    **options: float,
) -> Report:
    """Replace every target layer by rank-k factors, in place, and report.

    All layers are decomposed, in float64, before the first is exchanged: when something raises, the model is unchanged.
    A layer whose factors would not be smaller than its weight stays dense and is reported so; the model's dtype is kept.

    Args:
        model: a model with ``nn.Linear`` layers.
        stats: moments from ``calibrate`` (not needed for ``svd``).
        method: a name of ``METHODS``; ``options`` are its own (``k1``, ``alpha``, ``mu``).
        ratio: fraction of the target layers' parameters to remove, in [0, 1), the same for every layer; 0 leaves all dense.
        ranks: in place of ``ratio``, the rank of each layer to compress; layers that are not named stay dense.
        windows: token ids to calibrate on when ``stats`` is not given.
        prepared: what ``prepare`` returned for this model, statistics, outer step and options.

    Raises:
        ValueError: unknown method, option or layer; ratio or k1 out of range or rounding to nothing (the layer is named);
            NaN or Inf in a weight (the layer is named); statistics that do not fit; a model compressed before.
        FloatingPointError: NaN or Inf in an activation, from ``calibrate``.
    """
    chosen, settings = by_name(method), by_name(method).resolve(options)
    if (ratio is None) == (ranks is None):
        raise ValueError("give either ratio or ranks")
    if is_compressed(model):
        raise ValueError("this model is compressed already; dequantize() it first")
    layers, clock = targets(model), _Clock()
    wanted = _uniform(layers, ratio) if ranks is None else _given(layers, ranks)
    _check_weights(layers)
    if stats is None and windows is not None and chosen.needs_moments:
        stats = calibrate(model, windows, progress=progress)
        clock.lap("calibrate")
    _check_statistics({name: layers[name] for name in wanted}, stats, chosen)

    rows, factors = [], {}
    for name, layer in tqdm(layers.items(), "compress", disable=not progress, leave=False):
        d_out, d_in, k = *layer.weight.shape, wanted.get(name)
        row = {"layer": name, "d_out": d_out, "d_in": d_in, "rank": k, "dense": True, "params": d_out * d_in}
        if k is not None and saves_parameters(d_out, d_in, k):
            one = prepared[name] if prepared is not None else _prepare_layer(layer, name, stats, chosen, options)
            clock.lap("decompose")
            with _naming(name):
                value = chosen.cut(one, k, **settings)
            factors[name] = value.to(layer.weight.dtype)
            clock.lap("cut")
            row |= {"dense": False, "params": value.n_params} | _errors(layer, value, stats, name)
            clock.lap("errors")
        rows.append(row)
    for name, value in factors.items():
        model.set_submodule(name, LowRankLinear.from_factors(layers[name], value))
    clock.lap("exchange")

    table = pd.DataFrame(rows).astype({"rank": "Int64"})
    before, after = int((table.d_out * table.d_in).sum()), int(table.params.sum())
    size = next(iter(layers.values())).weight.element_size()
    report = Report(
        method, settings, ratio, 1 - after / before, before, after, before * size, after * size,
        clock.seconds, _peak_memory(), versions(), table,
    )  # fmt: skip
    if factors:
        details = {"method": method, "options": settings, "ratio": ratio, "ratio_reached": report.ratio_reached}
        mark_compressed(model, {name: {"rank": value.rank} for name, value in factors.items()}, **details)
    return report


def versions() -> dict[str, str]:
    """Versions of what computed a number."""
    return {
        "nsvd": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _check_weights(layers: dict[str, nn.Linear]) -> None:
    for name, layer in layers.items():
        check_finite(f"the weight of layer {name}", layer.weight)


def _check_statistics(layers: dict[str, nn.Linear], stats: Statistics | None, method: Method) -> None:
    if not method.needs_moments:
        return
    if stats is None:
        raise ValueError(f"{method.label} needs statistics: pass stats= from calibrate(), or windows= to calibrate on")
    for name, layer in layers.items():
        if name not in stats:
            raise ValueError(f"the statistics hold no layer {name}; were they taken from another model?")
        if len(stats[name].G) != layer.in_features:
            raise ValueError(
                f"layer {name} has {layer.in_features} inputs, the statistics {len(stats[name].G)}; another model's?"
            )


def _uniform(layers: dict[str, nn.Linear], ratio: float) -> dict[str, int]:
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}, but the fraction of parameters removed lies in [0, 1)")
    ranks = {}
    for name, layer in layers.items() if ratio else ():
        with _naming(name):
            ranks[name] = rank_for_ratio(*layer.weight.shape, ratio)
    return ranks


def _given(layers: dict[str, nn.Linear], ranks: Mapping[str, int]) -> dict[str, int]:
    for name, k in ranks.items():
        if name not in layers:
            raise ValueError(f"no layer {name!r} to compress; the model has {', '.join(list(layers)[:3])}, …")
        if not 1 <= k <= min(layers[name].weight.shape):
            raise ValueError(f"layer {name}: rank {k} is not in 1 … {min(layers[name].weight.shape)}")
    return dict(ranks)


def _prepare_layer(
    layer: nn.Linear, name: str, stats: Statistics | None, method: Method, options: dict
) -> Decomposition:
    W, moments = layer.weight.double(), None
    if method.needs_moments:
        moments = stats[name].to(W.device)
    with _naming(name):
        return method.prepare(W, moments, **options)


def _errors(layer: nn.Linear, value: LowRank, stats: Statistics | None, name: str) -> dict[str, float]:
    """Relative errors ‖W − Ŵ‖ / ‖W‖ and ‖(W − Ŵ) X‖ / ‖W X‖."""
    W, dense = layer.weight.double(), value.dense()
    row = {"weight_error": (weight_error(W, dense) / W.square().sum().item()) ** 0.5}
    if stats is not None and name in stats:
        G = stats[name].G.to(W.device)
        whole = calibration_loss(W, torch.zeros_like(W), G)
        row["calibration_error"] = (max(calibration_loss(W, dense, G), 0.0) / whole) ** 0.5 if whole else 0.0
    return row


class _naming:
    """Add the layer's name to a ``ValueError`` or ``LinAlgError`` raised inside."""

    def __init__(self, layer: str):
        self.layer = layer

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _trace):
        if isinstance(error, ValueError | torch.linalg.LinAlgError):
            raise kind(f"layer {self.layer}: {error}") from error


class _Clock:
    """Seconds by stage."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
