"""What a compression is said to take is what it takes."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nsvd.compression.cost import _Sums, cost
from nsvd.compression.request import resolve
from tests.tiny import float32  # noqa: F401

SEVEN = {"hidden_size": 4096, "intermediate_size": 11_008, "num_attention_heads": 32, "num_key_value_heads": 32}
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
BEGIN = """
import sys, torch, nsvd
from pathlib import Path
from nsvd.compression import whole_layers
from nsvd.compression.compress import carry_out
from nsvd.walk.shelf import Shelf
from tests.compression.test_cost import SMALL, request, shaped

def highest():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
"""
MEASURED = f"""{BEGIN}
method, count, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
model = shaped(SMALL, 1, device="cpu")
ask = request(method, nsvd.random_tokens(300, count, length))
Path("/proc/self/clear_refs").write_text("5")  # from here on: what came before, imports among them, is not counted
begin = highest()
carry_out(model, ask, shelf=Shelf(Path(sys.argv[4])))
print(highest() - begin)
"""
NEURONS = f"""{BEGIN}
def watched(job, found=whole_layers.without_neurons):
    Path("/proc/self/clear_refs").write_text("5")
    begin, new = highest(), found(job)
    print(highest() - begin)
    return new

torch.manual_seed(0)
whole_layers.without_neurons = watched
ask = request("best", nsvd.random_tokens(300, 64, 256), neurons=0.5)
carry_out(shaped(SMALL, 1, device="cpu"), ask, shelf=Shelf(Path(sys.argv[1])))
"""


def shaped(sizes, depth, *, device="meta"):
    """A model in bfloat16, without its numbers."""
    config = LlamaConfig(**{"vocab_size": 300} | sizes, num_hidden_layers=depth, dtype="bfloat16")
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def request(method, windows, **more):
    """The arguments of ``compress_``, the rest left open."""
    names = ("ranks", "allocation", "factors", "shifted", "search_count")
    rest = {"weights": "uniform", "refine": 0, "distill": 0, "seed": 0, "progress": False}
    return resolve(method, {}, ratio=0.3, windows=windows, **dict.fromkeys(names) | rest | more)


def told(sizes, depth, method, count, length, **more):
    return cost(shaped(sizes, depth), request(method, torch.zeros(count, length, dtype=torch.long), **more))


@pytest.mark.parametrize("method", ["asvd-1", "best"])
def test_memory_does_not_grow_with_depth_and_the_rest_does(method):
    few, many = told(SMALL, 12, method, 64, 256), told(SMALL, 48, method, 64, 256)
    assert (few.device, few.host, few.passes) == (many.device, many.host, many.passes)
    assert 3.5 < many.forward / few.forward <= 4
    assert many.decompositions == pytest.approx(4 * few.decompositions)
    assert few.disk < many.disk


EIGHTY = {"hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64, "num_key_value_heads": 8}


@pytest.mark.parametrize(("sizes", "depth", "device", "host"), [(SEVEN, 32, 24e9, 24e9), (EIGHTY, 80, 80e9, 80e9)])
def test_models_of_seven_and_seventy_billion_have_room(sizes, depth, device, host):
    """``best`` on 256 windows of 2048 tokens, at the sizes of LLaMA-7B on a GPU of 24 GB, and of LLaMA-70B on one of 80 GB."""
    asked = told({"vocab_size": 32_000} | sizes, depth, "best", 256, 2048)
    assert asked.device < device
    assert asked.host < host
    waiting = 256 * 2048 * 2 * sizes["hidden_size"] * 2  # both streams in bfloat16
    assert asked.host < asked.disk - waiting


def test_passes_over_the_text():
    """``best`` on 256 windows: half of them for moments; an eighth four times at both ends, once for labels; two in order."""
    assert told(SMALL, 2, "asvd-1", 256, 16).passes == 1
    assert told(SMALL, 2, "best", 256, 16).passes == pytest.approx(1 / 2 + 9 / 8 + 2)


def test_passes_of_searches_and_of_distillation():
    """STRS: nine fractions of seven layers of two blocks, half the blocks each, and once before; a step: four over 1024 tokens."""
    assert told(SMALL, 2, "sola", 256, 16).passes == 1
    few = told(SMALL, 2, "asvd-1", 256, 16, allocation="strs", search_count=64)
    assert few.passes == pytest.approx(1 + (1 + 9 * 14 / 2) / 4)
    plain, fitted = (told(SMALL, 8, "asvd-1", 256, 16, distill=steps) for steps in (0, 20))
    assert fitted.passes == pytest.approx(plain.passes + (20 + 3 * 12) * 4 * 1024 / (256 * 16))
    assert fitted.device > plain.device


def test_passes_of_refinement():
    """All batches once; then a step is three over the 2048 tokens of one of two batches, and three rates are tried first."""
    plain, fitted = (told(SMALL, 8, "best", 256, 16, refine=steps) for steps in (0, 20))
    assert fitted.passes == pytest.approx(plain.passes + 1 + (20 + 3 * 12) * 3 / 2)


def test_layers_that_share_an_input_are_told_from_their_sizes():
    """Of a block at LLaMA-7B's sizes four inputs are measured, in float64: three of width d, one of the feed-forward's."""
    asked = request("asvd-1", torch.zeros(1, 2, dtype=torch.long))
    layers = _Sums(shaped(SEVEN, 1), asked).largest
    assert [one.first for one in layers] == [True, False, False, True, True, False, True]
    assert [one.alone for one in layers] == [False, False, False, True, False, False, True]


def test_neurons_are_a_stage():
    """One feed-forward is in memory at a time; its smaller layers lie on the disk. Without them there is none."""
    few, many = (told(SMALL, depth, "best", 64, 256, neurons=0.5).stages["neurons"] for depth in (2, 8))
    assert (few.device, few.host) == (many.device, many.host)
    assert many.decompositions == pytest.approx(4 * few.decompositions)
    assert 3 * 8 * 1024**2 < few.device < 4 * 8 * 1024**2 + 10e6
    layers, moments = 2 * 6 * (4 * 256**2 + 3 * 256 * 1024), 8 * 6 * (3 * 256**2 + 1024**2)
    outputs = 8 * 6 * (5 * 256**2 + 2 * 1024**2)
    narrow = 2 * 6 * 3 * 256 * 1024 - 0.5 * 0.3 * layers
    assert many.disk - few.disk == pytest.approx(narrow + moments + outputs)
    assert "neurons" not in told(SMALL, 2, "best", 64, 256, neurons=0).stages


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="told by /proc")
def test_the_peak_of_leaving_out_neurons_is_what_is_told(tmp_path):
    asked = told(SMALL, 1, "best", 64, 256, neurons=0.5).stages["neurons"]
    command = [sys.executable, "-c", NEURONS, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert (asked.device + asked.host) / 2 < float(found.stdout) < 1.5 * (asked.device + asked.host)


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="told by /proc")
@pytest.mark.parametrize(("method", "count", "length"), [("best", 64, 256), ("asvd-1", 64, 256)])
def test_the_peak_is_what_is_told(tmp_path, method, count, length):
    """Within half and one and a half: pieces that are free between others, and the code of products, 64 × 0.4 MB, come on top."""
    asked = told(SMALL, 1, method, count, length)
    command = [sys.executable, "-c", MEASURED, method, str(count), str(length), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    measured = float(found.stdout) - 26e6
    both = max(stage.device + stage.host for stage in asked.stages.values())
    assert both / 2 < measured < 1.5 * both
