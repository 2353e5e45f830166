"""Several processes compress as one: the same ranks, losses and factors as a single process, whatever their number."""

import copy
import os
import signal
from pathlib import Path
from statistics import fmean

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import nsvd
from nsvd.compression.compress import carry_out
from nsvd.compression.request import resolve
from nsvd.walk import processes
from nsvd.walk.folder import open_folder, write_folder
from nsvd.walk.loss import window_losses
from nsvd.walk.processes import together
from nsvd.walk.shelf import Shelf
from tests import ranks
from tests.tiny import K1, float32, tiny_model, tiny_tokenizer, token_ids  # noqa: F401

ODD = token_ids(13, 12)  # no multiple of two or three
TWO = [token_ids(13, 12), token_ids(7, 9, seed=5)]
REFINED = "ridge, refined"  # steps go over batches, and several processes read smaller ones: not what one process gives
OPEN = {
    "ranks": None, "allocation": None, "factors": None, "shifted": None, "refine": 0, "distill": 0, "windows": None,
    "weights": "uniform", "search_count": None, "seed": 0, "progress": False,
}  # fmt: skip
CASES = {
    "svd": {"ratio": 0.3},
    "asvd-1": {"windows": ODD, "ratio": 0.3},
    "nsvd-1": {"windows": TWO, "weights": [0.2, 0.8], "ratio": 0.3, "k1": K1},
    "sola": {"windows": ODD, "ratio": 0.2, "keep_outer": 0, "grid": 1, "compress_v": True},
    "best": {"windows": TWO, "ratio": 0.4},
    "best, own text": {"ratio": 0.4},
    "asvd-1, spectrum": {"windows": ODD, "ratio": 0.3, "allocation": "spectrum"},
    "asvd-1, strs": {"windows": ODD, "ratio": 0.3, "allocation": "strs", "search_count": 2},
    "asvd-1, lems": {"windows": ODD, "ratio": 0.3, "allocation": "lems", "search_count": 2},
    "asvd-1, zero-sum": {"windows": TWO, "weights": [0.2, 0.8], "ratio": 0.3, "allocation": "zero-sum"},
    "asvd-1, two windows": {"windows": ODD[:2], "ratio": 0.3},
    "best, two windows": {"windows": ODD[:2], "ratio": 0.4},
    "ridge, distill": {"windows": TWO, "ratio": 0.3, "distill": 3},
    REFINED: {"windows": TWO, "ratio": 0.3, "shifted": True, "refine": 3},
    "kfac, worst-case": {"windows": TWO, "ratio": 0.3, "weights": "worst-case"},
}


def ask(name: str, ratio: float, **options):
    known = OPEN | {key: options.pop(key) for key in list(options) if key in OPEN}
    return resolve(name.partition(",")[0], options, ratio=ratio, **known)


def compressed(name: str) -> dict:
    """What comes out: the report's table, the losses of the model and on the way, all tensors."""
    model = tiny_model(dtype=torch.float64, num_hidden_layers=3)
    report = carry_out(model, ask(name, **CASES[name]))
    losses = [*report.losses, fmean(window_losses(model, token_ids(6, 12, seed=8)).tolist())]
    return {"table": report.table, "losses": losses, "tensors": copy.deepcopy(model.state_dict())}


def all_cases(out: Path) -> None:
    """What one process of several does."""
    torch.set_default_dtype(torch.float32)
    with together("cpu"):
        found = {name: compressed(name) for name in CASES}
        assert processes.count() > 1
        torch.save(found, out / f"{processes.rank()}.pt")


def assert_equal(one: dict, other: dict) -> None:
    """Ranks are the same, losses to 1e-10, factors to 1e-8: in bfloat16 they differ by one unit in the last place at most."""
    pd.testing.assert_frame_equal(one["table"], other["table"], rtol=1e-8, atol=1e-12)
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-10)
    assert one["tensors"].keys() == other["tensors"].keys()
    for key, value in one["tensors"].items():
        torch.testing.assert_close(value, other["tensors"][key], rtol=1e-8, atol=1e-8, msg=key)
        if value.is_floating_point():
            assert units_apart(value, other["tensors"][key]) <= 1, key


def units_apart(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many numbers of bfloat16 lie between two tensors after rounding, at most; those below 1e-6 are not looked at."""
    places = [t.to(torch.bfloat16).view(torch.int16).int() for t in (one, other)]
    steps = [torch.where(place < 0, -(place & 0x7FFF), place) for place in places]  # in the order of the numbers
    return int(torch.where(one.abs() > 1e-6, steps[0] - steps[1], 0).abs().max())


def test_units_in_the_last_place_are_counted():
    one = torch.tensor([1.0, -1.0, 1e-7], dtype=torch.float64)
    assert units_apart(one, one) == 0
    assert units_apart(one, one * (1 + 2**-7)) == 1
    assert units_apart(one, one * (1 - 2**-6)) == 4
    assert units_apart(one, -one) > 1000


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    found = {name: compressed(name) for name in CASES}
    torch.set_default_dtype(before)
    return found


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.once)])
def test_several_processes_compress_as_one(count, alone, tmp_path):
    """Every method, also on fewer windows than processes; all of them have the same model in the end."""
    ranks.run(count, all_cases, tmp_path)
    first, *others = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(count)]
    for name in CASES:
        if name == REFINED:
            assert first[name]["losses"] == pytest.approx(alone[name]["losses"], rel=1e-2)
        else:
            assert_equal(first[name], alone[name])
        for other in others:
            assert other[name]["losses"] == first[name]["losses"]
            assert all(torch.equal(other[name]["tensors"][key], t) for key, t in first[name]["tensors"].items())


def from_folder(name: str, folder: Path, stop: int) -> None:
    """A model is compressed from a folder; process 1 is killed once it has kept so many things for itself."""
    torch.set_default_dtype(torch.float32)
    put, count = Shelf._write, 0

    def counted(self, *args):
        nonlocal count
        put(self, *args)
        count += 1
        if count == stop and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Shelf._write = counted
    with together("cpu"):
        model, _ = open_folder(folder / "dense", device="cpu")
        report = carry_out(model, ask(name, **CASES[name]), shelf=Shelf(folder / "kept"))
        if processes.rank() == 0:
            (folder / "out").mkdir()
            write_folder(model, folder / "out")
            report.table.to_pickle(folder / "table.pkl")


@pytest.mark.once
@pytest.mark.parametrize(("name", "stop"), [("asvd-1", 2), ("best", 5)])
def test_a_run_of_several_processes_goes_on_where_it_was_killed(name, stop, alone, tmp_path):
    """The others end with its name; the next run has what an uninterrupted one has, and what one process has."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        nsvd.save(tiny_model(dtype=torch.float64, num_hidden_layers=3), tiny_tokenizer(), folder / "dense")
    (code, said), killed = ranks.ended(ranks.start(2, from_folder, name, cut, stop))
    assert (code, killed[0]) == (2, -signal.SIGKILL), said
    assert "rank 1 has ended before the work was done" in said
    done = {file.name for file in (cut / "kept").rglob("*.safetensors")}
    assert done
    ranks.run(2, from_folder, name, cut, 0)
    ranks.run(2, from_folder, name, whole, 0)
    files = [(folder / "out" / "model.safetensors").read_bytes() for folder in (whole, cut)]
    assert files[0] == files[1]
    stored = load_file(cut / "out" / "model.safetensors")
    stored = {key: value for key, value in stored.items() if key in alone[name]["tensors"]}  # no guards
    found = {"table": pd.read_pickle(cut / "table.pkl"), "tensors": stored}
    expected = alone[name] | {"tensors": {k: v for k, v in alone[name]["tensors"].items() if k in found["tensors"]}}
    assert_equal(found | {"losses": expected["losses"]}, expected)
