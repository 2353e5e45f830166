"""A text on its way through the blocks, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nsvd.walk.decoder import Call, Decoder, Entered


@dataclass
class Passing:
    """A batch of token ids (count, length), the calls of the blocks, and the borders: the hidden states (count, length, d)
    before every block and behind the last, in the host's memory.

    ``gradient`` is that of a loss, with respect to one of the borders.
    """

    ids: Tensor
    calls: list[Call]
    borders: list[Tensor]
    gradient: Tensor | None = None


@torch.no_grad()
def forward(decoder: Decoder, batches: Iterable[Tensor], *, progress: bool = False) -> list[Passing]:
    """Run every batch through all blocks, and keep the borders."""
    passing: list[Passing] = []
    entered: Entered | None = None
    for ids in batches:
        entered = decoder.enter(ids, like=entered)
        passing.append(Passing(entered.ids, entered.calls, [entered.hidden.cpu()]))
    for index in tqdm(range(len(decoder)), "forward", disable=not progress, leave=False):
        with decoder.held(index):
            for item in passing:
                hidden = item.borders[-1].to(decoder.device)
                item.borders.append(decoder.run(index, hidden, item.calls[index]).cpu())
    return passing
