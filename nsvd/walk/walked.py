"""Moments of every layer's inputs, one block at a time: what is held does not grow with the number of blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.linalg import Moments
from nsvd.walk.decoder import Decoder, Entered
from nsvd.walk.hooks import evaluating, watch_inputs
from nsvd.walk.moments import (
    RunningMoments,
    check_sums,
    check_windows,
    inputs_of,
    mixed,
    origin_of,
    overflow,
    shares_of,
)

BATCH = 8  # windows read at a time, as ``calibrate`` does


class Walked(Mapping[str, Moments]):
    """The same moments as ``calibrate`` and ``mix`` give, taken as they are asked for, in the order of the blocks.

    At any time it holds the hidden states (count, length, d) of all windows before one block, in the host's memory, and the
    moments of this block's layers. Those of earlier blocks are gone. The blocks themselves must stay as they are until
    theirs are taken: a layer may be exchanged once its block is passed.

    Raises:
        ValueError: as ``calibrate``; a layer in none of the blocks.
        KeyError: for a layer that is not there, or whose block is passed.
    """

    def __init__(
        self,
        decoder: Decoder,
        domains: Sequence[Tensor],
        layers: Sequence[str],
        weights: Sequence[float] | str = "uniform",
        *,
        progress: bool = False,
    ):
        self.decoder, self.gradients = decoder, {}
        for ids in domains:
            check_windows(ids, decoder.model)
        self.inputs, *others = [inputs_of(decoder.model, layers, ids) for ids in domains]
        if any(other != self.inputs for other in others):
            raise ValueError("the statistics to mix are not of the same layers")
        self._block = {layer: decoder.index(layer) for layer in layers}
        self._shares = shares_of(weights, len(domains))
        origins = [origin_of(decoder.model, ids) for ids in domains]
        self.origin = origins[0] if len(origins) == 1 else {"mixed": origins, "weights": self._shares}
        self._at, self._moments = -1, {}
        self._bar = tqdm(total=len(decoder), desc="blocks", disable=not progress, leave=False)
        with torch.no_grad(), evaluating(decoder.model):
            self._passing = [_entered(decoder, ids) for ids in domains]

    def __getitem__(self, layer: str) -> Moments:
        if layer not in self._block:
            raise KeyError(f"the statistics hold no layer {layer!r}")
        if self._block[layer] < self._at:
            raise KeyError(f"the moments of layer {layer} are gone: its block is passed")
        while self._at < self._block[layer]:
            self._advance()
        return self._moments[self.inputs[layer]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    @torch.no_grad()
    def _advance(self) -> None:
        """Take the next block's moments, and go on behind it."""
        self._at += 1
        here = [leader for leader in dict.fromkeys(self.inputs.values()) if self._block[leader] == self._at]
        self._moments, parts = {}, []
        for passing in self._passing:
            sums = {leader: RunningMoments() for leader in here}
            with (
                self.decoder.held(self._at),
                evaluating(self.decoder.model),
                watch_inputs(self.decoder.model, here, lambda name, x, sums=sums: sums[name].add(x)),
            ):
                for item in passing:
                    hidden = item.hidden.to(self.decoder.device)
                    item.hidden = self.decoder.run(self._at, hidden, item.calls[self._at]).cpu()
            check_sums(self.decoder.model, sums)
            for item in passing:
                if not item.hidden.isfinite().all():
                    raise overflow(self.decoder.model, item.ids)
            parts.append({leader: one.result() for leader, one in sums.items()})
        for leader in here:
            each = [part[leader] for part in parts]
            self._moments[leader] = each[0] if len(each) == 1 else mixed(each, self._shares)
        self._bar.update()
        if self._at + 1 == len(self.decoder):
            self._bar.close()


def walkable(model: nn.Module) -> Decoder | None:
    """The model taken apart into blocks, or None where it cannot be run so."""
    try:
        with evaluating(model):
            return Decoder(model)
    except ValueError:
        return None


def _entered(decoder: Decoder, ids: Tensor) -> list[Entered]:
    """Batches before the first block, hidden states in the host's memory."""
    batches: list[Entered] = []
    for some in ids.split(BATCH):
        batches.append(decoder.enter(some, like=batches[-1] if batches else None))
        batches[-1].hidden = batches[-1].hidden.cpu()
    return batches
