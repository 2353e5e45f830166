"""Gradient descent on the factors of compressed layers, for the last steps that can follow a decomposition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nsvd.model.layers import CompressedLayer

RATE = 1e-2  # of Adam, in units of each factor's root mean square
WARMUP = 10  # steps


def descend_(part: nn.Module, loss: Callable[[int], Tensor], *, steps: int, rate: float = RATE) -> None:
    """Lower ``loss(step)`` over the factors of the compressed layers inside ``part``, in place; all else stays.

    Adam, the rate falling linearly to zero, on float32 copies that are cast to the factors' dtype at every step.

    Raises:
        FloatingPointError: if the loss is NaN or Inf.
    """
    factors = [
        p for m in part.modules() if isinstance(m, CompressedLayer) for n, p in m.named_parameters() if "bias" not in n
    ]
    if not factors:
        return
    copies = [f.detach().float().clone().requires_grad_(True) for f in factors]
    sizes = [copy.detach().square().mean().sqrt().item() for copy in copies]
    adam = torch.optim.Adam([{"params": [copy]} for copy in copies], betas=(0.9, 0.99))
    known = {p: p.requires_grad for p in part.parameters()} | {f: f.requires_grad for f in factors}
    try:
        for p in known:
            p.requires_grad_(False)
        for f in factors:
            f.requires_grad_(True)
        for step in range(steps):
            now = rate * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
            for group, size in zip(adam.param_groups, sizes, strict=True):
                group["lr"] = now * size
            with torch.enable_grad():
                value = loss(step)
                gradients = torch.autograd.grad(value, factors, materialize_grads=True)
            if not value.isfinite():
                raise FloatingPointError(f"the loss is {value.item()} at step {step + 1} of the last {steps}")
            for copy, gradient in zip(copies, gradients, strict=True):
                copy.grad = gradient.float()
            adam.step()
            for factor, copy in zip(factors, copies, strict=True):
                factor.detach().copy_(copy.detach())
    finally:
        for p, flag in known.items():
            p.requires_grad_(flag)


def shuffled(count: int, steps: int, seed: int) -> list[int]:
    """``steps`` numbers below ``count``: all of them in random order, then again in another."""
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < steps:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:steps]
