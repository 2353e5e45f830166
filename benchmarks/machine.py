"""What a measurement was made on, and medians of functions that take turns."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers

import nsvd
from nsvd.lab.speed import seconds


def described(device: str | torch.device) -> dict:
    """The machine and the versions: what goes into every line of results."""
    device = torch.device(device)
    told = {"system": f"{platform.system()} {platform.machine()}", "processor": _processor(), "cores": os.cpu_count()}
    told |= {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
    told |= {"threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    told |= {"load": [round(value, 2) for value in os.getloadavg()]} if hasattr(os, "getloadavg") else {}
    versions = {"nsvd": nsvd.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return told | {"python": platform.python_version()} | versions


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def medians(functions: Mapping[str, Callable[[], object]], repeat: int, device: str | torch.device) -> dict[str, float]:
    """Median seconds of each function over ``repeat`` rounds, in which they take turns, after a round that is not counted."""
    rounds = [{name: seconds(one, device) for name, one in functions.items()} for _ in range(repeat + 1)][1:]
    return {name: statistics.median(one[name] for one in rounds) for name in functions}
