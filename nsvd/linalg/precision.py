"""float64, where there is such a thing."""

from __future__ import annotations

import torch
from torch import Tensor


def double(x: Tensor) -> Tensor:
    """x in float64: where it lies, or on the CPU where that device has no float64 (as Apple's GPUs), for which torch raises."""
    try:
        return x.double()
    except TypeError:
        return x.cpu().double()


def home(x: Tensor) -> torch.device:
    """The device on which ``double`` puts x."""
    return double(x.detach()[:0]).device
