"""On another device nothing is mixed with the CPU, and nothing is float64 where there is none; the numbers stay the same."""

import copy
import functools
import sys

import pandas as pd
import pytest
import torch

import nsvd
from nsvd.cache.latent import latent_layers
from nsvd.compression import ordered
from nsvd.walk import stream
from nsvd.walk.loss import window_losses
from nsvd.walk.memory import Room
from nsvd.walk.shelf import Shelf
from nsvd.walk.text import trial
from nsvd.walk.waiting import Waiting
from tests.linalg.reference import MATRIX
from tests.pretend import assert_on, moved, pretending
from tests.tiny import K1, statistics, tiny_model, token_ids

pytestmark = []
DEVICES = ("cuda", "mps")  # the second has no float64
IDS, OTHER = token_ids(6, 10), token_ids(6, 10, seed=5)
SMALL = {"num_hidden_layers": 1, "max_position_embeddings": 16}
TWO = SMALL | {"num_hidden_layers": 2}
OPTIONS = {name: {"k1": K1} for name, method in nsvd.METHODS.items() if "k1" in method.options}
RATIO = {"ratio": 0.3}
WAYS = {method: {"method": method} | RATIO | OPTIONS.get(method, {}) for method in MATRIX} | {
    "best": RATIO | {"method": "best"},
    "best, its own text": RATIO | {"method": "best", "windows": None},
    "pivoted": RATIO | {"method": "asvd-1", "factors": "pivoted"},
    "shifted": RATIO | {"method": "asvd-1", "shifted": True},
    "shifted, refined": RATIO | {"method": "asvd-1", "shifted": True, "refine": 2},
    "best, refined": RATIO | {"method": "best", "refine": 2},
    "distilled": RATIO | {"method": "asvd-1", "distill": 2},
    "best, distilled": RATIO | {"method": "best", "distill": 2},
    "searched": RATIO | {"method": "asvd-1", "allocation": "strs", "search_count": 2},
    "by spectrum": RATIO | {"method": "asvd-1", "allocation": "spectrum"},
    "by loss": RATIO | {"method": "asvd-1", "allocation": "fisher"},
    "sola": {"method": "sola", "ratio": 0.05, "keep_outer": 0},
    "sola, searched": RATIO | {"method": "sola", "grid": 2, "keep_outer": 0},
    "worst case": RATIO | {"method": "asvd-1", "windows": [IDS, OTHER], "weights": "worst-case"},
    "two domains": RATIO | {"method": "best", "windows": [IDS, OTHER]},
}  # fmt: skip
CACHES = {
    "svd": {"method": "svd"},
    "asvd-1": {"method": "asvd-1"},
    "nsvd-1": {"method": "nsvd-1", "k1": 0.5},
    "kfac": {"method": "kfac"},
    "best": {"method": "best"},
    "best, its own text": {"method": "best", "windows": None},
    "best, apart": {"method": "best", "joint": False},
    "joint": {"method": "asvd-1", "joint": True},
    "joint, by loss": {"method": "asvd-1", "joint": True, "allocation": "fisher"},
    "by loss": {"method": "asvd-1", "allocation": "fisher"},
}


@functools.cache
def on_the_cpu(what: str, way: str, blocks: int = 1):
    """What is expected: the model compressed where there is no other device, and the report."""
    compress, ways = (nsvd.compress_, WAYS) if what == "weights" else (nsvd.compress_kv_, CACHES)
    model = tiny_model(**SMALL | {"num_hidden_layers": blocks})
    return model, compress(model, **({"windows": IDS} | ways[way]))


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def said(model, device: str, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=OTHER.to(device), **options).logits.cpu()


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_compressed_where_they_lie(way, device):
    """Every method, recipe and last step: the model of the CPU, to rounding."""
    theirs, expected = on_the_cpu("weights", way)
    with pretending(device):
        ours = moved(tiny_model(**SMALL), device)
        report = nsvd.compress_(ours, **({"windows": IDS} | WAYS[way]))
        assert_on(ours, device)
        torch.testing.assert_close(said(ours, device), said(theirs, "cpu"), rtol=0, atol=1e-3)
        assert_on(ours.dequantize(), device)
    assert list(report.table["rank"].fillna(0)) == list(expected.table["rank"].fillna(0))


@pytest.mark.parametrize("way", CACHES)
def test_a_cache_of_latents_lies_with_its_model(way, device):
    """Made there, filled there, attended to there."""
    theirs, expected = on_the_cpu("cache", way, blocks=2)
    with pretending(device):
        ours = moved(tiny_model(**TWO), device)
        report = nsvd.compress_kv_(ours, **({"windows": IDS} | CACHES[way]))
        assert_on(ours, device)
        without = (said(ours, device, use_cache=False), said(theirs, "cpu", use_cache=False))
        torch.testing.assert_close(*without, rtol=0, atol=1e-3)
        for absorb in (False, True):
            for layer in latent_layers(ours).values():
                layer.absorb = absorb
            assert torch.equal(*(nsvd.sample(one, 3, 8, temperature=1e-6) for one in (ours, theirs)))
    pd.testing.assert_frame_equal(report.table, expected.table, rtol=1e-3)


def test_measurements_are_those_of_the_cpu(device):
    """Moments, gradients, losses, own text; a copy lies where the model does."""
    model = tiny_model(**SMALL)
    with pretending(device):
        assert_on(copy.deepcopy(moved(tiny_model(**SMALL), device)), device)
        measured(model, moved(tiny_model(**SMALL), device))


def measured(model, there) -> None:
    one, other = statistics(there, IDS), statistics(model, IDS)
    for name in other:
        torch.testing.assert_close(one[name].G, other[name].G, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one[name].H, other[name].H, rtol=1e-4, atol=1e-6)
        assert one[name].G.device.type == one[name].H.device.type == "cpu"
    torch.testing.assert_close(window_losses(there, OTHER), window_losses(model, OTHER), rtol=1e-5, atol=0)
    assert nsvd.evaluate(there, OTHER).perplexity == pytest.approx(nsvd.perplexity(model, OTHER))
    assert torch.equal(nsvd.sample(there, 3, 12), nsvd.sample(model, 3, 12))


def test_tensors_are_decomposed_where_they_lie(device):
    """``decompose`` gives factors beside the weight, in its dtype."""
    W, X = torch.randn(8, 6, dtype=torch.float32), torch.randn(6, 20, dtype=torch.float32)
    with pretending(device):
        decomposed(W, X, device)


def decomposed(W: torch.Tensor, X: torch.Tensor, device: str) -> None:
    for method in ("svd", "asvd-0", "asvd-1", "nsvd-1", "nid-1", "ridge"):
        more = {"mean_abs": X.abs().mean(1).to(device)} if method == "asvd-0" else {}
        more |= {"k1": 0.5} if "k1" in nsvd.METHODS[method].options else {}
        value = nsvd.decompose(W.to(device), (X @ X.mT).to(device), method=method, k=4, **more)
        assert (value.left.device.type, value.right.dtype) == (device, torch.float32)
        rows = nsvd.linalg.pivoted(value)
        assert {part.device.type for part in (rows.C, rows.T, rows.order)} == {device}


def test_no_report_needs_to_know_the_memory(monkeypatch):
    """Where Python has no ``resource`` the peak is told as unknown."""
    assert nsvd.compress_(tiny_model(), method="svd", ratio=0.3).peak_memory > 0
    monkeypatch.setitem(sys.modules, "resource", None)
    assert nsvd.compress_(tiny_model(), method="svd", ratio=0.3).peak_memory is None
    assert nsvd.compress_kv_(tiny_model(), method="svd").peak_memory is None


def test_the_pretended_device_refuses_what_a_real_one_refuses():
    """Products of two devices, numpy, indices from it on the CPU; float64 on one that has none; not scalars, copies, indices."""
    a = torch.ones(2, 2, dtype=torch.float32)
    with pretending("cuda"):
        b = a.to("cuda")
        for mixed in (
            lambda: a @ b,
            lambda: torch.cat([a, b]),
            lambda: b.add_(a),
            lambda: a[b.long()],
            lambda: b.numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError), match=r"same device|to numpy"):
                mixed()
        same = [
            b * torch.tensor(2.0),
            b.clone().copy_(a),
            b[torch.tensor([0])],
            torch.zeros_like(b),
            b.new_ones(2),
            b.T,
            b.double(),
        ]
        assert {x.device.type for x in same} == {"cuda"}
        assert b.cpu().device.type == (b.cpu() + a).device.type == "cpu"
        b += 1
        assert torch.equal(a, torch.ones(2, 2, dtype=torch.float32))  # a move is a copy
    with pretending("mps"):
        for double in (lambda: a.to("mps").double(), lambda: torch.zeros(2, device="mps", dtype=torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                double()


@pytest.mark.parametrize("room", [0, 3 * 10 * 32 * 4, 2**20])
def test_hidden_states_wait_on_a_gpu_that_has_room(room, monkeypatch):
    """All of them, those that there is room for, or none; the moments and the gradients are the same."""
    model, places = tiny_model(**TWO), []
    expected = statistics(model, IDS)
    monkeypatch.setattr(stream, "READ", 30)  # three windows
    monkeypatch.setattr(stream, "room_on", lambda device: Room(room, device))
    step = stream.Stream.through
    with pretending("cuda"):
        there = moved(tiny_model(**TWO), "cuda")
        monkeypatch.setattr(
            stream.Stream, "through", lambda self, b, x: places.append(x.device.type) or step(self, b, x)
        )
        found = statistics(there, IDS)
    stay = {0: 0, 2**20: 2}.get(room, 1)  # of two batches
    assert places == 4 * (stay * ["cuda"] + (2 - stay) * ["cpu"])
    for name in expected:
        torch.testing.assert_close(found[name].G, expected[name].G, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[name].H, expected[name].H, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("room", [0, 7 * 10 * 32 * 4, 2**20])
def test_what_follows_the_inputs_waits_on_a_gpu_that_has_room(room, monkeypatch):
    """Both streams, the landmarks and the outputs of parts that are done: the compressed model is the same, and at the end the two
    streams are all that has room."""
    how, rooms, batches, batch = {"method": "best", "ratio": 0.3, "windows": IDS}, [], [], ordered.Batch
    model = tiny_model(**TWO)
    nsvd.compress_(model, **how)
    monkeypatch.setattr(ordered, "Batch", lambda *args: batches.append(batch(*args)) or batches[-1])
    monkeypatch.setattr(ordered, "room_on", lambda device: rooms.append(Room(room, device)) or rooms[-1])
    with pretending("cuda"):
        there = moved(tiny_model(**TWO), "cuda")
        nsvd.compress_(there, **how)
        found = moved(there, "cpu")
        (one,), streams = rooms, 2 * (IDS.numel() + trial(model).numel()) * 32 * 4
        assert one._left == room - streams or room < 2**20
        for item in batches:
            assert not item.landmarks
            assert not item.outputs
            item.hidden.clear()
        assert one._left == room
    for (name, a), b in zip(model.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)


def test_a_nest_waits_where_there_is_room_and_comes_back_as_it_was():
    """Leaf by leaf, as many as fit; a nest that is replaced or dropped gives its room back."""
    with pretending("cuda"):
        a, b = (torch.arange(4.0).to("cuda") + i for i in range(2))
        room = Room(a.nbytes, torch.device("cuda"))
        waiting = Waiting(Shelf(), "here", room)
        for _ in range(2):  # the second takes the place of the first
            waiting["x"] = (a, [b, None, "word"])
            c, (d, *rest) = waiting["x"]
            assert c.device.type == d.device.type == "cuda"
            assert torch.equal(c.cpu(), a.cpu())
            assert torch.equal(d.cpu(), b.cpu())
            assert rest == [None, "word"]
            assert not room.take(a)
        del waiting["x"]
        assert "x" not in waiting
        assert room.take(a)
        assert not Room(2**20, a.device).take(a.cpu())
