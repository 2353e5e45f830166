"""Several processes that work as one: each takes its share of the windows and of the layers, and all come to the same numbers.

``torchrun`` starts them, ``together`` joins them. Outside of it, and in a process that was started alone, there is one process:
then every function here gives back what it was given, and whoever calls them needs no second way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(minutes=60)  # one process may decompose for so long while the others wait
BEAT, SILENT = 0.5, 5.0  # seconds between two signs of life, and without one after which a process has ended
VISIBLE = 60.0  # seconds within which a file that one process has written is seen by the others


@dataclass
class _Joined:
    """This process among the others, and the store through which they tell of themselves."""

    rank: int
    count: int
    store: dist.Store
    over: Event = field(default_factory=Event)


_joined: _Joined | None = None


@contextmanager
def together(device: str = "auto", *, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Inside, the processes that torchrun has started work as one: all of them call the same functions with the same arguments.

    They talk through gloo, and about tensors on a GPU through NCCL; each process takes the GPU of its number, and ``cuda`` means
    this one. An error in one of them ends all: its own message names its rank, and the others raise ``ConnectionError``
    with the same sentence when they wait for it next, or, where a process is killed, with its rank.

    Raises:
        ValueError: if there are more processes than GPUs, or ``device`` is one GPU for all.
    """
    global _joined
    alone = int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or dist.is_initialized()
    if _joined is not None or alone:
        yield
        return
    backend = _backend(device)
    store, rank, count = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    _joined = _Joined(rank, count, dist.PrefixStore("nsvd", store))
    Thread(target=_signs_of_life, args=(_joined,), daemon=True).start()
    failed = False
    try:
        yield
    except BaseException as error:
        failed = True
        _tell(_joined, error)
        raise
    finally:
        joined, _joined = _joined, None
        joined.over.set()
        dist.destroy_process_group()
        if failed:
            _part(joined)


def rank() -> int:
    """The number of this process; 0 writes what all have found."""
    return 0 if _joined is None else _joined.rank


def count() -> int:
    """How many processes there are."""
    return 1 if _joined is None else _joined.count


def mine(items: Sequence[T] | Tensor) -> Sequence[T] | Tensor:
    """The items, or rows, that are this process's."""
    return items[rank() :: count()]


def in_turn(parts: Sequence[Sequence[T]]) -> list[T]:
    """All items in their order, from those of every process as ``mine`` has dealt them."""
    total = sum(map(len, parts))
    return [parts[number % len(parts)][number // len(parts)] for number in range(total)]


def dealt(costs: Mapping[str, float]) -> dict[str, int]:
    """The process for each piece of work: the dearest first, each to the process that has least to do so far."""
    loads, owners = [0.0] * count(), {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return {name: owners[name] for name in costs}


def share(total: int, most: int) -> int:
    """How many of ``total`` windows are read at a time, ``most`` at the most, so that every process has some; 1 at least."""
    return max(1, min(most, -(-total // count())))


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if _joined is None:
        return [value]
    found: list = [None] * _joined.count
    _wait_for(_joined, dist.all_gather_object, found, value)
    return found


def same(value: T, source: int = 0) -> T:
    """The value of one process, in all. Tensors in it have to be on the CPU."""
    if _joined is None:
        return value
    box = [value]
    _wait_for(_joined, dist.broadcast_object_list, box, src=source)
    return box[0]


def summed(tensor: Tensor | None) -> Tensor | None:
    """The sum over all processes, written to the tensor. A process with nothing to add gives None."""
    if _joined is None:
        return tensor
    forms = gathered(None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device.type))
    form = next((form for form in forms if form is not None), None)
    if form is None:
        return None
    if tensor is None:
        tensor = torch.zeros(form[0], dtype=form[1], device=form[2])
    tensor = tensor.contiguous()
    _wait_for(_joined, dist.all_reduce, tensor)
    return tensor


def wait() -> None:
    """Go on when all processes have come here."""
    gathered(None)


def once(act: Callable[[], object]) -> None:
    """Let process 0 do something, such as to change a file, when all have come here; they go on when it is done."""
    wait()
    if rank() == 0:
        act()
    wait()


def see(file: Path) -> None:
    """Go on when this process sees a file that another has written.

    Raises:
        OSError: if that takes longer than ``VISIBLE``: then they do not share the folder.
    """
    end = time.monotonic() + VISIBLE
    while not file.is_file():
        if time.monotonic() > end:
            raise FileNotFoundError(f"{file} is written, but not seen: all processes need one file system")
        time.sleep(0.05)
        with suppress(OSError):
            os.listdir(file.parent)  # a network file system looks again


def _backend(device: str) -> str:
    """What the processes talk through; this process's GPU becomes the default one."""
    device = str(device)
    if device.startswith("cuda:"):
        raise ValueError(f"device {device!r} is one for all processes; with cuda each takes the GPU of its number")
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return "gloo"
    local, gpus = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
    if local >= gpus:
        raise ValueError(f"process {local} of this machine finds {gpus} GPUs: start one process for each")
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def _wait_for(joined: _Joined, operation: Callable, *args, **how) -> None:
    try:
        operation(*args, **how)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ConnectionError(_lost(joined, error)) from error


def _lost(joined: _Joined, error: RuntimeError) -> str:
    """Why the others do not answer."""
    store, others = joined.store, [number for number in range(joined.count) if number != joined.rank]
    try:
        before, begin = _beats(store, others), time.monotonic()
        while time.monotonic() < begin + SILENT:
            if store.check(["failed"]):
                return store.get("failed").decode()
            time.sleep(BEAT / 5)
        now = _beats(store, others)
    except RuntimeError:  # the store is gone
        return "rank 0, or what has started the processes, has ended before the work was done"
    silent = [str(number) for number in others if now[number] == before[number]]
    if not silent:
        return f"the processes have lost each other: {error}"
    return f"rank {', '.join(silent)} has ended before the work was done"


def _tell(joined: _Joined, error: BaseException) -> None:
    """Name this process in the error, unless it is of another one's end, and let the others know."""
    if not isinstance(error, ConnectionError):
        name = f"rank {joined.rank}: "
        if isinstance(error, OSError) and error.strerror is not None:
            error.strerror = name + error.strerror
        elif len(error.args) == 1:
            error.args = (f"{name}{error.args[0]}",)
    with suppress(RuntimeError):
        said = str(error) if str(error).startswith("rank ") else f"rank {joined.rank}: {type(error).__name__} {error}"
        joined.store.compare_set("failed", "", said)


def _part(joined: _Joined) -> None:
    """Process 0 may hold the store, so after an error it waits a little for those who want to read there why they end."""
    with suppress(RuntimeError):
        joined.store.set(f"left/{joined.rank}", "")
        everybody, begin = [f"left/{number}" for number in range(joined.count)], time.monotonic()
        while joined.rank == 0 and not joined.store.check(everybody) and time.monotonic() < begin + SILENT:
            time.sleep(BEAT / 5)


def _signs_of_life(joined: _Joined) -> None:
    number = 0
    with suppress(RuntimeError):  # the store is gone, and with it this run
        while not joined.over.wait(BEAT):
            number += 1
            joined.store.set(f"beat/{joined.rank}", str(number))


def _beats(store: dist.Store, ranks: Sequence[int]) -> dict[int, bytes]:
    return {number: store.get(f"beat/{number}") if store.check([f"beat/{number}"]) else b"" for number in ranks}
