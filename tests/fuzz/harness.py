"""Runs cases in a forked process, so that torch is imported once, and judges each: time, memory, output, exit code."""

import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch.linalg import LinAlgError

SECONDS, BYTES = 30, 2 * 2**30  # that a case may take
REFUSED = 2  # the exit code of the command line for bad input


@dataclass(frozen=True)
class Case:
    """``run`` gives an exit code, or None where it did what it should; it raises ``AssertionError`` for a wrong value."""

    description: str
    run: Callable[[], int | None]


@dataclass(frozen=True)
class Outcome:
    """``fault`` is empty where all is well; ``said`` is what stood on standard error."""

    seed: int
    description: str
    fault: str
    refused: bool
    said: str
    seconds: float
    growth: int  # bytes


def refusing(work: Callable[[], object], culprit: str) -> int | None:
    """What the command line makes of bad input: one line, and 2. It has to name the culprit."""
    try:
        work()
    except (ValueError, OSError, ArithmeticError, LinAlgError) as error:
        if culprit not in str(error):
            raise AssertionError(f"{type(error).__name__} does not name {culprit}: {error}") from error
        print(" ".join(str(error).split()), file=sys.stderr)
        return REFUSED


def run(kind: Callable[[int], Case], seeds: Iterable[int]) -> Iterator[Outcome]:
    """The outcome of each seed. A case that hangs or kills its process costs that process alone.

    All run in one folder of their own, the current one for them, which is removed in the end.
    """
    with tempfile.TemporaryDirectory(prefix="nsvd-fuzz-") as place:
        yield from _outcomes(kind, seeds, place)


def _outcomes(kind: Callable[[int], Case], seeds: Iterable[int], place: str) -> Iterator[Outcome]:
    fork, worker, ours = multiprocessing.get_context("fork"), None, None
    try:
        for seed in seeds:
            if worker is None:
                ours, theirs = fork.Pipe()
                worker = fork.Process(target=_work, args=(kind, theirs, place), daemon=True)
                worker.start()
                theirs.close()
            begin = time.monotonic()
            outcome = Outcome(seed, "?", "the process died", False, "", 0.0, 0)
            try:
                ours.send(seed)
                outcome = replace(outcome, description=_receive(ours, begin))
                yield _receive(ours, begin)
            except (TimeoutError, EOFError, ConnectionError) as error:
                worker.kill()
                worker.join()
                worker = None
                fault = f"over {SECONDS} s" if isinstance(error, TimeoutError) else outcome.fault
                yield replace(outcome, fault=fault, seconds=time.monotonic() - begin)
    finally:
        if worker is not None:
            worker.kill()
            worker.join()


def _receive(pipe, begin: float):
    if not pipe.poll(max(0.0, begin + SECONDS - time.monotonic())):
        raise TimeoutError
    return pipe.recv()


def _work(kind: Callable[[int], Case], pipe, place: str) -> None:
    """Draw and run the cases whose seeds come through the pipe."""
    os.chdir(place)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * BYTES, resource.RLIM_INFINITY))  # the machine is spared
    with tempfile.TemporaryFile() as stream:
        sys.stdin.close()
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(stream.fileno()), "w", buffering=1) for _ in range(2))
        while True:
            seed = pipe.recv()
            try:
                case = kind(seed)
            except Exception as error:
                pipe.send("not drawn")
                pipe.send(Outcome(seed, "not drawn", f"the fuzzer itself: {error!r}", False, "", 0.0, 0))
                continue
            pipe.send(case.description)
            pipe.send(_judge(seed, case))


def _judge(seed: int, case: Case) -> Outcome:
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        os.dup2(said.fileno(), 2)
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, begin, code, fault = _peak(), time.monotonic(), None, ""
        try:
            code = case.run()
        except AssertionError as error:
            fault = f"wrong: {error}"
        except BaseException as error:  # a panic of a Rust library is no Exception
            where = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        seconds, growth = time.monotonic() - begin, _peak() - before
        sys.stderr.close()
        said.seek(0)
        text = said.read()
    if not fault and code not in (None, 0, REFUSED):
        fault = f"exit code {code}"
    if not fault and text.count("\n") != (code == REFUSED):
        fault = "not one line" if code == REFUSED else "words on standard error"
    if not fault and growth > BYTES:
        fault = f"{growth / 2**20:.0f} MiB"
    return Outcome(seed, case.description, fault, code == REFUSED, text, seconds, growth)


def _peak() -> int:
    """Bytes of memory at most since ``clear_refs``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
