"""Gradient descent on the factors of compressed layers, for the last steps that can follow a decomposition."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.stored.layers import CompressedLayer, NarrowLinear
from nsvd.walk.processes import gathered, summed

RATE = 1e-2  # of Adam, at most
SMALLER, SMALLEST = 3, 1e-5  # what it is divided by while that is better, and where this ends
BETTER = 1.5  # times as much has to be gained: a larger rate gains on a smaller one over more steps
TRIED = 12  # steps at each of these rates
WARMUP = 10  # steps, or a quarter of all
EPS = 1e-12  # of Adam: gradients of a mean over tokens are small


def fit_(
    part: nn.Module,
    loss: Callable[[int], Iterable[Tensor]],
    *,
    steps: int,
    name: str,
    rate: float = RATE,
    progress: bool = False,
) -> list[float]:
    """``descend_`` at the rate that the part bears; where none lowers the loss, and where it ends higher, all stays as it was.

    What a model bears depends on its width and on channels of its inputs that are larger than others: a hundredth of what a small
    one bears is usual. So a few steps are tried at ``rate`` and at smaller ones, as long as a smaller one is clearly better. The
    loss is compared on the batch of the first step.

    Returns:
        The loss at every step; none where all stays as it was.

    Raises:
        FloatingPointError: as ``descend_``, but not for a rate that was only tried.
    """
    factors = _factors(part)
    if not factors or not steps:
        return []
    start, began = [f.detach().clone() for f in factors], _value(loss(0))
    if not abs(began) < float("inf"):
        raise FloatingPointError(f"{name}: NaN or Inf at step 1 of {steps}, at a loss of {began}")
    most, borne = 0.0, None
    while rate > SMALLEST:
        try:
            descend_(part, loss, steps=min(TRIED, steps), name=name, rate=rate)
            gained = began - _value(loss(0))
        except FloatingPointError:
            gained = 0.0
        _put(factors, start)
        if gained > BETTER * most:
            most, borne = gained, rate
        elif borne is not None:
            break
        rate /= SMALLER
    if borne is None:
        return []
    losses = descend_(part, loss, steps=steps, name=name, rate=borne, progress=progress)
    if not _value(loss(0)) < began:
        _put(factors, start)
        return []
    return losses


def descend_(
    part: nn.Module,
    loss: Callable[[int], Iterable[Tensor]],
    *,
    steps: int,
    name: str,
    rate: float = RATE,
    progress: bool = False,
) -> list[float]:
    """Lower the sum of what ``loss(step)`` yields over the factors of the compressed layers inside ``part``, in place.

    Adam, its ``rate`` in units of each factor's root mean square and falling linearly to zero, on copies in float32 at least,
    cast to the factors' dtype at every step; all else stays. Gradients are taken of one term after the other, so that only
    one has to be held. Of several processes each yields its terms.

    Returns:
        The loss at every step.

    Raises:
        FloatingPointError: if a loss, a gradient or a factor is NaN or Inf; the step is told.
    """
    factors = _factors(part)
    if not factors:
        return []
    copies = [f.detach().to(torch.promote_types(f.dtype, torch.float32), copy=True) for f in factors]
    sizes = [copy.square().mean().sqrt().item() for copy in copies]
    adam = torch.optim.Adam([{"params": [copy]} for copy in copies], betas=(0.9, 0.99), eps=EPS)
    known = {p: p.requires_grad for p in [*part.parameters(), *factors]}
    losses, warmup = [], min(WARMUP, max(1, steps // 4))
    try:
        for p in known:
            p.requires_grad_(False)
        for f in factors:
            f.requires_grad_(True)
        for step in tqdm(range(steps), name, disable=not progress, leave=False):
            losses.append(_accumulate(loss(step), factors, copies))
            now = rate * min(1.0, (step + 1) / warmup) * (1 - step / steps)
            for group, size in zip(adam.param_groups, sizes, strict=True):
                group["lr"] = now * size
            norm = sum(cast(Tensor, copy.grad).square().sum() for copy in copies)
            adam.step()
            adam.zero_grad()
            _put(factors, copies)
            norm = cast(Tensor, norm + sum(factor.detach().float().square().sum() for factor in factors))
            if not norm.isfinite() or losses[-1] != losses[-1]:
                raise FloatingPointError(f"{name}: NaN or Inf at step {step + 1} of {steps}, at a loss of {losses[-1]}")
    finally:
        for p, flag in known.items():
            p.requires_grad_(flag)
    return losses


def _factors(part: nn.Module) -> list[Tensor]:
    layers = (module for module in part.modules() if isinstance(module, CompressedLayer))
    factored = (layer for layer in layers if not isinstance(layer, NarrowLinear))
    return [p for layer in factored for name, p in layer.named_parameters() if "bias" not in name]


def _put(factors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for factor, value in zip(factors, values, strict=True):
        factor.detach().copy_(value)


@torch.no_grad()
def _value(terms: Iterable[Tensor]) -> float:
    return sum(gathered(sum(term.item() for term in terms)))


def _accumulate(terms: Iterable[Tensor], factors: list[Tensor], copies: list[Tensor]) -> float:
    """Add the gradients of every term to those of the copies; returns the sum of the terms."""
    total = 0.0
    with torch.enable_grad():
        for term in terms:
            for copy, gradient in zip(copies, torch.autograd.grad(term, factors, materialize_grads=True), strict=True):
                gradient = gradient.to(copy.dtype)
                copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
            total += term.item()
            del term
    for copy in copies:
        copy.grad = summed(torch.zeros_like(copy) if copy.grad is None else copy.grad)
    return sum(gathered(total))


def shuffled(count: int, steps: int, seed: int) -> list[int]:
    """``steps`` numbers below ``count``, 1 at least: all of them in random order, then again in another."""
    generator, order = torch.Generator().manual_seed(seed), []
    for _ in range(-(-steps // count)):
        order += torch.randperm(count, generator=generator).tolist()
    return order[:steps]
