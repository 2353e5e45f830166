"""What the options of the methods may be: one table for all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True)
class Range:
    """The values of an option: numbers from ``least`` to ``most``, the latter left out where it is ``open``, all finite."""

    meaning: str  # the end of a sentence that begins "… is 2, but"
    most: float = math.inf
    least: float = 0.0
    open: bool = False
    whole: bool = False

    def holds(self, value: object) -> bool:
        """Whether the value is one of them."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number = float(value)
        below = number < self.most if self.open else number <= self.most
        return math.isfinite(number) and self.least <= number and below


RIDGE = "a ridge is not negative, and finite"
RANGES = {
    "k1": Range("it is the fraction of the rank for the outer step, in [0, 1]", 1.0),
    "alpha": Range("the exponent of the channels' scales lies in [0, 2]", 2.0),
    "mu": Range(RIDGE),
    "eta": Range(RIDGE),
    "prime": Range("the fraction of the neurons that stay dense lies in [0, 1)", 1.0, open=True),
    "grid": Range("ranks are multiples of 1 or more", least=1.0, whole=True),
    "floor": Range("the share of its energy that a block retains lies in [0, 1]", 1.0),
    "keep_outer": Range("it counts blocks", whole=True),
    "o_from": Range("it is a fraction of the parameters removed, in [0, 1]", 1.0),
}
KINDS = {"compress_v": (bool, "it is True or False"), "inner": (str, "it is the name of a method")}


def checked(name: str, value: object) -> object:
    """The value, a number as Python's own; raises ``ValueError`` unless an option may have it."""
    if name in RANGES:
        fits, meaning = RANGES[name].holds(value), RANGES[name].meaning
    else:
        kind, meaning = KINDS[name]
        fits = isinstance(value, kind)
    if not fits:
        raise ValueError(f"{name} is {value}, but {meaning}")
    if name in RANGES and isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    return value
