"""Layers that keep their weight as (d_in, d_out), transformers' ``Conv1D`` of GPT-2, taken for linear ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast, overload

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Transposed(Conv1D, nn.Linear):
    """A ``Conv1D`` with the ``weight`` (d_out, d_in) of an ``nn.Linear``, a view of its own; it is stored as a ``Conv1D`` is."""

    @property
    def in_features(self) -> int:
        return self.nx

    @property
    def out_features(self) -> int:
        return self.nf

    @property
    def weight(self) -> nn.Parameter:
        """To read, and to write into."""
        own = self._own_weight()
        return nn.Parameter(own.detach().T, requires_grad=own.requires_grad)

    def _own_weight(self) -> nn.Parameter:
        """(d_in, d_out), as it is stored."""
        return cast(nn.Parameter, self._parameters["weight"])

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, self.nx), self._own_weight())
        return flat.view(*x.shape[:-1], self.nf)


@overload
def as_linear(layer: nn.Linear | Conv1D) -> nn.Linear: ...


@overload
def as_linear(layer: nn.Module) -> nn.Module: ...


def as_linear(layer: nn.Module) -> nn.Module:
    """The layer, or of a ``Conv1D`` a view that shares all it has."""
    if type(layer) is not Conv1D:
        return layer
    view = Transposed.__new__(Transposed)
    view.__dict__ = layer.__dict__
    return view


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of this name, ``as_linear``."""
    return as_linear(cast(nn.Linear, model.get_submodule(name)))


@contextmanager
def linear_layers(model: nn.Module) -> Iterator[None]:
    """In the context every ``Conv1D`` of the model is a ``Transposed``; afterwards it is itself again, and so are copies of it."""
    before = [layer for layer in model.modules() if type(layer) is Conv1D]
    for layer in before:
        layer.__class__ = Transposed
    try:
        yield
    finally:
        for layer in (*before, *model.modules()):
            if type(layer) is Transposed:
                layer.__class__ = Conv1D  # pyright: ignore[reportAttributeAccessIssue]  # what it was before
