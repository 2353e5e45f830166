"""Tables over layers and texts."""

from dataclasses import replace

import pytest
import torch

import nsvd
from nsvd.lab import analysis
from nsvd.lab.analysis import largest, nesting, prime_overlap, rescored, similarity
from nsvd.walk.hooks import inputs_seen
from nsvd.walk.targets import targets
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


def test_nesting_costs_on_the_calibration_text_and_helps_where_all_directions_count_alike():
    """A row a layer: change > 0 on the text calibrated on, < 0 where G is the identity, 0 with k1 = 1; of ASVD-I's own k."""
    model = tiny_model()
    stats = nsvd.calibrate(model, token_ids())
    prepared = nsvd.prepare(model, stats, "asvd-1")
    white = {name: replace(stats[name], G=torch.eye(len(stats[name].G), dtype=torch.float64)) for name in stats}
    assert (nesting(model, prepared, stats, 0.3, k1=0.5).change > 0).all()
    assert (nesting(model, prepared, white, 0.3, k1=0.5).change < 0).all()
    assert nesting(model, prepared, stats, 0.3, k1=1.0).change.tolist() == [0] * len(stats)
    assert nesting(model, prepared, stats, 0.3, k1=0.5).layer.tolist() == list(stats)
    with pytest.raises(ValueError, match="prepared is for step asvd_0"):
        nesting(model, nsvd.prepare(model, stats, "asvd-0"), stats, 0.3)


def test_similarity_without_eigenvectors_is_the_same_but_for_the_subspaces():
    """``k=None`` leaves that column out and changes no other; with itself every measure is 1."""
    stats = nsvd.calibrate(tiny_model(), token_ids())
    whole = similarity(stats, stats)
    assert similarity(stats, stats, k=None).equals(whole.drop(columns="subspace"))
    assert torch.tensor(whole[["mean_abs", "moment", "subspace"]].values) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_inputs_are_those_of_one_pass_over_each_window(dtype, monkeypatch):
    """Of every target layer the largest |x| of each channel, in float64, whatever the batches; never below the mean |x|."""
    model, ids = tiny_model(dtype=dtype), token_ids(count=3)
    monkeypatch.setattr(analysis, "windows_read", lambda _length: 2)
    found = largest(model, ids)
    assert list(found) == list(targets(model))
    for name, layer in targets(model).items():
        with inputs_seen(layer) as seen, torch.no_grad():
            for window in ids:
                model(window[None])
        wanted = torch.stack([x.double().abs().amax((0, 1)) for x in seen]).amax(0)
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], wanted, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-5)
    stats = nsvd.calibrate(model, ids)
    assert all((found[name] >= 0.98 * stats[name].mean_abs).all() for name in stats)
