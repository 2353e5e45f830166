"""``nsvd compress`` is killed at random moments.

Run as ``python -m tests.kills --count 200``. Over an existing model (``kills``): old or new, whole, and nothing left after the
next run. Half of these kills are spread over the whole run, half over the time from when the new model begins to be written
until the run ends. On the way (``resumed``, with ``--method``): the same command goes on, is killed again, and ends in the bytes
of a run that nobody killed. Runs are forked from one process that has imported everything.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import torch

import nsvd
from nsvd.cli import main as nsvd_command
from tests.tiny import tiny_model, tiny_tokenizer

RATIOS = (0.3, 0.5)  # the old and the new model, by turns
VARYING = ("nsvd_report.json", "nsvd_manifest.json")  # one holds seconds, the other its sum


@dataclass
class Run:
    """A forked child that compresses ``folder``/model into ``folder``/out."""

    folder: Path
    process: int
    start: float

    @classmethod
    def begin(cls, folder: Path, ratio: float, method: str = "svd", source: str = "folder") -> Run:
        process = os.fork()
        if process == 0:
            code = 3
            try:
                code = SOURCES[source](folder, ratio, method)
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
            finally:
                os._exit(code)
        return cls(folder, process, time.perf_counter())

    def seconds(self) -> float:
        """Since its start."""
        return time.perf_counter() - self.start

    def over(self) -> bool:
        """Whether it has ended; it stays to be waited for."""
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait_for_write(self) -> float:
        """Until the new model begins to be written, or the run is over; the time."""
        while not self.over() and not list(self.folder.glob(".out.*/out")):
            time.sleep(1e-4)
        return self.seconds()

    def end(self) -> float:
        """Let it run to its end, which is a good one; the time."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        assert code == 0, f"nsvd compress ended with {code}"
        return self.seconds()

    def kill(self) -> bool:
        """Whether it still ran."""
        os.kill(self.process, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(self.process, 0)[1])


def compress(folder: Path, ratio: float, method: str = "svd", *, out: str = "out") -> int:
    text = [] if method == "svd" else ["--calibration", f"{folder}/model/text.txt", "--length", "32", "--count", "24"]
    how = ["--method", method, "--ratio", str(ratio), *text]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return nsvd_command(["compress", f"{folder}/model", f"{folder}/{out}", *how])


def compress_resident(folder: Path, ratio: float, method: str, *, out: str = "out") -> int:
    """The same on a model in memory, which is not resumed: every run begins anew."""
    model, tokenizer = nsvd.load(folder / "model", device="cpu")
    windows = nsvd.domains(f"{folder}/model/text.txt", model, tokenizer, length=32, count=24)
    report = nsvd.compress_(model, method=method, ratio=ratio, windows=windows)
    nsvd.save(model, tokenizer, folder / out, report=report.as_dict())
    return 0


SOURCES = {"folder": compress, "resident": compress_resident}


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those of ``VARYING``, which must be there; ``nsvd.load`` compares sums."""
    files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    for name in VARYING:
        json.loads(files.pop(name))
    return files


def kills(folder: Path, count: int, seed: int = 0) -> Counter:
    """How often the old and the new model stood after a kill, and how often something was left beside it.

    Raises:
        AssertionError: if after a kill there was neither, or something was left after the next run.
    """
    draw, out, whole = random.Random(seed), folder / "out", {}
    nsvd.save(tiny_model(), tiny_tokenizer(), folder / "model")
    for ratio in RATIOS:  # here, so that all is imported before the first child
        assert compress(folder, ratio) == 0
        whole[ratio] = contents(out)
    old, new = RATIOS[::-1]
    assert whole[old] != whole[new]
    seen, turn = Counter(), 0
    while seen["kills"] < count:  # those that come too late are not counted
        run = Run.begin(folder, new)  # how long it takes now
        writing = run.wait_for_write()
        lasting = run.end()
        assert contents(out) == whole[new], f"the run after kill {turn} has not written its model"
        assert sorted(os.listdir(folder)) == ["model", "out"], f"the run after kill {turn} has left something"
        old, new = new, old
        run = Run.begin(folder, new)
        if turn % 2:
            run.wait_for_write()
        time.sleep(draw.uniform(0, lasting - writing if turn % 2 else lasting))
        turn += 1
        if not run.kill():
            continue
        found = contents(out)
        assert found in (whole[old], whole[new]), f"after kill {turn} {out} is neither the old nor the new model"
        nsvd.load(out, device="cpu")
        seen["kills"] += 1
        seen["new" if found == whole[new] else "old"] += 1
        seen["something left beside"] += sorted(os.listdir(folder)) != ["model", "out"]
    Run.begin(folder, new).end()
    assert contents(out) == whole[new]
    assert sorted(os.listdir(folder)) == ["model", "out"]
    return seen


def resumed(
    folder: Path, method: str, count: int, seed: int = 0, ratio: float = 0.3, source: str = "folder"
) -> Counter:
    """How many runs were killed, and how many models they have written in the end; every third kill lets the next run end.

    Raises:
        AssertionError: if ``out`` is there before a run has ended, or then is not what a run writes that nobody kills.
    """
    draw, out, seen = random.Random(seed), folder / "out", Counter()
    nsvd.save(tiny_model(num_hidden_layers=4), tiny_tokenizer(), folder / "model")
    (folder / "model" / "text.txt").write_text(" ".join(f"word {n} of {n * n}" for n in range(2500)))
    (folder / "model" / "nsvd_manifest.json").unlink()
    begin = time.perf_counter()
    assert SOURCES[source](folder, ratio, method, out="whole") == 0
    lasting, whole = time.perf_counter() - begin, contents(folder / "whole")
    while seen["kills"] < count:
        run = Run.begin(folder, ratio, method, source)
        time.sleep(draw.uniform(0, lasting))
        if run.kill():
            seen["kills"] += 1
            if out.exists():  # the kill came when all was written
                assert contents(out) == whole
            if seen["kills"] % 3:
                continue
            Run.begin(folder, ratio, method, source).end()
        assert contents(out) == whole, f"after kill {seen['kills']} {out} is not what an undisturbed run writes"
        assert sorted(os.listdir(folder)) == ["model", "out", "whole"]
        nsvd.load(out, device="cpu")
        rmtree(out)
        seen["models"] += 1
    return seen


def main() -> None:
    """Kill, look, and say what was seen."""
    parser = argparse.ArgumentParser("python -m tests.kills", description=main.__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", help="kill runs by this method on their way, and let them go on")
    parser.add_argument(
        "--source", choices=SOURCES, default="folder", help="of these runs: block by block, or in memory"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    with TemporaryDirectory() as folder:
        if chosen.method:
            seen = resumed(Path(folder), chosen.method, chosen.count, chosen.seed, source=chosen.source)
        else:
            seen = kills(Path(folder), chosen.count, chosen.seed)
    print(", ".join(f"{name}: {number}" for name, number in seen.items()), f"({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
