"""Find the ranks of a model's layers where they are not known, and exchange the layers for their factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from nsvd.linalg import Decomposition, saves_parameters
from nsvd.model.allocation import searched
from nsvd.model.arguments import Arguments
from nsvd.model.exchange import Exchange, layer_table
from nsvd.model.moments import Statistics
from nsvd.model.prepare import check_gradients, mean_gradients, prepare
from nsvd.model.recipes import recipe
from nsvd.model.report import Clock


class Result(NamedTuple):
    """What was exchanged, by whichever way."""

    table: pd.DataFrame  # a row a layer
    changed: list[str]  # layers that are compressed now
    moves: list | tuple = ()  # of SoLA's search
    tokens: int = 0  # that went through the model to find the ranks


@dataclass
class WholeLayers:
    """One call of ``compress_`` by a method that factors whole layers."""

    model: nn.Module
    layers: Mapping[str, nn.Linear]
    ask: Arguments
    clock: Clock
    tokens: int = field(default=0, init=False)  # that went through the model to find the ranks

    def run(
        self, stats: Statistics | None, ranks: Mapping[str, int] | None, prepared: Mapping[str, Decomposition] | None
    ) -> Result:
        """Exchange every layer that becomes smaller, for ranks that are given or found."""
        ask, model = self.ask, self.model
        if ranks is None:
            ranks, prepared = self._search(stats, prepared)
            if ask.shifted and ask.method.needs_gradients:
                stats = self._both_ends(stats, ranks, prepared)
                prepared = None  # of a large model a great deal of memory
                ranks, prepared = self._search(stats, None)
        smaller, job = self._smaller(ranks), self._exchange(stats)
        if ask.shifted:
            prepared = None
            errors = job.in_order(model, smaller, ask.domains, ask.refine, ask.progress)
        else:
            errors = job.at_once(model, smaller, prepared, ask.progress)
        if ask.distill:
            errors = job.distill(model, smaller, ask.domains, ask.distill, ask.seed, ask.progress)
        return Result(layer_table(self.layers, ranks, smaller, ask.factors, errors), list(smaller), tokens=self.tokens)

    def _exchange(self, stats: Statistics | None) -> Exchange:
        ask = self.ask
        return Exchange(self.layers, stats, ask.method, ask.method.resolve(ask.options), ask.factors, self.clock)

    def _smaller(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """The ranks of those layers that are worth exchanging."""
        shapes = {name: self.layers[name].weight.shape for name in ranks}
        return {name: k for name, k in ranks.items() if saves_parameters(*shapes[name], k, self.ask.factors)}

    def _search(
        self, stats: Statistics | None, prepared: Mapping[str, Decomposition] | None
    ) -> tuple[dict[str, int], Mapping[str, Decomposition]]:
        """Ranks, and the decompositions that they come from."""
        ask = self.ask
        how = {"method": recipe(ask.name).method, "progress": ask.progress, **ask.options}
        if ask.allocation == "fisher":
            check_gradients(self.layers, stats, "allocation 'fisher'")
        if prepared is None:
            prepared = prepare(self.model, stats, **how)
            self.clock.lap("decompose")
        text = torch.cat([ids[: ask.search_count] for ids in ask.domains]) if ask.allocation == "strs" else None
        how |= {"factors": ask.factors}
        ranks, tokens = searched(self.model, stats, prepared, ask.ratio, ask.allocation, text, **how)
        self.tokens = tokens
        self.clock.lap("search")
        return ranks, prepared

    def _both_ends(
        self, stats: Statistics, ranks: Mapping[str, int], prepared: Mapping[str, Decomposition]
    ) -> Statistics:
        """The statistics, their gradients averaged with those of the model compressed without following the inputs.

        The loss bends differently at the two ends of the way from the dense to the compressed model: the mean is the
        trapezoid rule.
        """
        ask, model, known, smaller = self.ask, self.model, stats.gradients, self._smaller(ranks)
        how = {"layers": known, "diagonal": next(iter(known.values())).ndim == 1}
        how |= {"seed": ask.seed, "progress": ask.progress}
        job = self._exchange(stats)
        try:
            job.at_once(model, smaller, prepared, ask.progress)
            there = mean_gradients(model, ask.domains, stats.shares(len(ask.domains)), others=True, **how)
        finally:
            job.undo(model, smaller)
        self.clock.lap("gradients")
        return stats.with_gradients({name: there[name].add_(H.to(there[name])).div_(2) for name, H in known.items()})
