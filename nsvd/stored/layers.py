"""What stands in the place of a compressed layer.

Every stand-in is a ``CompressedLayer``: it can be built empty from what a checkpoint says of it, and be multiplied out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from nsvd.linalg import LowRank, Pivoted, pivoted
from nsvd.linalg.sola import COLUMNS, ROWS, Split
from nsvd.stored.transposed import Transposed, as_linear

# How many products take as long as it takes to move one number of an output, in float32 and in formats of two bytes: measured
# on one core with 512 tokens; a GPU has more of them.
REORDERED = (64, 256)


class CompressedLayer(nn.Module, ABC):
    """What stands in the place of an ``nn.Linear``; found by its ``kind`` through ``LAYERS``.

    Every kind but ``NarrowLinear`` has factors in two ``nn.Linear`` children, ``down`` and ``up``. All are built with
    ``(in_features, out_features, **spec, bias, device, dtype)``. As an ``nn.Linear`` it has a ``weight`` and a ``bias`` to read,
    for models that look at these beside calling the layer; the weight is multiplied out every time.
    """

    kind: ClassVar[str]
    in_features: int
    out_features: int
    rank: int
    down: nn.Linear
    up: nn.Linear
    bias: Tensor | None
    transposed = False  # whether the dense layer is a ``Conv1D``
    stands_for: tuple[int, int]  # (d_out, d_in) of the dense layer: larger where neurons were left out

    def _sized(self, in_features: int, out_features: int, rank: int) -> None:
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.stands_for = out_features, in_features

    @classmethod
    @abstractmethod
    def check(cls, d_out: int, d_in: int, **spec: int) -> None:
        """Raise ``ValueError`` if the spec cannot fit a (d_out, d_in) matrix."""

    @abstractmethod
    def spec(self) -> dict[str, int]:
        """What ``like`` needs besides the layer: goes into the checkpoint."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix (d_out, d_in) that the layer multiplies by, in float32 at least."""

    @property
    def weight(self) -> Tensor:
        """The same matrix in the factors' dtype."""
        return self.dense().to(self.down.weight.dtype)

    @classmethod
    def like(cls, layer: nn.Linear, *, outputs: int | None = None, inputs: int | None = None, **spec: int) -> Self:
        """An empty stand-in with this layer's sizes, bias, device and dtype; raises ``ValueError`` if the spec cannot fit.

        Where neurons were left out, it has fewer ``outputs`` or ``inputs`` than the layer.
        """
        weight, bias = layer.weight, layer.bias is not None
        d_out, d_in = weight.shape
        m, n = d_out if outputs is None else outputs, d_in if inputs is None else inputs
        if not (1 <= m <= d_out and 1 <= n <= d_in):
            raise ValueError(f"{m} outputs and {n} inputs of a {d_out} × {d_in} matrix")
        cls.check(m, n, **spec)
        new = cls(n, m, **spec, bias=bias, device=weight.device, dtype=weight.dtype)
        new.transposed, new.stands_for = isinstance(layer, Transposed), (d_out, d_in)
        return new

    def left(self) -> dict[str, int]:
        """How many outputs and inputs are left, where these are fewer than the dense layer's; goes into the checkpoint, too."""
        d_out, d_in = self.stands_for
        sizes = {"outputs": (self.out_features, d_out), "inputs": (self.in_features, d_in)}
        return {name: here for name, (here, there) in sizes.items() if here != there}

    @classmethod
    def _filled(cls, layer: nn.Linear, spec: Mapping[str, int], state: Mapping[str, Tensor | None]) -> Self:
        """A stand-in with this state, None left out, trained or not as the layer is.

        Raises:
            FloatingPointError: if a tensor holds NaN or Inf once it has the layer's dtype.
        """
        new = cls.like(layer, **spec).requires_grad_(layer.weight.requires_grad)
        new.load_state_dict({name: value for name, value in state.items() if value is not None})
        for name, value in new.named_parameters():
            if not value.isfinite().all():
                dtype = str(value.dtype).removeprefix("torch.")
                raise FloatingPointError(
                    f"{name} of its {cls.kind} factors, rank {new.rank}, holds NaN or Inf in {dtype}"
                )
        return new.train(layer.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear | Conv1D:
        """The dense layer that computes the same, multiplied out by ``dense`` and stored in the factors' dtype.

        It is a ``Conv1D`` where this stands for one. Neurons that were left out come back as zeros, behind the others.
        """
        (d_out, d_in), some = self.stands_for, next(self.parameters())
        bias, to = self.bias, {"device": some.device, "dtype": some.dtype}
        layer = Conv1D(d_out, d_in).to(**to) if self.transposed else nn.Linear(d_in, d_out, bias is not None, **to)
        as_linear(layer).weight.zero_()[: self.out_features, : self.in_features].copy_(self.dense())
        if bias is not None:
            as_linear(layer).bias.zero_()[: self.out_features].copy_(bias)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        spec = "".join(f", {k} {v}" for k, v in self.spec().items())
        return f"{self.in_features} -> {self.out_features}{spec}"


def _bare(layer: nn.Module) -> bool:
    """Whether to call the layer is to multiply by a weight of numbers: no adapter, hook, wrapped forward or quantized tensor."""
    watched = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and not watched and not is_traceable_wrapper_subclass(layer.weight)


def _exact(*factors: Tensor) -> tuple[Tensor, ...]:
    """In float32 at least."""
    return tuple(factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in factors)


class LowRankLinear(CompressedLayer):
    """y = left (right x) + bias, as two ``nn.Linear`` children: ``down`` holds right (k, d_in), ``up`` left (d_out, k).

    Children rather than bare parameters, so that adapters, device maps and anything else that looks for ``nn.Linear``
    finds them. In a state dict: ``<name>.down.weight``, ``<name>.up.weight``, ``<name>.up.bias``.
    """

    kind = "low-rank"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, *, device=None, dtype=None):
        super().__init__()
        self._sized(in_features, out_features, rank)
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def check(cls, d_out: int, d_in: int, rank: int) -> None:
        if not 1 <= rank <= d_in:  # that of keys and values together may exceed the outputs of one of them
            raise ValueError(f"rank {rank} of a {d_out} × {d_in} matrix")

    @classmethod
    def from_factors(cls, layer: nn.Linear, factors: LowRank) -> LowRankLinear:
        """The layer with its weight replaced by the factors, its bias kept."""
        state = {"down.weight": factors.right, "up.weight": factors.left, "up.bias": layer.bias}
        return cls._filled(layer, {"rank": factors.rank}, state)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def spec(self) -> dict[str, int]:
        return {"rank": self.rank}

    def dense(self) -> Tensor:
        left, right = _exact(self.up.weight, self.down.weight)
        return left @ right

    @property
    def bias(self) -> Tensor | None:
        """The bias (d_out,)."""
        return self.up.bias


class PivotedLinear(CompressedLayer):
    """z = down x; y = [z; up z] in some order, + bias: k outputs are computed as they were, the others from them.

    ``down`` holds C (k, d_in), ``up`` T (d_out − k, k), the buffer ``order`` (d_out,) where each output stands. See
    ``nsvd.linalg.Pivoted``: the same matrix as rank-k factors, with k² numbers less to store and to multiply.
    """

    kind = "pivoted"
    order: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, *, device=None, dtype=None):
        super().__init__()
        self._sized(in_features, out_features, rank)
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("order", torch.empty(out_features, device=device, dtype=torch.int64))

    @classmethod
    def check(cls, d_out: int, d_in: int, rank: int) -> None:
        if not 1 <= rank < min(d_out, d_in):
            raise ValueError(f"rank {rank} of a {d_out} × {d_in} matrix")

    @classmethod
    def from_factors(cls, layer: nn.Linear, factors: Pivoted) -> PivotedLinear:
        """The layer with its weight replaced by the factors, its bias kept."""
        state = {"down.weight": factors.C, "up.weight": factors.T, "order": factors.order, "bias": layer.bias}
        return cls._filled(layer, {"rank": factors.rank}, state)

    def forward(self, x: Tensor) -> Tensor:
        z = self.down(x)
        if z.numel() >= self.rank**2 and self._one_product(z):
            unit = torch.eye(self.rank, device=z.device, dtype=z.dtype)
            rows = torch.cat([unit, self.up.weight]).index_select(0, self.order)
            return F.linear(z, rows, self.bias)
        y = torch.cat([z, self.up(z)], dim=-1)
        if y.numel() == self.out_features:  # one token: a view takes longer than the reordering
            y = y.index_select(-1, self.order)
        else:
            y = y.view(-1, self.out_features).index_select(1, self.order).view_as(y)  # so several times as fast
        return y if self.bias is None else y + self.bias

    def _one_product(self, z: Tensor) -> bool:
        """Whether z is multiplied by all rows, those of the identity among them, and nothing is reordered but the rows.

        That multiplies by k² numbers more and reorders k numbers an output in place of one a token and output: it pays for
        more tokens than k, up to a rank that depends on how fast the device multiplies beside how fast it moves numbers.
        Not where gradients are needed, where a compiler fuses the reordering, or where ``up`` is more than its weight.
        """
        pays = self.rank**2 <= REORDERED[z.element_size() <= 2] * self.out_features
        usual = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return pays and usual and _bare(self.up) and z.dtype == self.up.weight.dtype

    def spec(self) -> dict[str, int]:
        return {"rank": self.rank}

    def dense(self) -> Tensor:
        C, T = _exact(self.down.weight, self.up.weight)
        return Pivoted(C, T, self.order).dense()


class SplitLinear(CompressedLayer):
    """A linear layer whose first rows or columns are dense, the others low-rank; SoLA's, with prime neurons in front.

    Three ``nn.Linear`` children: ``prime`` holds the dense part, ``down`` and ``up`` the factors of the rest.
    """

    dim: ClassVar[int]

    def __init__(
        self, in_features: int, out_features: int, prime: int, rank: int, bias: bool, *, device=None, dtype=None
    ):
        super().__init__()
        self._sized(in_features, out_features, rank)
        rows, columns = (prime, 0) if self.dim == ROWS else (0, prime)
        to = {"device": device, "dtype": dtype}
        self.prime = nn.Linear(columns or in_features, rows or out_features, bias=bias, **to)
        self.down = nn.Linear(in_features - columns, rank, bias=False, **to)
        self.up = nn.Linear(rank, out_features - rows, bias=bias and self.dim == ROWS, **to)

    @classmethod
    def check(cls, d_out: int, d_in: int, prime: int, rank: int) -> None:
        sizes = [d_out, d_in]
        if not 1 <= prime < sizes[cls.dim]:
            raise ValueError(f"{prime} prime neurons of {sizes[cls.dim]}")
        sizes[cls.dim] -= prime
        if not 1 <= rank <= min(sizes):
            raise ValueError(f"rank {rank} of a {sizes[0]} × {sizes[1]} block")

    @classmethod
    def from_split(cls, layer: nn.Linear, value: Split) -> SplitLinear:
        """The layer with its weight replaced by the split one, its bias kept, both with prime neurons in front."""
        prime, marginal, first, rest = value.block.prime, value.marginal, layer.bias, None
        if layer.bias is not None and cls.dim == ROWS:
            first, rest = value.block.permute(layer.bias).tensor_split([prime])
        factors = {"prime.weight": value.prime, "down.weight": marginal.right, "up.weight": marginal.left}
        spec = {"prime": prime, "rank": value.rank}
        return cls._filled(layer, spec, factors | {"prime.bias": first, "up.bias": rest})

    def dense(self) -> Tensor:
        prime, left, right = _exact(self.prime.weight, self.up.weight, self.down.weight)
        return torch.cat([prime, left @ right], self.dim)

    @property
    def bias(self) -> Tensor | None:
        """The bias (d_out,), that of the prime outputs first."""
        both: list[Tensor] = [bias for bias in (self.prime.bias, self.up.bias) if bias is not None]
        return torch.cat(both) if both else None

    def spec(self) -> dict[str, int]:
        return {"prime": self.prime.weight.shape[self.dim], "rank": self.rank}


class SplitRows(SplitLinear):
    """y = [prime x; up (down x)] + bias: the outputs are neurons (gate and up, or the first layer of a plain feed-forward)."""

    kind, dim = "split-rows", ROWS

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.prime(x), self.up(self.down(x))], dim=-1)


class SplitColumns(SplitLinear):
    """y = prime x₁ + up (down x₂) + bias: the inputs x = [x₁; x₂] are neurons (the last layer of a feed-forward)."""

    kind, dim = "split-columns", COLUMNS

    def forward(self, x: Tensor) -> Tensor:
        p = self.prime.in_features
        return self.prime(x[..., :p]) + self.up(self.down(x[..., p:]))


class NarrowLinear(CompressedLayer):
    """y = W x + bias with a dense W, without the rows or columns of neurons that were left out; ``kept`` is the layer."""

    kind = "narrow"

    def __init__(self, in_features: int, out_features: int, bias: bool, *, device=None, dtype=None):
        super().__init__()
        self._sized(in_features, out_features, min(in_features, out_features))
        self.kept = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def check(cls, d_out: int, d_in: int) -> None:
        pass

    @classmethod
    def of(cls, layer: nn.Linear) -> NarrowLinear:
        """The layer itself, in a stand-in."""
        return cls._filled(layer, {}, {"kept.weight": layer.weight, "kept.bias": layer.bias})

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(x)

    def spec(self) -> dict[str, int]:
        return {}

    def dense(self) -> Tensor:
        return _exact(self.kept.weight)[0]

    @property
    def weight(self) -> Tensor:
        return self.kept.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (d_out,)."""
        return self.kept.bias


KINDS = (LowRankLinear, PivotedLinear, SplitRows, SplitColumns, NarrowLinear)
LAYERS: dict[str, type[CompressedLayer]] = {layer.kind: layer for layer in KINDS}


def stand_in(layer: nn.Linear, value: LowRank, factors: str) -> CompressedLayer:
    """What takes the place of a layer: the factors as they are (``plain``) or ``pivoted``, in the layer's dtype."""
    if factors == "pivoted":
        return PivotedLinear.from_factors(layer, pivoted(value))
    return LowRankLinear.from_factors(layer, value)
