"""Processes that work as one: shares, sums, and what happens when one of them ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import nsvd
from nsvd.walk import processes
from nsvd.walk.gradients import drawn_labels
from nsvd.walk.processes import dealt, gathered, in_turn, mine, same, share, summed, together
from nsvd.walk.sampling import sample
from nsvd.walk.shelf import Shelf
from nsvd.walk.stream import batches
from tests import ranks
from tests.tiny import tiny_model, token_ids


def test_one_process_is_given_back_what_it_gives():
    """Also inside ``together``, where torchrun has started no others."""
    with together():
        x = torch.ones(2)
        assert (processes.rank(), processes.count(), mine([1, 2, 3])) == (0, 1, [1, 2, 3])
        assert summed(x) is x
        assert (summed(None), same("a"), gathered("a"), share(5, 8), share(0, 8)) == (None, "a", ["a"], 5, 1)
        assert not torch.distributed.is_initialized()


def test_work_is_dealt_by_its_cost(monkeypatch):
    """The dearest first, to whoever has least; all work is done once."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert dealt({"a": 1.0, "b": 5.0, "c": 3.0, "d": 2.0}) == {"a": 0, "b": 0, "c": 1, "d": 1}
    assert in_turn([[0, 2, 4], [1, 3]]) == [0, 1, 2, 3, 4]


def test_every_window_is_dealt_once(monkeypatch):
    """With their numbers among all, in batches small enough that every process has one, if there are enough windows."""
    domains = [token_ids(7, 4), token_ids(3, 5)]
    for count in (1, 2, 3, 12):
        found = []
        for rank in range(count):
            monkeypatch.setattr("nsvd.walk.stream.count", lambda count=count: count)
            monkeypatch.setattr("nsvd.walk.processes.count", lambda count=count: count)
            monkeypatch.setattr("nsvd.walk.stream.rank", lambda rank=rank: rank)
            here = list(batches(domains, 8))
            assert bool(here) == (rank < 10)
            found += here
        rows = {first + n: (d, row.tolist()) for d, first, ids in found for n, row in enumerate(ids)}
        every = [(d, row) for d, windows in enumerate(domains) for row in windows.tolist()]
        assert [rows[number] for number in range(10)] == every
        assert sum(len(ids) for *_, ids in found) == 10


def measures(model) -> dict:
    """What is measured on windows, those of two to a process and a rest."""
    torch.set_default_dtype(torch.float64)
    ids = token_ids(7, 9)
    moments, H = nsvd.calibrate(model, ids), nsvd.fisher(model, ids, seed=3)
    found = {f"G {name}": m.G for name, m in moments.moments.items()} | {f"H {name}": h for name, h in H.items()}
    return found | {"labels": drawn_labels(model, ids, seed=3), "text": sample(model, 5, 9, seed=3)}


def as_one(out: Path) -> None:
    """Sums and shares in three processes; then what they measure."""
    with together("cpu"):
        rank, count = processes.rank(), processes.count()
        assert summed(torch.full((2,), float(rank + 1), dtype=torch.float64)).tolist() == [6.0, 6.0]
        assert summed(torch.ones(2, 3) if rank == 1 else None).tolist() == [[1.0] * 3] * 2
        assert summed(None) is None
        assert gathered(rank) == [0, 1, 2]
        assert (same(rank, 2), count) == (2, 3)
        shelf = Shelf(out / "kept")
        shelf.put("all", {"x": torch.full((2,), rank)})
        shelf.own.put("one", {"x": torch.full((2,), rank)})
        assert shelf.get("all")["x"].tolist() == [0, 0]
        assert shelf.own.get("one")["x"].tolist() == [rank, rank]
        shelf.drop("all")
        assert "all" not in shelf
        with pytest.raises(ValueError, match="one for all processes"), together("cuda:0"):
            processes._backend("cuda:0")
        torch.save(measures(tiny_model(dtype=torch.float64)), f"{out}/{rank}.pt")


def test_three_processes_measure_as_one(tmp_path):
    """Moments and gradients to rounding, labels and sampled text to the last token, in all processes the same."""
    alone = measures(tiny_model(dtype=torch.float64))
    ranks.run(3, as_one, tmp_path)
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert (found[name] - value).abs().max() <= 1e-12 * value.abs().max(), name
    assert sorted(os.listdir(tmp_path / "kept")) == [f"rank-{rank}-of-3" for rank in range(3)]


def ends(how: str, who: int) -> None:
    """One process ends while the others wait."""
    with together("cpu"):
        gathered(None)
        if processes.rank() == who:
            time.sleep(1)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "no space") if how == "full" else ValueError("no such layer")
        gathered(None)


@pytest.mark.parametrize(
    ("how", "who", "said"),
    [
        ("raises", 1, "rank 1: no such layer"),
        ("full", 2, "rank 2: no space"),
        ("killed", 1, "rank 1 has ended before the work was done"),
        ("killed", 0, "rank 0, or what has started the processes, has ended before the work was done"),
    ],
)
def test_the_end_of_one_process_ends_all_with_its_name(how, who, said):
    """Within seconds, with exit code 2, and one sentence."""
    begin = time.monotonic()
    found = ranks.ended(ranks.start(3, ends, how, who))
    assert time.monotonic() < begin + 90
    for rank, (code, text) in enumerate(found):
        assert code == (-signal.SIGKILL if how == "killed" and rank == who else 2), text
        assert said in text or code < 0


def test_torchrun_starts_them_and_names_the_one_that_failed(tmp_path):
    """Under torchrun the others are ended at once."""
    code = (
        "from tests import ranks; from tests.walk.test_processes import ends; exit(ranks.expected(ends, 'raises', 1))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    around = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "rank 1: no such layer" in done.stderr
    assert "exitcode  : 2" in done.stderr
