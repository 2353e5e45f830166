"""Tables over layers and texts."""

import pytest
import torch

import nsvd
from nsvd.lab.analysis import prime_overlap, rescored
from tests.tiny import tiny_model, token_ids

DOWN = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_overlap_of_prime_neurons_by_layer_and_pair_of_texts():
    """1 with itself, symmetric, a row a layer and ordered pair; with opposite scores 0."""
    stats = nsvd.calibrate(tiny_model(), token_ids())
    opposite = rescored(stats, {name: -stats[name].mean_abs for name in DOWN})
    table = prime_overlap({"a": stats, "b": opposite}, DOWN, 0.25)
    assert table[["block", "ours", "theirs", "overlap"]].values.tolist() == [
        [block, ours, theirs, float(ours == theirs)] for block in (0, 1) for ours in "ab" for theirs in "ab"
    ]


def test_rescored_statistics_change_the_ranking_only():
    """The layer's mean |h| is replaced, its second moment and all other layers' moments are the same objects."""
    stats = nsvd.calibrate(tiny_model(), token_ids())
    score = torch.arange(48, dtype=torch.float64)
    changed = rescored(stats, {DOWN[0]: score})
    assert changed[DOWN[0]].mean_abs is score
    assert changed[DOWN[0]].G is stats[DOWN[0]].G
    assert all(changed[name] is stats[name] for name in stats if name != DOWN[0])
    with pytest.raises(KeyError, match="nonsense"):
        rescored(stats, {"nonsense": score})
