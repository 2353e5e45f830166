r"""Which neurons of a feed-forward to leave out, and what the others then do in their place.

With h the neurons (what the last layer D of a feed-forward reads), G = E[h hᵀ] and H the output metric of the loss, leaving out
the neurons R and refitting what D does with the others, S, changes the loss, to second order, by

    ½ min_B tr(H (D − B) G (D − B)ᵀ),    B = 0 on R;    at the minimum    B_S = D G_{:S} G_{SS}⁻¹.

This is the unit in which ``kfac`` measures what a rank costs. Neurons go one by one, always the one that costs least beside those
that are gone: the optimal brain surgeon (Hassibi and Stork, 1993) for whole neurons, as in ZipLM (arXiv 2302.04089). The
refitted layer is MoDeGPT's Nyström step (arXiv 2408.09632).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsvd.linalg.budget import hull
from nsvd.linalg.kfac import cholesky

MOST = 0.5  # of the neurons of a feed-forward that may go
MULTIPLE = 8  # of neurons that are left, as hardware likes it

ROUNDS = 48  # all neurons are looked at so many times; in between, the cheapest are followed exactly
NEAR = 2  # among so many times as many as a round takes


class Removal(NamedTuple):
    """Neurons in the order in which they go, and the rise of the loss, in nats a token, when the first 0, 1, 2, … are gone."""

    order: Int[Tensor, " gone"]
    losses: Float[Tensor, " gone+1"]


class Neurons:
    """The last layer D (d_out, n) of a feed-forward, with the metrics of its inputs and outputs.

    Where the loss does not see the outputs, H = 0, all of them count alike, and no neuron costs anything, as in ``kfac``.
    G gets a ridge of ``mu`` times its own diagonal, so that one neuron much larger than the others does not decide theirs.

    Raises:
        ValueError: if the ridge is not positive: neurons that always go together could not be told apart.
        torch.linalg.LinAlgError: if H is not positive definite.
    """

    def __init__(
        self, D: Float[Tensor, "d_out n"], G: Float[Tensor, "n n"], H: Float[Tensor, "d_out ..."], *, mu: float
    ):
        if not mu > 0:
            raise ValueError(f"mu is {mu}, but to leave out neurons takes a positive ridge")
        self.D, size = D, G.diagonal().sqrt()
        self._size = torch.where(size > 0, size, 1.0)  # a neuron that was always 0 explains nothing
        self._seen = torch.where(size > 0, size, 0.0)
        self._C = G / self._size / self._size[:, None]
        self._C.fill_diagonal_(1.0 + mu)
        self._seen_by_loss = bool(H.any())
        H = H if self._seen_by_loss else torch.ones_like(D[:, 0])
        self._half = H.sqrt().diag() if H.ndim == 1 else cholesky(H.clone(), "the output metric").mT

    def removal(self, most: int) -> Removal:
        """The first ``most`` neurons to go, fewer than there are."""
        A, P = self._half @ (self.D * self._seen), torch.cholesky_inverse(torch.linalg.cholesky(self._C))
        n, order, losses = P.shape[0], [], [0.0]
        left = torch.ones(n, dtype=torch.bool, device=P.device)
        while len(order) < most:
            count = min(-(-n // ROUNDS), most - len(order))
            cost = torch.where(left, A.square().sum(0) / P.diagonal(), torch.inf)
            near = cost.topk(min(NEAR * count, n - len(order)), largest=False).indices
            picked, costs = _one_by_one(A[:, near], P[near][:, near], count)
            gone = near[picked]
            others = torch.cholesky_solve(P[gone], torch.linalg.cholesky(P[gone][:, gone]))
            A.addmm_(A[:, gone], others, alpha=-1)
            P.addmm_(P[:, gone], others, alpha=-1)
            left[gone] = False
            order += gone.tolist()
            losses += [losses[-1] + sum(costs[: i + 1]) / 2 for i in range(count)]
        rise = torch.tensor(losses, dtype=torch.float64) * self._seen_by_loss
        return Removal(torch.tensor(order, dtype=torch.int64), rise)

    def refitted(self, kept: Int[Tensor, " kept"]) -> Float[Tensor, "d_out kept"]:
        """What D becomes when only the ``kept`` neurons are left."""
        kept = kept.to(self.D.device)
        L = torch.linalg.cholesky(self._C[kept][:, kept])
        scaled = torch.cholesky_solve(self._C[kept] @ (self.D * self._size).mT, L).mT
        return scaled / self._size[kept]


def kept(
    removals: Mapping[str, Removal], sizes: Mapping[str, int], units: Mapping[str, int], goal: float
) -> dict[str, Int[Tensor, " kept"]]:
    """Which neurons are left of each feed-forward, of so many, when ``goal`` parameters are to go and no more.

    A neuron holds ``units`` parameters. At the margin the loss rises by the same everywhere, for each parameter.
    """
    edges = []
    for name, unit in units.items():
        corners = hull([(-unit * gone, rise, gone) for gone, rise in enumerate(removals[name].losses.tolist())])
        edges += [((b[1] - a[1]) / (a[0] - b[0]), a[0] - b[0], name, b[2]) for a, b in pairwise(corners)]
    gone = dict.fromkeys(units, 0)
    for _, freed, name, count in sorted(edges):
        if freed > goal:
            gone[name] += int(goal // units[name])
            break
        gone[name], goal = count, goal - freed
    return {
        name: _left(removals[name].order[: _rounded(sizes[name], count)], sizes[name]) for name, count in gone.items()
    }


def _rounded(n: int, count: int) -> int:
    """So many of n neurons, or a few less, that a multiple of ``MULTIPLE`` is left, if n is one."""
    return n - -(-(n - count) // MULTIPLE) * MULTIPLE if n % MULTIPLE == 0 else count


def _left(gone: Int[Tensor, " gone"], n: int) -> Int[Tensor, " kept"]:
    left = torch.ones(n, dtype=torch.bool)
    left[gone] = False
    return left.nonzero()[:, 0]


def _one_by_one(
    A: Float[Tensor, "d_out near"], P: Float[Tensor, "near near"], count: int
) -> tuple[list[int], list[float]]:
    """The ``count`` columns that go, each the cheapest after those before it, and twice the rise of the loss by each."""
    picked, costs = [], []
    for _ in range(count):
        cost = A.square().sum(0) / P.diagonal()
        cost[picked] = torch.inf
        j = int(cost.argmin())
        picked.append(j)
        costs.append(float(cost[j]))
        share = P[j] / P[j, j]
        A, P = A - torch.outer(A[:, j], share), P - torch.outer(P[j], share)
        P[j, j] = 1.0
    return picked, costs
