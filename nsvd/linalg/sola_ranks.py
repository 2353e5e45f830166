r"""SoLA's adaptive component-wise ranks (AAAI 2025, arXiv 2604.03258), for the blocks of ``nsvd.linalg.sola``.

With s = σ(W S) a block of rank r retains f(r) = Σ_{i≤r} s_i² / Σ s_i². ``search`` lowers ranks on a grid, greedily; ``common``
gives all layers of one kind the same rank. Both hold Σ params ≤ budget, where r (d_out + d_in) parameters that would not be
fewer than d_out d_in count as the dense block. The paper does not say which quantile is the common rank; here it is the largest
one that fits, the same for all kinds, and what is then left of the budget buys further grid steps, so that not one more step
of a kind would fit.
``even`` is the reference: the same fraction removed from every layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from nsvd.linalg.budget import Shapes
from nsvd.linalg.factors import saves_parameters
from nsvd.linalg.precision import double

Spectra = Mapping[str, Float[Tensor, " _"]]


class Move(NamedTuple):
    """One step of the search: a layer's new rank, what it retains, the clamp at that time, and all parameters after it."""

    layer: str
    rank: int
    retained: float
    clamp: float
    params: int


def search(
    spectra: Spectra,
    shapes: Shapes,
    budget: int,
    *,
    grid: int = 16,
    least: int = 1,
    start: float = 0.999,
    clamp: float = 0.001,
    relax: float = 0.0002,
    floor: float = 0.9,
) -> tuple[dict[str, int], list[Move]]:
    """Ranks by steps down a grid until the budget is met, and the steps taken.

    Every layer starts at the smallest multiple of ``grid`` that retains ``start``. The next step is the one with the
    smallest drop of f per parameter; a step that drops f by more than ``clamp`` waits until no other is left and the clamp
    is relaxed by ``relax``; a layer that retains less than ``floor`` goes no further. The ranks meet the budget, and without
    the last step would not.

    Raises:
        ValueError: if every layer is below ``floor`` or at its least rank, and more than the budget is left.
    """
    lowest = on_grid(least, grid)
    f = {layer: retained(s) for layer, s in spectra.items()}
    ranks = {layer: _start(curve, start, grid, lowest) for layer, curve in f.items()}
    params = sum(stored(shapes[layer], k) for layer, k in ranks.items())
    trajectory, waiting = [], list(ranks)
    steps: list[tuple[float, str]] = []

    def price(layer: str) -> tuple[float, float, int]:
        """Drop of f per parameter, drop of f, and the rank below."""
        k = ranks[layer]
        below = grid * ((k - 1) // grid)
        drop = f[layer][k] - f[layer][below]
        return drop / ((k - below) * sum(shapes[layer])), drop, below

    while params > budget:
        if not steps:
            waiting = [layer for layer in waiting if f[layer][ranks[layer]] >= floor and price(layer)[2] >= lowest]
            if not waiting:
                raise ValueError(
                    f"the search stops at {params:,} parameters, above the {budget:,} allowed: "
                    f"every block retains less than floor = {floor} or has rank {lowest}"
                )
            nearest = min(price(layer)[1] for layer in waiting)
            if nearest > clamp:
                clamp += relax * math.ceil((nearest - clamp) / relax)
            steps, waiting = [(price(layer)[0], layer) for layer in waiting], []
            heapify(steps)
        layer = heappop(steps)[1]
        _, drop, below = price(layer)
        if drop > clamp or below < lowest or f[layer][ranks[layer]] < floor:
            waiting.append(layer)
            continue
        params += stored(shapes[layer], below) - stored(shapes[layer], ranks[layer])
        ranks[layer] = below
        trajectory.append(Move(layer, below, f[layer][below], clamp, params))
        heappush(steps, (price(layer)[0], layer))
    return ranks, trajectory


def common(
    ranks: Mapping[str, int], kinds: Mapping[str, str], spectra: Spectra, shapes: Shapes, budget: int, *, grid: int = 16
) -> dict[str, int]:
    """One rank for all layers of a kind: the largest quantile q of their ranks that fits, then the best steps up that fit.

    ``budget`` is at least what ``ranks`` take. Of the steps up the one that retains most for each parameter comes first.
    """
    f = {layer: retained(s) for layer, s in spectra.items()}
    groups: dict[str, list[str]] = {}
    for layer in ranks:
        groups.setdefault(kinds[layer], []).append(layer)

    def cost(kind: str, k: int) -> int:
        return sum(stored(shapes[layer], k) for layer in groups[kind])

    def at(q: float) -> dict[str, int]:
        return {kind: _quantile(sorted(ranks[layer] for layer in names), q, grid) for kind, names in groups.items()}

    def spare(chosen: Mapping[str, int]) -> int:
        return budget - sum(cost(kind, k) for kind, k in chosen.items())

    low, high = 0.0, 1.0
    for _ in range(30):
        q = (low + high) / 2
        low, high = (q, high) if spare(at(q)) >= 0 else (low, q)
    chosen = at(1.0) if spare(at(1.0)) >= 0 else at(low)
    room = spare(chosen)

    def worth(kind: str) -> tuple[float, int]:
        """What a step up of a kind retains for each parameter, and its parameters."""
        k = chosen[kind]
        more = sum(f[n][min(k + grid, len(f[n]) - 1)] - f[n][min(k, len(f[n]) - 1)] for n in groups[kind])
        price = cost(kind, k + grid) - cost(kind, k)
        return more / max(price, 1), price

    while fitting := [(*worth(kind), kind) for kind in groups if 0 < worth(kind)[1] <= room]:
        _, price, kind = max(fitting)
        chosen[kind] += grid
        room -= price
    return {layer: chosen[kinds[layer]] for layer in ranks}


def _quantile(ordered: list[int], q: float, grid: int) -> int:
    """The interpolated q-quantile, rounded down to the grid, but not below the smallest."""
    place = q * (len(ordered) - 1)
    i = int(place)
    between = ordered[i] + (place - i) * (ordered[min(i + 1, len(ordered) - 1)] - ordered[i])
    return max(ordered[0], grid * int(between / grid + 1e-9))


def even(shapes: Shapes, whole: Mapping[str, int], budget: int) -> dict[str, int]:
    """Ranks of the blocks when all layers lose the same share of their ``whole`` parameters, primes included.

    ``budget`` counts blocks and primes. Raises ``ValueError`` naming a layer whose primes leave no rank.
    """
    share, ranks = budget / sum(whole.values()), {}
    for layer, (d_out, d_in) in shapes.items():
        prime = whole[layer] - d_out * d_in
        ranks[layer] = int(round((share * whole[layer] - prime) / (d_out + d_in), 9))
        if ranks[layer] < 1:
            raise ValueError(f"layer {layer}: {share:.1%} of its parameters leave no rank beside {prime:,} prime ones")
    return ranks


def on_grid(k: int, grid: int) -> int:
    """The smallest multiple of ``grid`` from k on; raises ``ValueError`` unless the grid is 1 or more."""
    if grid < 1:
        raise ValueError(f"grid is {grid}, but ranks are multiples of 1 or more")
    return grid * math.ceil(k / grid)


def retained(s: Float[Tensor, " m"]) -> list[float]:
    """f(0) = 0 … f(m) = 1; a block that no input reaches loses nothing, f = 1."""
    squares = double(s).square()
    total = squares.sum()
    return [0.0, *(squares.cumsum(0) / total).tolist()] if total > 0 else [1.0] * (len(s) + 1)


def stored(shape: tuple[int, int], k: int) -> int:
    """Parameters of a block at rank k: of its factors, or its own where these would not be fewer."""
    return k * sum(shape) if saves_parameters(*shape, k) else shape[0] * shape[1]


def _start(curve: list[float], least: float, grid: int, lowest: int) -> int:
    k = next((k for k, f in enumerate(curve) if f >= least), len(curve) - 1)
    return min(max(on_grid(k, grid), lowest), len(curve) - 1)
