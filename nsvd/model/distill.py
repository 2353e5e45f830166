"""A last step, off by default: fit all factors at once to what the dense model predicts, by gradient descent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.model.descent import descend_, shuffled
from nsvd.model.hooks import evaluating

TOKENS = 1024  # of every domain in a step, a window at least


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
) -> None:
    """Lower Σ weight · E KL(dense ‖ compressed) of the next-token distributions over the factors of the model, in place.

    Nats a token, E over the tokens of a domain's windows (token ids, count × length each); ``layers`` are the dense ones
    that the compressed layers stand for, so with them in place the model is its own teacher. Knowledge distillation
    (arXiv 1503.02531) at temperature 1: the text gives the contexts only, none of its tokens is a target. Every step needs
    the gradients of the whole model.
    """
    sizes = [min(max(1, TOKENS // ids.shape[1]), len(ids)) for ids in domains]
    orders = [shuffled(len(ids), steps * n, seed) for ids, n in zip(domains, sizes, strict=True)]
    bar = tqdm(total=steps, desc="distill", disable=not progress, leave=False)

    def loss(step: int) -> Tensor:
        parts = []
        for ids, n, order, weight in zip(domains, sizes, orders, weights, strict=True):
            ids = ids[order[step * n : (step + 1) * n]].to(next(model.parameters()).device)
            with torch.no_grad(), instead(model, layers):
                wanted = _predicted(model, ids)
            parts.append(weight * (wanted.exp() * (wanted - _predicted(model, ids))).sum(-1).mean())
        bar.update()
        return sum(parts)

    with evaluating(model), bar:
        descend_(model, loss, steps=steps)


@contextmanager
def instead(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """These modules in the place of those of the same names, for a while."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def _predicted(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities (count, length, vocabulary), in float32 at least."""
    logits = model(input_ids=ids, use_cache=False).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
