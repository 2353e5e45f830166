"""Which layers are compressed, and what stands in their place.

Every stand-in is a ``CompressedLayer``: it can be built empty from what a checkpoint says of it, and be multiplied out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from nsvd.linalg import LowRank, Pivoted, pivoted


class CompressedLayer(nn.Module):
    """What stands in the place of an ``nn.Linear``; subclasses are found by their ``kind`` through ``LAYERS``."""

    kind: ClassVar[str]
    in_features: int
    out_features: int

    @classmethod
    def like(cls, layer: nn.Linear, **spec: int) -> CompressedLayer:
        """An empty stand-in with this layer's sizes, bias, device and dtype; raises ``ValueError`` if the spec cannot fit."""
        raise NotImplementedError

    def spec(self) -> dict[str, int]:
        """What ``like`` needs besides the layer: goes into the checkpoint."""
        raise NotImplementedError

    def to_linear(self) -> nn.Linear:
        """The dense layer that computes the same, multiplied out in float32 at least and stored in the factors' dtype."""
        raise NotImplementedError


class LowRankLinear(CompressedLayer):
    """y = left (right x) + bias, as two ``nn.Linear`` children: ``down`` holds right (k, d_in), ``up`` left (d_out, k).

    Children rather than bare parameters, so that adapters, device maps and anything else that looks for ``nn.Linear``
    finds them. In a state dict: ``<name>.down.weight``, ``<name>.up.weight``, ``<name>.up.bias``.
    """

    kind = "low-rank"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, *, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def like(cls, layer: nn.Linear, rank: int) -> LowRankLinear:
        if not 1 <= rank <= layer.in_features:  # a latent that two layers share may be wider than the outputs of one
            raise ValueError(f"rank {rank} of a {layer.out_features} × {layer.in_features} matrix")
        weight = layer.weight
        return cls(
            layer.in_features,
            layer.out_features,
            rank,
            layer.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )

    @classmethod
    @torch.no_grad()
    def from_factors(cls, layer: nn.Linear, factors: LowRank) -> LowRankLinear:
        """The layer with its weight replaced by the factors, its bias kept."""
        new = cls.like(layer, factors.rank).requires_grad_(layer.weight.requires_grad)
        new.down.weight.copy_(factors.right)
        new.up.weight.copy_(factors.left)
        if layer.bias is not None:
            new.up.bias.copy_(layer.bias)
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def spec(self) -> dict[str, int]:
        return {"rank": self.rank}

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        left, right, bias = self.up.weight, self.down.weight, self.up.bias
        exact = torch.promote_types(left.dtype, torch.float32)
        dense = nn.Linear(self.in_features, self.out_features, bias is not None, device=left.device, dtype=left.dtype)
        dense.weight.copy_(left.to(exact) @ right.to(exact))
        if bias is not None:
            dense.bias.copy_(bias)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.rank} -> {self.out_features}"


class PivotedLinear(CompressedLayer):
    """z = down x; y = [z; up z] in some order, + bias: k outputs are computed as they were, the others from them.

    ``down`` holds C (k, d_in), ``up`` T (d_out − k, k), the buffer ``order`` (d_out,) where each output stands. See
    ``nsvd.linalg.Pivoted``: the same matrix as rank-k factors, with k² numbers less to store and to multiply.
    """

    kind = "pivoted"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, *, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("order", torch.empty(out_features, device=device, dtype=torch.int32))

    @classmethod
    def like(cls, layer: nn.Linear, rank: int) -> PivotedLinear:
        if not 1 <= rank < min(layer.weight.shape):
            raise ValueError(f"rank {rank} of a {layer.out_features} × {layer.in_features} matrix")
        weight, bias = layer.weight, layer.bias is not None
        return cls(layer.in_features, layer.out_features, rank, bias, device=weight.device, dtype=weight.dtype)

    @classmethod
    @torch.no_grad()
    def from_factors(cls, layer: nn.Linear, factors: Pivoted) -> PivotedLinear:
        """The layer with its weight replaced by the factors, its bias kept."""
        new = cls.like(layer, factors.rank).requires_grad_(layer.weight.requires_grad)
        new.down.weight.copy_(factors.C)
        new.up.weight.copy_(factors.T)
        new.order.copy_(factors.order)
        if layer.bias is not None:
            new.bias.copy_(layer.bias)
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        z = self.down(x)
        y = torch.cat([z, self.up(z)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def spec(self) -> dict[str, int]:
        return {"rank": self.rank}

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        C, T = self.down.weight, self.up.weight
        exact = torch.promote_types(C.dtype, torch.float32)
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=C.device, dtype=C.dtype)
        dense.weight.copy_(Pivoted(C.to(exact), T.to(exact), self.order).dense())
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.rank} -> {self.out_features}"


LAYERS: dict[str, type[CompressedLayer]] = {layer.kind: layer for layer in (LowRankLinear, PivotedLinear)}


def stand_in(layer: nn.Linear, value: LowRank, factors: str) -> CompressedLayer:
    """What takes the place of a layer: the factors as they are (``plain``) or ``pivoted``, in the layer's dtype."""
    if factors == "pivoted":
        return PivotedLinear.from_factors(layer, pivoted(value))
    return LowRankLinear.from_factors(layer, value)


@contextmanager
def exchanged(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The named layers of the model replaced while in the context; put back on exit, also when something raises."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in before.items():
            model.set_submodule(name, layer)


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are compressed, by dotted name: every ``nn.Linear`` but the output embedding.

    Raises:
        ValueError: if there is none; the message names what the model has instead.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = {id(part) for m in model.modules() if isinstance(m, CompressedLayer) for part in m.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and id(module) not in inside
    }
    if not found:
        kinds = {type(m).__name__ for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor)}
        if "Conv1D" in kinds:
            raise ValueError(
                f"{type(model).__name__} keeps its weights in Conv1D layers (as GPT-2 does), which are not supported; "
                "only nn.Linear layers are compressed"
            )
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear layer left to compress (it has {', '.join(sorted(kinds))})"
        )
    return found
