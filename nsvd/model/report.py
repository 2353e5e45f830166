"""What reports are made of: time, memory, versions, errors."""

from __future__ import annotations

import platform
import sys
import time

import torch
import transformers
from torch import Tensor, nn

from nsvd.linalg.errors import calibration_loss, weight_error
from nsvd.linalg.precision import double
from nsvd.model.moments import Statistics
from nsvd.version import __version__


def versions() -> dict[str, str]:
    """Versions of what computed a number."""
    return {
        "nsvd": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def relative_errors(layer: nn.Linear, dense: Tensor, stats: Statistics | None, name: str) -> dict[str, float]:
    """Relative errors ‖W − Ŵ‖ / ‖W‖ and ‖(W − Ŵ) X‖ / ‖W X‖ of ``dense``, Ŵ."""
    W = double(layer.weight)
    dense, size = double(dense).to(W.device), W.square().sum().item()
    row = {"weight_error": (weight_error(W, dense) / size) ** 0.5 if size else 0.0}  # a layer of zeros is met exactly
    if stats is not None and name in stats:
        G = stats[name].G.to(W.device)
        whole = calibration_loss(W, torch.zeros_like(W), G)
        row["calibration_error"] = (max(calibration_loss(W, dense, G), 0.0) / whole) ** 0.5 if whole else 0.0
    return row


class Clock:
    """Seconds by stage."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def peak_memory() -> int | None:
    """Bytes at the highest: of the GPU where there is one, else of the process so far; None where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
