"""Factor layers by one method and put the factors in their place: all at once, or in the order they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.compression.distill import distill_
from nsvd.compression.measure import naming, prepare_layer
from nsvd.compression.ordered import Batch, replace_in_order_
from nsvd.compression.refine import refine_block_
from nsvd.compression.report import Clock, relative_errors
from nsvd.compression.request import Arguments
from nsvd.linalg import Decomposition, LowRank, Moments, saves_parameters
from nsvd.linalg.factors import n_params
from nsvd.linalg.precision import home
from nsvd.stored.layers import CompressedLayer, stand_in
from nsvd.walk.moments import Statistics
from nsvd.walk.walked import Walked

TARGET_RIDGE = 0.03  # of shifted targets, for methods without a ridge of their own: the inputs never fix a target alone


@dataclass
class Exchange:
    """Factor layers of a model as the arguments of ``compress_`` ask, and put the factors in their place."""

    model: nn.Module
    layers: Mapping[str, nn.Linear]  # dense, all that could be exchanged
    stats: Statistics | None
    ask: Arguments
    clock: Clock
    errors: dict[str, dict[str, float]] = field(default_factory=dict, init=False)  # relative ones, by layer

    def __post_init__(self) -> None:
        self.options = self.ask.method.resolve(self.ask.options)

    def smaller(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """The ranks of those layers that are worth exchanging."""
        shapes = {name: self.layers[name].weight.shape for name in ranks}
        return {name: k for name, k in ranks.items() if saves_parameters(*shapes[name], k, self.ask.factors)}

    def at_once(self, ranks: Mapping[str, int], prepared: Mapping[str, Decomposition] | None) -> None:
        """Every layer for the inputs of the dense model; all factored before the first is exchanged."""
        new = {}
        for name, k in tqdm(ranks.items(), "compress", disable=not self.ask.progress, leave=False):
            layer = self.layers[name]
            if isinstance(self.stats, Walked):
                self.stats[name]  # takes them, where the layer is the first of its block
                self.clock.lap("calibrate")
            have = None if prepared is None else prepared[name].to(home(layer.weight))
            one = have or prepare_layer(layer, name, self.stats, self.ask.method, self.options)
            self.clock.lap("decompose")
            new[name] = self._cut(name, one, k)
        for name, layer in new.items():
            self.model.set_submodule(name, layer)
        self.clock.lap("exchange")

    def in_order(self, ranks: Mapping[str, int]) -> None:
        """Every layer for the inputs that the layers before it leave it, towards what the dense model has there."""
        ask = self.ask

        def replace(name: str, target: Tensor, moments: Moments) -> CompressedLayer:
            self.clock.lap("follow")
            H = self._gradients.get(name)
            known = dataclasses.replace(moments, H=None if H is None else H.to(target.device))
            with naming(name):
                one = ask.method.prepare(target, known, **self.options)
            self.clock.lap("decompose")
            return self._cut(name, one, ranks[name])

        def finish(index: int, block: nn.Module, batches: Sequence[Batch]) -> None:
            self.clock.lap("follow")
            prefix = next(name for name, module in self.model.named_modules() if module is block)
            inside = [name for name in self.layers if name.startswith(f"{prefix}.")]
            if not any(name in ranks for name in inside):
                return
            H = self._stream_metric(inside[-1], batches[0])
            refine_block_(block, index, batches, H, steps=ask.refine, seed=ask.seed)
            self.clock.lap("refine")
            self._measure(name for name in inside if name in ranks)

        how = {"mu": self.options.get("mu", TARGET_RIDGE), "weights": self._shares(), "progress": ask.progress}
        how |= {"finish": finish if ask.refine else None}
        replace_in_order_(self.model, ask.domains, list(ranks), replace, **how)
        self.clock.lap("follow")

    def distill(self, names: Sequence[str]) -> list[float]:
        """All exchanged layers together, towards what the dense model predicts; the loss at every step."""
        ask, dense = self.ask, {name: self.layers[name] for name in names}
        how = {"steps": ask.distill, "seed": ask.seed, "progress": ask.progress}
        losses = distill_(self.model, dense, ask.domains, self._shares(), **how)
        self.clock.lap("distill")
        self._measure(names)
        return losses

    def undo(self, names: Iterable[str]) -> None:
        """Put the layers themselves back."""
        for name in names:
            self.model.set_submodule(name, self.layers[name])

    def table(self, wanted: Mapping[str, int], smaller: Mapping[str, int]) -> pd.DataFrame:
        """A row a layer for the report."""
        rows = []
        for name, layer in self.layers.items():
            d_out, d_in = layer.weight.shape
            params = n_params(d_out, d_in, smaller[name], self.ask.factors) if name in smaller else d_out * d_in
            row = {"layer": name, "d_out": d_out, "d_in": d_in, "rank": wanted.get(name), "dense": name not in smaller}
            rows.append(row | {"params": params} | self.errors.get(name, {}))
        return pd.DataFrame(rows).astype({"rank": "Int64"})

    def _cut(self, name: str, one: Decomposition, k: int) -> CompressedLayer:
        """The stand-in of a layer; its errors are noted."""
        with naming(name):
            value: LowRank = self.ask.method.cut(one, k, **self.options)
            new = stand_in(self.layers[name], value, self.ask.factors)
        self.clock.lap("cut")
        self.errors[name] = relative_errors(self.layers[name], value.dense(), self.stats, name)
        self.clock.lap("errors")
        return new

    def _measure(self, names: Iterable[str]) -> None:
        """Note the errors of what stands in the model now."""
        for name in names:
            now = self.model.get_submodule(name).dense()
            self.errors[name] = relative_errors(self.layers[name], now, self.stats, name)
        self.clock.lap("errors")

    def _shares(self) -> list[float]:
        count = len(self.ask.domains)
        return self.stats.shares(count) if self.stats else [1 / count] * count

    @property
    def _gradients(self) -> Mapping[str, Tensor]:
        """H of the layers that the statistics know it of."""
        return {} if self.stats is None else self.stats.gradients

    def _stream_metric(self, last: str, item: Batch) -> Tensor | None:
        """H of the block's last layer, what the loss makes of errors there; None where it is not known, or no H of the stream."""
        H = self._gradients.get(last)
        return None if H is None or len(H) != item.ours.shape[-1] else H.to(item.ours.device, torch.float32)
