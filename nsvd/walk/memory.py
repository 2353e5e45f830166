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

# What is given back is new memory the next time. Linux then clears it page by page, unless torch asks for large pages (2 MB). Torch
# reads this once, when it makes its first tensor on the CPU.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


WAITING = 2**34  # bytes of a GPU that hidden states may wait in


class Room:
    """So many bytes of a device for tensors that wait: those that find room stay where they are, and nobody changes them."""

    def __init__(self, size: int, device: torch.device):
        self._left, self._device = size, device

    def take(self, tensor: torch.Tensor) -> bool:
        """Whether there was room for a tensor; then it is taken. One that lies elsewhere finds none."""
        fits = tensor.device == self._device and tensor.nbytes <= self._left
        self._left -= tensor.nbytes if fits else 0
        return fits

    def leave(self, tensor: torch.Tensor) -> None:
        """Give back what a tensor has taken."""
        self._left += tensor.nbytes


def room_on(device: torch.device) -> Room:
    """Room for hidden states: at most a quarter of what is free on a GPU, with what torch holds there unused; none elsewhere."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Room(0, device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Room(min(WAITING, free // 4), device)


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
