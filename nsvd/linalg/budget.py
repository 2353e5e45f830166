r"""Which rank each layer gets: an order of steps, and a cut through it that meets a target.

A *step* (layer, rank) lowers one layer to a rank. An allocation orders all steps, the harmless ones first, and takes the
first c of them: every layer then has the smallest rank that a step taken names, and stays dense where none does. The
number of parameters never grows with c, so bisection finds the least c with

    Σ params ≤ (1 − ratio) Σ d_out d_in,

and the layer of step c is given back as many ranks as this target leaves room for. So the target is always met, never by
more than one rank of that layer, and with one step less it would be missed. The two orders:

| name | a step is harmless if | costs |
|---|---|---|
| ``strs_steps`` | the model's calibration loss is low with this one layer truncated | a forward pass over the text a step |
| ``spectrum_steps`` | it adds little truncation error for each parameter it removes | nothing beyond the decompositions |

The first is the sensitivity-based truncation rank searching of the ASVD paper (arXiv 2312.05821, section 3.4). What a rank
costs depends on how the factors are stored, see ``nsvd.linalg.factors``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from nsvd.linalg.factors import n_params, rank_for_ratio, remaining, saves_parameters
from nsvd.linalg.precision import double

Shapes = Mapping[str, tuple[int, int]]  # (d_out, d_in) of every layer
Step = tuple[str, int]  # a layer and its rank from here on


def strs_steps(table: Iterable[tuple[str, float, float]], shapes: Shapes, factors: str = "plain") -> list[Step]:
    """The order of STRS: all (layer, kept fraction of its parameters, score) by score, ascending.

    The score is the calibration perplexity with this one layer truncated, or anything that grows with it, such as the
    mean negative log-likelihood. Of equal scores the larger kept fraction comes first, then the name decides.

    Raises:
        ValueError: if a score is NaN, a layer unknown, or a kept fraction leaves rank 0 or is not in (0, 1).
    """
    rows = sorted(table, key=lambda row: (row[2], -row[1], row[0]))
    for layer, kept, score in rows:
        if layer not in shapes:
            raise ValueError(f"the sensitivity table names a layer {layer}, which is not to be compressed")
        if not 0 < kept < 1:
            raise ValueError(f"layer {layer}: kept fraction {kept} is not in (0, 1)")
        if math.isnan(score):
            raise ValueError(f"layer {layer}: the score at kept fraction {kept} is NaN")
    return [(layer, rank_for_ratio(*shapes[layer], 1 - kept, factors)) for layer, kept, _ in rows]


def spectrum_steps(
    spectra: Mapping[str, Float[Tensor, " _"]],
    shapes: Shapes,
    factors: str = "plain",
    *,
    least: int = 1,
    relative: bool = True,
) -> list[Step]:
    r"""The order of a Lagrange multiplier: steps by error added for each parameter removed, ascending.

    With s = σ(W S) a layer of rank k has the error e(k) = Σ_{i>k} s_i², relative to Σ s_i² unless ``relative`` is off, because
    the squares are in one unit for all layers already. Dense it has none. The lower convex hull of all (parameters, error) of a
    layer is walked from the dense layer down to rank ``least``; its edges, of all layers, are sorted by slope. After any
    number of steps Σ e is minimal among all choices of ranks with no more parameters (Everett's theorem); the ranks that
    ``cut`` gives back keep the target, at most one layer off the hull.
    """
    scored = []
    for layer, s in spectra.items():
        (d_out, d_in), squares = shapes[layer], double(s).square().cpu()
        tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        unit = tails[0].clamp(min=torch.finfo(tails.dtype).tiny) if relative else 1.0
        errors = (tails / unit).tolist()
        saving = [k for k in range(least, len(s)) if saves_parameters(d_out, d_in, k, factors)]
        points = [(d_out * d_in, 0.0, 0)] + [
            (n_params(d_out, d_in, k, factors), errors[k], k) for k in reversed(saving)
        ]
        corners = hull(points)
        for (size, error, _), (less, more, k) in pairwise(corners):
            scored.append(((more - error) / (size - less), -k, layer))
    return [(layer, -rank) for _, rank, layer in sorted(scored)]


def hull(points: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """Those of the points, (size, error, …) by falling size, that lie on the lower convex hull."""

    def slope(a, b) -> float:
        return (b[1] - a[1]) / (a[0] - b[0])

    corners: list[tuple[int, float, int]] = []
    for point in points:
        while len(corners) > 1 and slope(corners[-1], point) < slope(corners[-2], corners[-1]):
            corners.pop()
        corners.append(point)
    return corners


def cut(steps: Sequence[Step], shapes: Shapes, ratio: float, factors: str = "plain") -> dict[str, int]:
    """Ranks after the fewest steps that remove at least ``ratio`` of all parameters; layers not named stay dense.

    Raises:
        ValueError: if ``ratio`` is outside [0, 1), or even all steps remove less.
    """
    before = total({}, shapes)
    budget = remaining(before, ratio)

    def met(c: int) -> bool:
        return total(after(steps[:c]), shapes, factors) <= budget

    c = bisect_left(range(len(steps) + 1), True, key=met)
    ranks = after(steps[:c])
    if c > len(steps):
        most = 1 - total(ranks, shapes, factors) / before
        raise ValueError(f"ratio {ratio} is out of reach: the smallest candidate ranks remove {most:.4f}")
    if c:
        layer = steps[c - 1][0]
        shape = shapes[layer]
        limit = budget - total(ranks, shapes, factors) + n_params(*shape, ranks[layer], factors)
        while saves_parameters(*shape, k := ranks[layer] + 1, factors) and n_params(*shape, k, factors) <= limit:
            ranks[layer] = k
    return ranks


def cut_where(steps: Sequence[Step], admissible: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """Ranks after the most steps that a measurement still admits, by bisection.

    For a target that is not counted but measured, such as a perplexity. ``admissible`` is called about log₂(steps) times;
    what is returned was admitted. If it is not monotone there may be a later cut that would be admitted, too.

    Raises:
        ValueError: if not even the dense model (no ranks) is admitted.
    """
    if not admissible({}):
        raise ValueError("the target is out of reach: not even the dense model meets it")
    good, bad = 0, len(steps) + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        if admissible(after(steps[:middle])):
            good = middle
        else:
            bad = middle
    return after(steps[:good])


def after(steps: Iterable[Step]) -> dict[str, int]:
    """The smallest rank that the steps name for each layer."""
    ranks: dict[str, int] = {}
    for layer, k in steps:
        ranks[layer] = min(k, ranks.get(layer, k))
    return ranks


def total(ranks: Mapping[str, int], shapes: Shapes, factors: str = "plain") -> int:
    """Parameters of all layers; one without a rank, or whose factors would not be smaller, counts as dense."""
    return sum(size(shape, ranks.get(layer, min(shape)), factors) for layer, shape in shapes.items())


def size(shape: tuple[int, int], k: int, factors: str = "plain") -> int:
    """Parameters of one layer: of its factors of rank k, or of the dense matrix where they would not be smaller."""
    return n_params(*shape, k, factors) if saves_parameters(*shape, k, factors) else math.prod(shape)
