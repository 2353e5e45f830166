"""Factor layers by one method and put the factors in their place: all at once, or in the order they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.linalg import Decomposition, LowRank, Method, Moments
from nsvd.linalg.factors import n_params
from nsvd.model.distill import distill_
from nsvd.model.layers import CompressedLayer, stand_in
from nsvd.model.moments import Statistics
from nsvd.model.prepare import naming, prepare_layer
from nsvd.model.refine import refine_block_
from nsvd.model.report import Clock, relative_errors
from nsvd.model.shifted import Batch, replace_in_order_

TARGET_RIDGE = 0.03  # of shifted targets, for methods without a ridge of their own: the inputs never fix a target alone
Errors = dict[str, dict[str, float]]  # relative errors by layer


@dataclass
class Exchange:
    """Factor layers by one method and put the factors in their place."""

    layers: Mapping[str, nn.Linear]
    stats: Statistics | None
    method: Method
    options: dict
    factors: str
    clock: Clock

    def cut(self, name: str, one: Decomposition, k: int) -> tuple[CompressedLayer, dict[str, float]]:
        """The stand-in of a layer, and its relative errors."""
        with naming(name):
            value: LowRank = self.method.cut(one, k, **self.options)
        new = stand_in(self.layers[name], value, self.factors)
        self.clock.lap("cut")
        errors = relative_errors(self.layers[name], value.dense(), self.stats, name)
        self.clock.lap("errors")
        return new, errors

    def at_once(
        self, model: nn.Module, ranks: Mapping[str, int], prepared: Mapping[str, Decomposition] | None, progress: bool
    ) -> Errors:
        """Every layer for the inputs of the dense model; all factored before the first is exchanged."""
        new, errors = {}, {}
        for name, k in tqdm(ranks.items(), "compress", disable=not progress, leave=False):
            layer = self.layers[name]
            have = None if prepared is None else prepared[name].to(layer.weight.device)
            one = have or prepare_layer(layer, name, self.stats, self.method, self.options)
            self.clock.lap("decompose")
            new[name], errors[name] = self.cut(name, one, k)
        for name, layer in new.items():
            model.set_submodule(name, layer)
        self.clock.lap("exchange")
        return errors

    def undo(self, model: nn.Module, names: Iterable[str]) -> None:
        """Put the layers themselves back."""
        for name in names:
            model.set_submodule(name, self.layers[name])

    def in_order(
        self, model: nn.Module, ranks: Mapping[str, int], domains: Sequence[Tensor], refine: int, progress: bool
    ) -> Errors:
        """Every layer for the inputs that the layers before it leave it, towards what the dense model has there."""
        errors: Errors = {}

        def replace(name: str, target: Tensor, moments: Moments) -> CompressedLayer:
            self.clock.lap("follow")
            H = self.gradients.get(name)
            known = dataclasses.replace(moments, H=None if H is None else H.to(target.device))
            with naming(name):
                one = self.method.prepare(target, known, **self.options)
            self.clock.lap("decompose")
            new, errors[name] = self.cut(name, one, ranks[name])
            return new

        def finish(index: int, block: nn.Module, batches: Sequence[Batch]) -> None:
            self.clock.lap("follow")
            prefix = next(name for name, module in model.named_modules() if module is block)
            inside = [name for name in self.layers if name.startswith(f"{prefix}.")]
            if not any(name in ranks for name in inside):
                return
            refine_block_(block, index, batches, self._stream_metric(inside[-1], batches[0]), steps=refine)
            self.clock.lap("refine")
            errors.update(self._errors(model, [name for name in inside if name in ranks]))

        how = {"mu": self.options.get("mu", TARGET_RIDGE), "weights": self._shares(domains)}
        how |= {"finish": finish if refine else None, "progress": progress}
        try:
            replace_in_order_(model, domains, list(ranks), replace, **how)
        except BaseException:
            self.undo(model, ranks)
            raise
        self.clock.lap("follow")
        return errors

    def distill(
        self,
        model: nn.Module,
        names: Iterable[str],
        domains: Sequence[Tensor],
        steps: int,
        seed: int,
        progress: bool,
    ) -> Errors:
        """All exchanged layers together, towards what the dense model predicts."""
        names = list(names)
        dense = {name: self.layers[name] for name in names}
        try:
            distill_(model, dense, domains, self._shares(domains), steps=steps, seed=seed, progress=progress)
        except BaseException:
            self.undo(model, names)
            raise
        self.clock.lap("distill")
        return self._errors(model, names)

    def _errors(self, model: nn.Module, names: Iterable[str]) -> Errors:
        """Relative errors of what stands in the model now."""
        errors = {}
        for name in names:
            errors[name] = relative_errors(self.layers[name], model.get_submodule(name).dense(), self.stats, name)
        self.clock.lap("errors")
        return errors

    def _shares(self, domains: Sequence[Tensor]) -> list[float]:
        return self.stats.shares(len(domains)) if self.stats else [1 / len(domains)] * len(domains)

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """H of the layers that the statistics know it of."""
        return {} if self.stats is None else self.stats.gradients

    def _stream_metric(self, last: str, item: Batch) -> Tensor | None:
        """H of the block's last layer, what the loss makes of errors there; None where it is not known, or no H of the stream."""
        H = self.gradients.get(last)
        return None if H is None or len(H) != item.ours.shape[-1] else H.to(item.ours.device, torch.float32)


def layer_table(
    layers: Mapping[str, nn.Linear],
    wanted: Mapping[str, int],
    smaller: Mapping[str, int],
    factors: str,
    errors: Mapping[str, dict],
) -> pd.DataFrame:
    """A row a layer for the report."""
    rows = []
    for name, layer in layers.items():
        d_out, d_in = layer.weight.shape
        params = n_params(d_out, d_in, smaller[name], factors) if name in smaller else d_out * d_in
        row = {"layer": name, "d_out": d_out, "d_in": d_in, "rank": wanted.get(name), "dense": name not in smaller}
        rows.append(row | {"params": params} | errors.get(name, {}))
    return pd.DataFrame(rows).astype({"rank": "Int64"})
