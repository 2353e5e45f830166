"""A last step, off by default: fit all factors at once to what the dense model predicts, by gradient descent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from nsvd.compression.descent import fit_, shuffled
from nsvd.walk.hooks import evaluating, exchanged
from nsvd.walk.processes import mine
from nsvd.walk.text import tokens_at_once

TOKENS = 1024  # of every domain in a step, a window at least; fewer where their logits would pass the budget


@torch.no_grad()
def distill_(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    domains: Sequence[Tensor],
    weights: Sequence[float],
    *,
    steps: int,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Lower Σ weight · E KL(dense ‖ compressed) of the next-token distributions over the factors of the model, in place.

    Nats a token, E over the tokens of a domain's windows (token ids, count × length each); ``layers`` are those of the
    dense model, of all that are not what they were, so with them in place the model is its own teacher. Knowledge distillation
    (arXiv 1503.02531) at temperature 1: the text gives the contexts only, none of its tokens is a target. Every step needs
    the gradients of the whole model. Domains of weight 0 are left out. Several processes deal the windows of a step.

    Returns:
        The loss at every step, on the windows of this step.

    Raises:
        FloatingPointError: if it becomes NaN or Inf.
    """
    texts = [(ids, weight) for ids, weight in zip(domains, weights, strict=True) if weight]
    tokens = min(TOKENS, tokens_at_once(model))
    sizes = [min(max(1, tokens // ids.shape[1]), len(ids)) for ids, _ in texts]
    orders = [shuffled(len(ids), steps * n, seed) for (ids, _), n in zip(texts, sizes, strict=True)]
    device = next(model.parameters()).device

    def loss(step: int) -> Iterator[Tensor]:
        for (ids, weight), n, order in zip(texts, sizes, orders, strict=True):
            some = ids[mine(order[step * n : (step + 1) * n])].to(device)
            if not len(some):
                continue
            with torch.no_grad(), exchanged(model, layers):
                wanted = _predicted(model, some)
            yield weight * len(some) / n * (wanted.exp() * (wanted - _predicted(model, some))).sum(-1).mean()

    with evaluating(model):
        return fit_(model, loss, steps=steps, name="distillation", progress=progress)


def _predicted(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities (count, length, vocabulary), in float32 at least."""
    logits = model(input_ids=ids, use_cache=False).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
