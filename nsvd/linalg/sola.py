r"""SoLA: the prime neurons of a feed-forward stay dense, the marginal ones are factored (AAAI 2025, arXiv 2604.03258).

A feed-forward computes W_down h with h_i = act(gate_i x) · up_i x, or h_i = act(up_i x): neuron i is a row of gate and of up
and a column of down. The activation works on each neuron by itself, so all of them may change places together: prime
neurons, those of the largest mean |h_i|, come first, and the others form one contiguous block of each matrix,

    gate, up = [prime rows; block],    down = [prime columns, block].

The block is factored by any method for matrices; that of ``down`` sees the second moment of the marginal neurons only.
Everything else of a model is a block without primes. ``nsvd.linalg.sola_ranks`` shares the ranks out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsvd.linalg.factors import LowRank
from nsvd.linalg.moments import Moments

ROWS, COLUMNS = 0, 1
PUBLISHED = {  # the paper's options
    "prime": 0.15,  # fraction of the neurons that stay dense
    "inner": "asvd-1",  # method of the blocks
    "grid": 16,  # ranks are multiples of it
    "floor": 0.9,  # a block that retains less energy is not lowered further
    "keep_outer": 2,  # blocks of the model, at each end, that stay dense
    "compress_v": False,  # whether the value projections are compressed
    "o_from": 0.3,  # ratio from which on the output projections are
}


@dataclass(frozen=True)
class Block:
    """The marginal rows (``dim`` 0) or columns (``dim`` 1) of W, ``order[prime:]``; all of W where ``order`` is None."""

    order: Int[Tensor, " d_ff"] | None = None
    prime: int = 0
    dim: int = ROWS

    def permute(self, W: Tensor) -> Tensor:
        """W, or a bias along ``dim``, with its prime neurons in front."""
        return W if self.order is None else W.index_select(self.dim, self.order.to(W.device))

    def take(self, W: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "_ _"]:
        """The block of W that is factored."""
        return self.permute(W).narrow(self.dim, self.prime, W.shape[self.dim] - self.prime)

    def moments(self, moments: Moments) -> Moments:
        """What the block sees: marginal columns their own inputs, marginal rows the gradients of their own outputs."""
        if self.order is None:
            return moments
        G, scales, H, rest = moments.G, moments.mean_abs, moments.H, self.order[self.prime :].to(moments.G.device)
        if self.dim == COLUMNS:
            return replace(moments, G=G[rest][:, rest], mean_abs=None if scales is None else scales[rest])
        return moments if H is None else replace(moments, H=H[rest] if H.ndim == 1 else H[rest][:, rest])

    def shape(self, d_out: int, d_in: int) -> tuple[int, int]:
        """(rows, columns) of the block of a d_out × d_in matrix."""
        return (d_out - self.prime, d_in) if self.dim == ROWS else (d_out, d_in - self.prime)

    def join(self, W: Float[Tensor, "d_out d_in"], factors: LowRank) -> Split:
        """W with its block replaced by factors."""
        return Split(self, self.permute(W).narrow(self.dim, 0, self.prime), factors)


WHOLE = Block()  # a matrix without neurons: all of it is factored


@dataclass(frozen=True)
class Split:
    """Ŵ: the prime rows or columns of W as they are, factors of the others."""

    block: Block
    prime: Float[Tensor, "_ _"]
    marginal: LowRank

    @property
    def rank(self) -> int:
        """That of the factors."""
        return self.marginal.rank

    @property
    def n_params(self) -> int:
        """Prime entries and factors."""
        return self.prime.numel() + self.marginal.n_params

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """Ŵ in the order of W."""
        permuted = torch.cat([self.prime, self.marginal.dense()], self.block.dim)
        if self.block.order is None:
            return permuted
        return permuted.index_select(self.block.dim, self.block.order.argsort().to(permuted.device))

    def to(self, *args, **kwargs) -> Split:
        """All tensors moved or cast as ``Tensor.to`` does."""
        return Split(self.block, self.prime.to(*args, **kwargs), self.marginal.to(*args, **kwargs))


def by_size(mean_abs: Float[Tensor, " d_ff"]) -> Int[Tensor, " d_ff"]:
    """Neurons by mean |h_i|, descending; of equals the first."""
    return mean_abs.argsort(descending=True, stable=True)


def n_prime(d_ff: int, prime: float) -> int:
    """How many neurons a fraction is; raises ``ValueError`` if it is outside [0, 1) or leaves no marginal neuron."""
    if not 0 <= prime < 1:
        raise ValueError(f"prime is {prime}, but the fraction of the neurons that stay dense lies in [0, 1)")
    if round(prime * d_ff) == d_ff:
        raise ValueError(f"prime = {prime} of {d_ff} neurons leaves none to factor")
    return round(prime * d_ff)


def accumulated(values: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Share of the sum that the i + 1 largest values hold: the paper's Figure 2, with mean |h| or mean h²."""
    ordered = values.sort(descending=True).values
    return ordered.cumsum(0) / ordered.sum()


def overlap(ours: Float[Tensor, " d_ff"], theirs: Float[Tensor, " d_ff"], prime: float) -> float:
    """Share of the prime neurons by one mean |h| that are prime by the other, too; ``prime`` itself by chance."""
    p = n_prime(len(ours), prime)
    return len(set(by_size(ours)[:p].tolist()) & set(by_size(theirs)[:p].tolist())) / p
