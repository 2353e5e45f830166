"""A model whose blocks lie on several devices: nothing of one block is mixed with another's, and the numbers stay the same."""

import pandas as pd
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import nsvd
from tests.pretend import assert_on, pretending
from tests.tiny import tiny_model
from tests.walk.test_devices import CACHES, IDS, TWO, WAYS, measured, on_the_cpu, said

THERE = "cuda"
ROUTES = (
    "asvd-0",
    "kfac",
    "best",
    "best, its own text",
    "pivoted",
    "shifted, refined",
    "distilled",
    "searched",
    "by spectrum",
)
ROUTES += ("by loss", "sola", "sola, searched", "worst case", "two domains")


def spread():
    """A model of two blocks, the second on the pretended device, as ``device_map`` of transformers lays them."""
    model = tiny_model(**TWO)
    last = model.model.layers[-1].to(THERE)
    add_hook_to_module(last, AlignDevicesHook(execution_device=THERE, io_same_device=True))
    return model


def assert_spread(model) -> None:
    assert_on(model.model.layers[0], "cpu")
    assert_on(model.model.layers[1], THERE)


@pytest.mark.parametrize("way", ROUTES)
def test_every_layer_is_compressed_where_it_lies(way):
    """By every route to ranks and factors."""
    theirs, expected = on_the_cpu("weights", way, blocks=2)
    with pretending(THERE):
        ours = spread()
        report = nsvd.compress_(ours, **({"windows": IDS} | WAYS[way]))
        assert_spread(ours)
        torch.testing.assert_close(said(ours, "cpu"), said(theirs, "cpu"), rtol=0, atol=1e-3)
    assert list(report.table["rank"].fillna(0)) == list(expected.table["rank"].fillna(0))


@pytest.mark.parametrize("way", CACHES)
def test_every_layer_caches_latents_where_it_lies(way):
    """And the model writes with them what it writes on one device."""
    theirs, expected = on_the_cpu("cache", way, blocks=2)
    with pretending(THERE):
        ours = spread()
        report = nsvd.compress_kv_(ours, **({"windows": IDS} | CACHES[way]))
        assert_spread(ours)
        torch.testing.assert_close(said(ours, "cpu"), said(theirs, "cpu"), rtol=0, atol=1e-3)
        assert torch.equal(*(nsvd.sample(one, 3, 8, temperature=1e-6) for one in (ours, theirs)))
    pd.testing.assert_frame_equal(report.table, expected.table, rtol=1e-3)


def test_measurements_are_those_of_one_device():
    """Moments, gradients, losses, own text."""
    with pretending(THERE):
        measured(tiny_model(**TWO), spread())
