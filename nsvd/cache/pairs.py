r"""Keys and values of an attention layer, factored apart or with one latent for both, and the ranks that they get.

A matrix of rank r has lost Σ_{i>r} s_i² in the method's metric. Units u, by which s is multiplied, make the losses of several
matrices one quantity: 1 / ‖W S‖ gives relative errors. The model's loss is predicted to rise by ½ Σ_{i>r} s_i², in nats a token,
for ``kfac`` as it is, for other metrics with u = √mean(diag H). One latent for both is the decomposition of [u_k W_k; u_v W_v].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from nsvd.linalg import Decomposition, LowRank, Method, Moments
from nsvd.linalg.asvd import ridged

ZERO = "keys or values are zero"


@dataclass(frozen=True)
class Pair:
    """The decompositions of a layer's keys and values, one of each, or one of both stacked."""

    ones: list[Decomposition]
    units: tuple[float, float]
    rows: tuple[int, int]  # of W_k and W_v

    @property
    def spectra(self) -> list[Tensor]:
        """Singular values in the common unit, of each decomposition."""
        if len(self.ones) == 1:
            return [self.ones[0].s]
        return [unit * one.s for unit, one in zip(self.units, self.ones, strict=True)]

    def to(self, device: str | torch.device) -> Pair:
        """Moved as ``Tensor.to`` does."""
        return replace(self, ones=[one.to(device) for one in self.ones])


@dataclass(frozen=True)
class Factoring:
    """How the pairs are factored."""

    method: Method
    options: dict
    joint: bool
    by_loss: bool  # units of the model's loss, also where the method is not ``kfac``

    @property
    def needs_moments(self) -> bool:
        return self.by_loss or self.method.needs_moments

    def prepare(self, weights: Sequence[Tensor], moments: Sequence[Moments | None]) -> Pair:
        """All ranks of one pair, for W_k and W_v with their moments."""
        both, (W_k, W_v) = list(zip(weights, moments, strict=True)), weights
        rows, known = (len(W_k), len(W_v)), cast(Sequence[Moments], moments)  # None where nothing is asked of them
        if self.joint and self.method.needs_gradients:
            H = [ridged(_matrix(m.slopes()), self.options["eta"], "eta") for m in known]
            options: dict[str, Any] = {**self.options, "eta": 0.0}
            one = self.method.prepare(torch.cat([W_k, W_v]), replace(known[0], H=torch.block_diag(*H)), **options)
            return Pair([one], (1.0, 1.0), rows)
        if self.joint and self.by_loss:
            u_k, u_v = (_root_mean(m.slopes()) for m in known)
        else:
            k = 0 if self.joint else None  # joint they only tell the units
            ones = [self.method.prepare(W, m, k=k, **self.options) for W, m in both]
            u_k, u_v = (self._unit(one, m) for one, (_, m) in zip(ones, both, strict=True))
        if self.joint:
            stacked = torch.cat([u_k * W_k, u_v * W_v])
            ones = [self.method.prepare(stacked, moments[0], **self.options)]
        return Pair(ones, (u_k, u_v), rows)

    def _unit(self, one: Decomposition, moments: Moments | None) -> float:
        if self.method.needs_gradients:
            return 1.0
        if self.by_loss:
            return _root_mean(cast(Moments, moments).slopes())
        norm = one.s.norm().item()
        if not norm:
            raise ValueError(ZERO)
        return 1 / norm

    def within(self, pair: Pair, share: int) -> list[int]:
        """Ranks of one pair's decompositions that add up to its share."""
        return share_out(pair.spectra, share, least=self.method.least_rank(self.options))

    def over_all(self, pairs: Mapping[str, Pair], share: int) -> dict[str, list[int]]:
        """Ranks of every pair's decompositions that add up to the share of all."""
        spectra = [s for pair in pairs.values() for s in pair.spectra]
        ranks = iter(share_out(spectra, share, least=self.method.least_rank(self.options)))
        return {name: [next(ranks) for _ in pair.ones] for name, pair in pairs.items()}

    def cut(self, pair: Pair, ranks: Sequence[int]) -> tuple[LowRank, LowRank]:
        """Factors of W_k and W_v at these ranks, one for each decomposition of the pair; joint they share ``right``."""
        values = [self.method.cut(one, k, **self.options) for one, k in zip(pair.ones, ranks, strict=True)]
        if len(values) == 2:
            return values[0], values[1]
        left_k, left_v = (left / u for left, u in zip(values[0].left.split(pair.rows), pair.units, strict=True))
        return LowRank(left_k, values[0].right), LowRank(left_v, values[0].right)


def share_out(spectra: Sequence[Tensor], share: int, *, least: int = 1) -> list[int]:
    """Ranks, each at least ``least``, that add up to share (or all there is) and lose least: the largest s of all are kept."""
    share = min(share, sum(len(s) for s in spectra))
    free = share - least * len(spectra)
    if free < 0:
        raise ValueError(f"{share} numbers a token leave keys and values less than rank {least} each")
    rest = [s[least:].cpu() for s in spectra]
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(rest)])
    kept = owner[torch.cat(rest).argsort(descending=True, stable=True)[:free]]
    return [least + count for count in torch.bincount(kept, minlength=len(spectra)).tolist()]


def _matrix(H: Tensor) -> Tensor:
    return H.diag() if H.ndim == 1 else H


def _root_mean(H: Tensor) -> float:
    root = _matrix(H).diagonal().mean().sqrt().item()
    if not root:
        raise ValueError(ZERO)
    return root
