"""Several processes in a test: ``start`` runs a function in each of them, as torchrun would, but without importing all again."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import mkdtemp

import torch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["transformers", "nsvd.walk.gradients", "nsvd", "tests.tiny"])


@dataclass
class Run:
    """One of the processes, and the file of what it says on standard error."""

    process: BaseProcess
    errors: Path


def start(count: int, function: Callable, *arguments: object) -> list[Run]:
    """Begin the function with these arguments in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, runs = Path(mkdtemp(prefix="nsvd-ranks-")), []
    for rank in range(count):
        around = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        run = Run(None, folder / f"{rank}.txt")
        run.process = _SERVER.Process(target=_work, args=(around, run.errors, function, arguments))
        run.process.start()
        runs.append(run)
    return runs


def ended(runs: list[Run], seconds: float = 120) -> list[tuple[int, str]]:
    """Exit code and standard error of each; whoever is not done in time is killed."""
    end = time.monotonic() + seconds
    for run in runs:
        run.process.join(max(0.1, end - time.monotonic()))
    for run in runs:
        run.process.kill()
        run.process.join()
    return [(run.process.exitcode, run.errors.read_text()) for run in runs]


def run(count: int, function: Callable, *arguments: object) -> None:
    """``start`` and wait for a good end."""
    for code, said in ended(start(count, function, *arguments)):
        assert code == 0, said


def expected(function: Callable, *arguments: object) -> int:
    """As the command line: a sentence and 2 for an error that is expected."""
    try:
        function(*arguments)
    except (ValueError, OSError, ArithmeticError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _work(around: dict, errors: Path, function: Callable, arguments: tuple) -> None:
    os.environ |= {name: str(value) for name, value in around.items()}
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    sys.exit(expected(function, *arguments))
