"""The last step, off by default: fit the factors of one block to what the dense block gave out, by gradient descent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nsvd.model.layers import CompressedLayer
from nsvd.model.shifted import Batch, run_block


def refine_block_(
    block: nn.Module,
    index: int,
    batches: Sequence[Batch],
    H: Tensor | None,
    *,
    steps: int,
    lr: float = 2e-3,
    seed: int = 0,
) -> None:
    """Lower Σ tr(E Eᵀ H), E (d, n) the block's output in the compressed stream minus that in the dense one, in place.

    Adam on the factors alone, ``steps`` batches in seeded order, the rate falling linearly to zero; every domain counts
    by its weight, each in units of the loss it begins with. H (d, d), or its diagonal, is what the model's loss makes of an
    error at the block's output, None the identity. Works on float32 copies that are cast to the factors' dtype at every step.
    """
    factors = [
        p for m in block.modules() if isinstance(m, CompressedLayer) for n, p in m.named_parameters() if "bias" not in n
    ]
    if not factors:
        return
    others = [p for p in block.parameters() if p.requires_grad and all(p is not f for f in factors)]
    copies = [f.detach().float().clone().requires_grad_(True) for f in factors]
    adam = torch.optim.Adam(copies, lr=lr, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)
    known = [f.requires_grad for f in factors]
    unit = _units(block, index, batches, H)
    for p in others:
        p.requires_grad_(False)
    try:
        for f in factors:
            f.requires_grad_(True)
        for step in range(steps):
            if step % len(batches) == 0:
                order = torch.randperm(len(batches), generator=generator).tolist()
            item = batches[order[step % len(batches)]]
            for group in adam.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
            with torch.enable_grad():
                loss = item.weight * _error(block, index, item, H) / unit[item.domain]
                gradients = torch.autograd.grad(loss, factors)
            for copy, gradient in zip(copies, gradients, strict=True):
                copy.grad = gradient.float()
            adam.step()
            for factor, copy in zip(factors, copies, strict=True):
                factor.detach().copy_(copy.detach())
    finally:
        for f, flag in zip(factors, known, strict=True):
            f.requires_grad_(flag)
        for p in others:
            p.requires_grad_(True)


def _error(block: nn.Module, index: int, item: Batch, H: Tensor | None) -> Tensor:
    missing = (run_block(block, item.ours, item.calls[index]) - item.wanted[None]).float()
    if H is None:
        return missing.square().sum(-1).mean()
    weighted = missing * H if H.ndim == 1 else missing @ H
    return (missing * weighted).sum(-1).mean()


def _units(block: nn.Module, index: int, batches: Sequence[Batch], H: Tensor | None) -> dict[int, float]:
    """Mean error of each domain before the first step."""
    errors: dict[int, list[float]] = {}
    for item in batches:
        errors.setdefault(item.domain, []).append(_error(block, index, item, H).item())
    tiny = torch.finfo(torch.float32).tiny
    return {domain: max(sum(e) / len(e), tiny) for domain, e in errors.items()}
