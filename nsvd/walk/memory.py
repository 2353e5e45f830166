"""Memory that is free goes back to the system: what a process takes does not grow with the number of blocks it has done."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

# Of so many matrix products oneDNN, and its wrapper in torch, keep the code, some 0.4 MB each. They would keep 1024, and every
# compressed layer has shapes of its own.
SHAPES = 64

for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read when the first product is taken
    os.environ.setdefault(_name, str(SHAPES))


WAITING = 2**33  # bytes of a GPU that hidden states may wait in


def room_on(device: torch.device) -> int:
    """Bytes of a device that hidden states may wait in: at most a quarter of what is free on a GPU, none elsewhere."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return min(WAITING, torch.cuda.mem_get_info(device)[0] // 4)


def give_back() -> None:
    """Return free memory to the system, where that is Linux: neither glibc nor the MKL inside torch does so by itself."""
    for act in _acts():
        act()


@cache
def _acts() -> list[Callable[[], object]]:
    if sys.platform != "linux":
        return []
    found: list[tuple[Any, *tuple[int, ...]]] = [(getattr(ctypes.CDLL(None), "malloc_trim", None), 0)]
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if library.is_file():
        found += [(getattr(ctypes.CDLL(str(library)), "mkl_serv_free_buffers", None),)]
    return [partial(act, *args) for act, *args in found if act is not None]
