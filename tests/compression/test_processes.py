"""Several processes compress as one: the same ranks, losses and factors as a single process, whatever their number."""

import copy
from pathlib import Path
from statistics import fmean

import pandas as pd
import pytest
import torch

from nsvd.compression.compress import carry_out
from nsvd.compression.request import resolve
from nsvd.walk import processes
from nsvd.walk.loss import window_losses
from nsvd.walk.processes import together
from tests import ranks
from tests.tiny import K1, float32, tiny_model, tiny_tokenizer, token_ids  # noqa: F401

ODD = token_ids(13, 12)  # no multiple of two or three
TWO = [token_ids(13, 12), token_ids(7, 9, seed=5)]
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
    "asvd-1, two windows": {"windows": ODD[:2], "ratio": 0.3},
    "best, two windows": {"windows": ODD[:2], "ratio": 0.4},
    "ridge, distill": {"windows": TWO, "ratio": 0.3, "distill": 3},
    "kfac, worst-case": {"windows": TWO, "ratio": 0.3, "weights": "worst-case"},
}


def ask(name: str, ratio: float, **options):
    known = OPEN | {key: options.pop(key) for key in list(options) if key in OPEN}
    return resolve(name.partition(",")[0], options, ratio=ratio, **known)


def compressed(name: str, model=None, shelf=None) -> dict:
    """What comes out: the report's table, the losses of the model and on the way, all tensors."""
    model = tiny_model(dtype=torch.float64, num_hidden_layers=3) if model is None else model
    report = carry_out(model, ask(name, **CASES[name]), shelf=shelf)
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
    """Ranks are the same, losses to 1e-10, factors to 1e-8."""
    pd.testing.assert_frame_equal(one["table"], other["table"], rtol=1e-8, atol=1e-12)
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-10)
    assert one["tensors"].keys() == other["tensors"].keys()
    for key, value in one["tensors"].items():
        torch.testing.assert_close(value, other["tensors"][key], rtol=1e-8, atol=1e-8, msg=key)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    found = {name: compressed(name) for name in CASES}
    torch.set_default_dtype(before)
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_compress_as_one(count, alone, tmp_path):
    """Every method, also on fewer windows than processes; all of them have the same model in the end."""
    ranks.run(count, all_cases, tmp_path)
    first, *others = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(count)]
    for name in CASES:
        assert_equal(first[name], alone[name])
        for other in others:
            assert other[name]["losses"] == first[name]["losses"]
            assert all(torch.equal(other[name]["tensors"][key], t) for key, t in first[name]["tensors"].items())
