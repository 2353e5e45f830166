"""A last step, off by default: fit the factors of one block to what the dense block gave out, by gradient descent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from nsvd.compression.descent import fit_, shuffled
from nsvd.compression.ordered import DENSE, OURS, Batch, FollowedBlock
from nsvd.walk.decoder import run_block
from nsvd.walk.processes import gathered

RATE = 2e-2  # a block alone bears larger steps than the whole model


@torch.no_grad()
def refine_block_(followed: FollowedBlock, H: Tensor | None, *, steps: int, seed: int = 0) -> None:
    """Lower Σ tr(E Eᵀ H), E (d, n) the block's output in the compressed stream minus that in the dense one, in place.

    ``steps`` batches in seeded order; every domain counts by its weight, each in units of the loss it begins with. H (d, d), or
    its diagonal, is what the model's loss makes of an error at the block's output, None the identity. A step of several processes
    is done by the one that has the batch.
    """
    block, index, batches = followed.block, followed.index, followed.batches
    here, unit = {item.first: item for item in batches}, _units(block, index, batches, H)
    everywhere = sorted(first for those in gathered(list(here)) for first in those)
    order = shuffled(len(everywhere), steps, seed)

    def loss(step: int) -> Iterator[Tensor]:
        if (item := here.get(everywhere[order[step]])) is not None:
            yield item.weight * _error(block, index, item, H) / unit[item.domain]

    fit_(block, loss, steps=steps, rate=RATE, name=f"refinement of block {index}")


def _error(block: nn.Module, index: int, item: Batch, H: Tensor | None) -> Tensor:
    missing = (run_block(block, item.hidden[OURS], item.calls[index]) - item.hidden[DENSE]).float()
    if H is None:
        return missing.square().sum(-1).mean()
    weighted = missing * H if H.ndim == 1 else missing @ H
    return (missing * weighted).sum(-1).mean()


def _units(block: nn.Module, index: int, batches: Sequence[Batch], H: Tensor | None) -> dict[int, float]:
    """Mean error of each domain before the first step."""
    errors: dict[int, list[float]] = {}
    for item in batches:
        errors.setdefault(item.domain, []).append(_error(block, index, item, H).item())
    for domain in sorted(set().union(*gathered(set(errors)))):
        errors[domain] = [error for those in gathered(errors.get(domain, [])) for error in those]
    tiny = torch.finfo(torch.float32).tiny
    return {domain: max(sum(e) / len(e), tiny) for domain, e in errors.items()}
