r"""LEMS: the ranks of an integer program over a modelled error of every layer (arXiv 2610.32878).

With only layer l cut to a small rank r₀, the divergence of the model from the dense one is KL_l. At other ranks it is taken to
fall as the tail of the layer's singular values does,

    e_l(r) = KL_l · tail_l(r) / tail_l(r₀),    tail_l(r) = Σ_{i>r} s_i²,

and errors of layers are taken to add up. Every layer stays dense, with no error, or has one of a few ranks; the program finds the
choice of least Σ_l e_l within the parameters that may be left. The paper also weighs the errors by the depth of their block. That
term was worth nothing where it was tried, with the authors' own code on a model of 135 M parameters, and is left out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from nsvd.linalg.budget import Shapes
from nsvd.linalg.factors import largest_rank, n_params, remaining, saves_parameters
from nsvd.linalg.precision import double

KEPT = tuple(round(0.3 + 0.05 * i, 2) for i in range(14))  # of a layer's parameters, the candidates: 0.3 to 0.95
MULTIPLE = 8  # ranks are multiples of it
PROBED = 0.1  # of a layer's parameters, kept where its divergence is measured: a tenth of the break-even rank of plain factors


def lems_ranks(
    measured: Mapping[str, tuple[int, float]],
    spectra: Mapping[str, Float[Tensor, " _"]],
    shapes: Shapes,
    ratio: float,
    factors: str = "plain",
    *,
    kept: Sequence[float] = KEPT,
    multiple: int = MULTIPLE,
    least: int = 1,
) -> dict[str, int]:
    """Ranks of least modelled error that remove at least ``ratio`` of all parameters; layers that are not named stay dense.

    ``measured`` has of every layer the rank r₀ that it was cut to, and the divergence that this made, in nats a token.

    Raises:
        ValueError: if even the smallest candidates remove less, or a candidate or ``multiple`` means nothing.
    """
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}, but ranks are multiples of 1 or more")
    budget, layers = remaining(sum(map(math.prod, shapes.values())), ratio), list(shapes)
    choices = []  # (number of the layer, rank or None, error, parameters)
    for number, layer in enumerate(layers):
        choices.append((number, None, 0.0, math.prod(shapes[layer])))
        k0, divergence = measured[layer]
        tails = _tails(spectra[layer])
        unit = max(divergence, 0.0) / tails[k0] if tails[k0] else 0.0
        for k in candidates(shapes[layer], kept, factors, multiple=multiple, least=least):
            choices.append((number, k, unit * tails[k], n_params(*shapes[layer], k, factors)))
    number, ranks, errors, sizes = zip(*choices, strict=True)
    least_size = sum(min(size for i, size in zip(number, sizes, strict=True) if i == j) for j in range(len(layers)))
    if least_size > budget:
        most = 1 - least_size / sum(map(math.prod, shapes.values()))
        raise ValueError(f"ratio {ratio} is out of reach: the smallest candidate ranks remove {most:.4f}")
    taken = _program(np.array(number), np.array(errors), np.array(sizes), budget)
    return {layers[number[i]]: ranks[i] for i in taken if ranks[i] is not None}


def candidates(
    shape: tuple[int, int], kept: Sequence[float], factors: str = "plain", *, multiple: int = MULTIPLE, least: int = 1
) -> list[int]:
    """The ranks that a layer may have beside being dense: those of the kept fractions, rounded down to multiples."""
    found = set()
    for fraction in kept:
        if not 0 < fraction < 1:
            raise ValueError(f"kept fraction {fraction} is not in (0, 1)")
        k = largest_rank(*shape, 1 - fraction, factors) // multiple * multiple
        if k >= max(1, least) and saves_parameters(*shape, k, factors):
            found.add(k)
    return sorted(found)


def _tails(s: Tensor) -> list[float]:
    squares = double(s).square().cpu()
    return [*squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]


def _program(number: np.ndarray, errors: np.ndarray, sizes: np.ndarray, budget: int) -> list[int]:
    """The choices taken: one for each number, of least Σ errors with Σ sizes ≤ budget."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes long to import, and is for this alone

    one_each = np.zeros((number.max() + 1, len(number)))
    one_each[number, np.arange(len(number))] = 1
    unit = np.gcd.reduce(sizes)  # a share of it is no more than nothing: the solver compares up to 1e-6
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes / unit, ub=budget // unit)]

    def solved(most: float) -> list[int]:
        """In units of ``most``, and without the choices that are worse than that alone: the solver stops 1e-6 above the least."""
        result = milp(
            np.minimum(errors / most, 1.0), constraints=limits, bounds=Bounds(0, errors <= most),  # pyright: ignore[reportArgumentType]  # arrays are fine
            integrality=np.ones(len(number)), options={"mip_rel_gap": 1e-6},
        )  # fmt: skip
        if result.x is None:
            raise ValueError(f"the integer program was not solved: {result.message}")
        return [int(i) for i in np.flatnonzero(result.x > 0.5)]

    taken = solved(errors.max() or 1.0)
    least = errors[taken].sum()
    return solved(least) if 0 < least < errors.max() else taken
