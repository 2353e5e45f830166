"""The published route as its description has it (SVD-LLM, arXiv 2403.07378), to measure ours against in the same run.

The second moment of the inputs of every layer in float64, seven in a block though four inputs are different; then layer by layer
Cholesky's factor, the full SVD and the inverse, and two dense layers in the place of the one.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

import nsvd
from benchmarks.decompose import published


@torch.no_grad()
def moments(
    model: nn.Module, windows: Tensor, names: list[str], batch: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Σ x xᵀ (d_in, d_in) of every named layer's own inputs, by whole passes of the model."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).to(dtype)
        sums[name] = sums.get(name, 0) + x.mT @ x

    with ExitStack() as stack:
        for name in names:
            hook = lambda _module, args, name=name: add(name, args[0])  # noqa: E731
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        forward(model, windows, batch)
    return sums


@torch.no_grad()
def forward(model: nn.Module, windows: Tensor, batch: int) -> None:
    """A plain pass of the windows."""
    for ids in windows.split(batch):
        model(input_ids=ids.to(model.device), use_cache=False)


@torch.no_grad()
def compress_(model: nn.Module, windows: Tensor, ratio: float, batch: int) -> None:
    """Moments, and factors in the place of every target layer, of the same ranks as ours."""
    layers = nsvd.targets(model)
    sums = moments(model, windows, list(layers), batch)
    for name, layer in layers.items():
        k = nsvd.linalg.rank_for_ratio(*layer.weight.shape, ratio)
        value = published(layer.weight.double(), sums.pop(name), k)
        pair = []
        for factor in (value.right, value.left):
            new = nn.Linear(*reversed(factor.shape), bias=False, device=factor.device, dtype=layer.weight.dtype)
            new.weight.copy_(factor)
            pair.append(new)
        if layer.bias is not None:
            pair[-1].bias = layer.bias
        model.set_submodule(name, nn.Sequential(*pair))
