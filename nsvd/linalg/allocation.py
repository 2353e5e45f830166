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
| ``spectrum_steps`` | it adds little relative truncation error for each parameter it removes | nothing beyond the decompositions |

The first is the sensitivity-based truncation rank searching of the ASVD paper (arXiv 2312.05821, section 3.4).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nsvd.linalg.factors import rank_for_ratio, saves_parameters

Shapes = Mapping[str, tuple[int, int]]  # (d_out, d_in) of every layer
Step = tuple[str, int]  # a layer and its rank from here on


def strs_steps(table: Iterable[tuple[str, float, float]], shapes: Shapes) -> list[Step]:
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
    return [(layer, rank_for_ratio(*shapes[layer], 1 - kept)) for layer, kept, _ in rows]


def spectrum_steps(spectra: Mapping[str, Float[Tensor, " _"]], shapes: Shapes, *, least: int = 1) -> list[Step]:
    r"""The order of a Lagrange multiplier: steps by relative error added for each parameter removed, ascending.

    With s = σ(W S) a layer of rank k has the relative error e(k) = Σ_{i>k} s_i² / Σ s_i² and k (d_out + d_in) parameters;
    dense it has none and d_out d_in. Descending s make e convex in k, so the lower convex hull of these points goes from
    the dense layer straight to one rank k*, and from there in single ranks down to ``least``. After any number of steps
    Σ e is minimal among all choices of ranks with no more parameters (Everett's theorem); the ranks that ``cut`` gives
    back keep the target, at most one layer off the hull.
    """
    scored = []
    for layer, s in spectra.items():
        (d_out, d_in), squares = shapes[layer], s.double().square().cpu()
        most = math.ceil(d_out * d_in / (d_out + d_in)) - 1  # the largest rank that saves parameters
        if most < least:
            continue
        tails = squares.flip(0).cumsum(0).flip(0)  # Σ_{i>k} s_i² at k
        error = tails[least : most + 1] / tails[0].clamp(min=torch.finfo(tails.dtype).tiny)
        k = torch.arange(least, most + 1, dtype=torch.float64)
        chord = error / (d_out * d_in - k * (d_out + d_in))
        first = int(chord.argmin())
        slopes = torch.cat([(error[:first] - error[1 : first + 1]) / (d_out + d_in), chord[first, None]])
        scored += [(slope, -rank, layer) for rank, slope in enumerate(slopes.tolist(), least)]
    return [(layer, -rank) for _, rank, layer in sorted(scored)]


def cut(steps: Sequence[Step], shapes: Shapes, ratio: float) -> dict[str, int]:
    """Ranks after the fewest steps that remove at least ``ratio`` of all parameters; layers not named stay dense.

    Raises:
        ValueError: if ``ratio`` is outside [0, 1), or even all steps remove less.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}, but the fraction of parameters removed lies in [0, 1)")
    before = n_params({}, shapes)
    budget = math.floor(round(before * (1 - ratio), 6))  # 1 − 0.3 is not exactly 0.7

    def met(c: int) -> bool:
        return n_params(after(steps[:c]), shapes) <= budget

    c = bisect_left(range(len(steps) + 1), True, key=met)
    ranks = after(steps[:c])
    if c > len(steps):
        most = 1 - n_params(ranks, shapes) / before
        raise ValueError(f"ratio {ratio} is out of reach: the smallest candidate ranks remove {most:.4f}")
    if c:
        layer = steps[c - 1][0]
        ranks[layer] += (budget - n_params(ranks, shapes)) // sum(shapes[layer])
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


def n_params(ranks: Mapping[str, int], shapes: Shapes) -> int:
    """Parameters of all layers; one without a rank, or whose factors would not be smaller, counts as dense."""
    factored = {layer: k for layer, k in ranks.items() if saves_parameters(*shapes[layer], k)}
    return sum(factored[layer] * (o + i) if layer in factored else o * i for layer, (o, i) in shapes.items())
