"""The table of what must hold reads what the benchmarks write; what is committed of them tells its machine and no path of it."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import cache, fused, scale
from benchmarks.table import lines, summary, table
from nsvd.lab.paths import checkout
from tests.test_notebooks import ABSOLUTE
from tests.tiny import tiny_model

COMMITTED = sorted((checkout() / "data/results/speed").glob("*.jsonl"))
WHOLE = {"source": "folder", "count": 256, "length": 2048, "from_depths": [1, 2], "depth": 32}


def put(folder, name, *rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_what_was_not_measured_is_told_and_does_not_hold(tmp_path):
    """A row for every line that must hold."""
    said = table(tmp_path).splitlines()[2:]
    assert len(said) == 9
    assert all("| not measured |  |" in row for row in said)


def test_what_was_reached_is_set_beside_what_must_hold(tmp_path):
    """Seconds and memory from above, speeds from below."""
    first = WHOLE | {"method": "asvd-1", "wall": 119.6, "device_peak": 25 * 2**30}
    put(tmp_path, "scale", {"method": "asvd-1", "depth": 2}, first, WHOLE | {"method": "best", "wall": 700.0})
    put(tmp_path, "decompose", {"shape": [4096, 4096], "faster": {"one ratio": 12.0, "15 cells": 31.0}})
    row = {"ratio": 0.5, "compiled": False, "decode_times_dense": 1.51}
    dense = row | {"factors": "dense", "decode_times_dense": 1.0}
    put(tmp_path, "infer", dense, row | {"factors": "plain"}, row | {"factors": "plain", "ratio": 0.3})
    put(tmp_path, "cache", {"held": 4096, "decode_times_dense": 0.86})
    said = table(tmp_path).splitlines()[2:]
    assert said[0] == "| calibrate and compress, asvd-1 | ≤ 120 s | 120 s, 32 blocks, 256 × 2048 tokens | yes |"
    assert said[1] == "| memory of the device, asvd-1 | ≤ 24 GiB | 25.0 GiB | no |"
    assert said[2] == "| calibrate and compress, nsvd-1 | ≤ 120 s | not measured |  |"
    assert said[4].endswith("| ≤ 600 s | 700 s, 32 blocks, 256 × 2048 tokens | no |")
    assert said[6:] == [
        "| decomposition, 4096 × 4096, one ratio | ≥ 20 × | 12.0 × | no |",
        "| decomposition, 4096 × 4096, 15 cells | ≥ 20 × | 31.0 × | yes |",
        "| decode, 50 % removed, plain, eager | ≥ 1.5 × dense | 1.51 × | yes |",
        "| decode, latent cache at 0.5, 4096 tokens held | ≥ 0.87 × dense | 0.86 × | no |",
    ]


def test_processor_seconds_are_told_where_there_are_such(tmp_path):
    """Of a layer on a busy machine: its wall clock counts what others do. What must hold is judged by the same clock."""
    wall = {"shape": [8, 8], "faster": {"one ratio": 29.0}}
    put(tmp_path, "decompose", wall, wall | {"faster by processor seconds": {"one ratio": 2.0}})
    assert [row["result"] for row in summary(tmp_path)] == ["one ratio 29.0", "one ratio 2.0"]
    assert [row["what"].endswith("processor seconds") for row in summary(tmp_path)] == [False, True]
    assert [row.split("|")[-2].strip() for row in table(tmp_path).splitlines() if "8 × 8" in row] == ["yes", "no"]


def test_seconds_of_many_blocks_lie_on_the_line_through_two_depths():
    """What is done once is counted once."""
    same = dict.fromkeys(("preset", "method", "source", "count", "length", "ratio", "device", "shape", "machine"))
    two = [same | {"depth": n, "wall": 10.0 + 3 * n, "peak": {"disk": 5 * n}, "device_peak": 7} for n in (1, 2)]
    whole = scale.extrapolated(two, 32)
    assert (whole["wall"], whole["disk"], whole["device_peak"], whole["depth"]) == (106.0, 160, 7, 32)


def test_a_latent_cache_is_measured_beside_the_dense_one():
    """Fewer bytes a token; speeds of both."""
    chosen = SimpleNamespace(cache_ratio=0.5, held=8, new=2, repeat=1)
    found = cache.measured(tiny_model(), chosen)
    before, after = found["bytes_per_token"]
    assert after <= 0.5 * before
    assert set(found["decode_tokens_per_second"]) == {"dense", "latent"}
    assert found["decode_times_dense"] > 0


def test_without_a_gpu_the_script_says_so(tmp_path):
    """One sentence and exit code 2; nothing is written."""
    script, environment = checkout() / "benchmarks/device.sh", os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHON": sys.executable}
    done = subprocess.run(["bash", script, tmp_path / "out"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "torch sees no GPU here" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_results_tell_their_machine_and_no_path(file):
    """Every line can be summed up in a row."""
    rows = lines(file.parent, file.stem)
    assert len([row for row in summary(file.parent) if row["benchmark"] == file.stem]) == len(rows) > 0
    assert all(row["machine"]["processor"] for row in rows)
    assert not ABSOLUTE.search(file.read_text(encoding="utf-8"))


def test_one_matrix_and_several_hold_as_many_parameters():
    """No more than what is kept, and not a rank less than fits."""
    for factors, size in (("plain", lambda m, n, k: k * (m + n)), ("pivoted", lambda m, n, k: k * (m + n - k))):
        k = fused.rank(96, 32, 0.6, factors)
        assert size(96, 32, k) <= 0.6 * 96 * 32 < size(96, 32, k + 1)
    model = tiny_model()
    assert sorted(map(len, fused.groups(model))) == [2, 2, 3, 3]
    assert {name.rsplit(".", 1)[1] for names in fused.groups(model) for name in names} == {
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj",
    }  # fmt: skip
