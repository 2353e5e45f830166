"""The published route that ours is measured against does what it says."""

import copy

import torch

import nsvd
from benchmarks import calibrate, published
from tests.tiny import float32, tiny_model, token_ids  # noqa: F401

IDS = token_ids(24, 16)


def test_its_moments_are_ours_of_every_layer_s_own_input():
    model, names = tiny_model(), list(nsvd.targets(tiny_model()))
    stats, sums = nsvd.calibrate(model, IDS), published.moments(model, IDS, names, 5)
    assert list(sums) == names
    for name in names:
        size = stats[name].G.diagonal().sqrt()
        assert ((sums[name] / IDS.numel() - stats[name].G).abs() <= 1e-5 * size[:, None] * size).all()


def test_its_model_is_that_of_asvd_1():
    """Two dense layers in the place of each, of the same ranks; the same predictions."""
    ours, theirs = tiny_model(), tiny_model()
    nsvd.compress_(ours, method="asvd-1", ratio=0.3, windows=IDS)
    published.compress_(theirs, IDS, 0.3, 5)
    with torch.no_grad():
        said = [model(input_ids=IDS[:2]).logits for model in (ours, theirs)]
    torch.testing.assert_close(*said, rtol=1e-3, atol=1e-4)


def test_every_pass_is_told_in_units_of_the_plain_one():
    told = calibrate.measured(copy.deepcopy(tiny_model()), IDS, batch=4, repeat=1)
    assert told["in forward passes"]["forward"] == 1
    assert set(told["seconds"]) == set(told["in forward passes"])
    assert {"statistics", "published, float64"} < set(told["seconds"])
