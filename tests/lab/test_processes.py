"""``torchrun -m nsvd compress``: the folder that one process writes, and one sentence where something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nsvd
from tests.tiny import tiny_model, tiny_tokenizer

HOW = ["--method", "best", "--ratio", "0.3", "--length", "32", "--count", "13"]


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    """Two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "nsvd"]
    around = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    how = {"capture_output": True, "text": True, "timeout": 200, "env": around}
    return subprocess.run([*command, *map(str, arguments)], **how)


@pytest.fixture
def dense(tmp_path):
    nsvd.save(tiny_model(dtype=torch.float64, num_hidden_layers=3), tiny_tokenizer(), tmp_path / "dense")
    return tmp_path / "dense"


def test_several_processes_write_the_folder_that_one_writes(dense):
    """One of them says what was done, and leaves nothing beside the folder."""
    one, two = dense.parent / "one", dense.parent / "two"
    report = nsvd.compress(dense, one, method="best", ratio=0.3, length=32, count=13)
    done = torchrun("compress", dense, two, *HOW)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters removed") == 1
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-8, msg=name)
    assert nsvd.load(two, device="cpu")[0].config.quantization_config.ratio_reached == report.ratio_reached
    assert sorted(os.listdir(dense.parent)) == ["dense", "one", "two"]


def test_they_leave_out_the_same_neurons(dense):
    one, two = dense.parent / "one", dense.parent / "two"
    nsvd.compress(dense, one, method="best", ratio=0.3, length=32, count=13, neurons=0.5)
    done = torchrun("compress", dense, two, *HOW, "--neurons", "0.5")
    assert done.returncode == 0, done.stderr
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-8, msg=name)


def test_what_is_wrong_is_said_with_the_rank(dense):
    """Exit code 2 in the processes, which torchrun tells; no folder is there."""
    done = torchrun("compress", dense, dense.parent / "out", *HOW, "--k1", "0.5")
    assert done.returncode != 0
    assert "nsvd compress: rank 0: " in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert os.listdir(dense.parent) == ["dense"]
