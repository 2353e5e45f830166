"""Moments taken block by block are those of one pass over the whole model, and no more than a block's are held."""

import pytest
import torch

import nsvd
from nsvd.walk import stream
from nsvd.walk.calibrate import Walked, walkable
from nsvd.walk.hooks import watch_inputs
from tests.tiny import FAMILIES, LATE_WINDOW, Q, assert_same, poison, state, tiny_model, token_ids

IDS, OTHER = token_ids(19, 12), token_ids(9, 7, seed=5)
FIRST, LAST = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_calibrate_to_the_bit(family):
    """For every layer, in the order of the model; what was measured is told alike."""
    model = tiny_model(family)
    whole, walked = nsvd.calibrate(model, IDS), Walked(walkable(model), [IDS], list(nsvd.targets(model)))
    assert list(walked) == list(whole)
    assert walked.inputs == whole.inputs
    assert walked.origin == whole.origin
    for name in walked:
        assert torch.equal(walked[name].G, whole[name].G)
        assert torch.equal(walked[name].mean_abs, whole[name].mean_abs)
        assert walked[name].n == whole[name].n


def test_every_block_is_called_with_its_own_arguments():
    """Moments behind a block that looks less far back than the first are those of the whole model, by whichever way."""
    model, seen = tiny_model("qwen2", dtype=torch.float64, **LATE_WINDOW), {}
    names = list(nsvd.targets(model))
    with torch.no_grad(), watch_inputs(model, names, seen.__setitem__):
        model(input_ids=IDS, use_cache=False)
    for stats in (nsvd.calibrate(model, IDS), Walked(walkable(model), [IDS], names)):
        for name in names:
            x = seen[name].double().flatten(0, -2)
            torch.testing.assert_close(stats[name].G, x.mT @ x / len(x), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weights", ["uniform", [3.0, 1.0]])
def test_several_domains_are_mixed_as_mix_does(weights):
    model = tiny_model()
    whole = nsvd.mix([nsvd.calibrate(model, ids) for ids in (IDS, OTHER)], weights)
    walked = Walked(walkable(model), [IDS, OTHER], list(nsvd.targets(model)), weights)
    assert walked.origin == whole.origin
    for name in walked:
        torch.testing.assert_close(walked[name].G, whole[name].G, rtol=1e-12, atol=0)
        torch.testing.assert_close(walked[name].mean_abs, whole[name].mean_abs, rtol=1e-12, atol=0)


def test_no_more_than_one_block_s_moments_are_held():
    """Those of a block that is passed are gone, and to ask for them is an error."""
    model = tiny_model(num_hidden_layers=6)
    walked, most = Walked(walkable(model), [IDS], list(nsvd.targets(model))), 0
    for name in walked:
        walked[name]
        most = max(most, len(walked._moments))
    assert most == 4  # what queries, keys and values read; attention; gate and up; neurons
    with pytest.raises(KeyError, match=f"the moments of layer {FIRST} are gone"):
        walked[FIRST]
    with pytest.raises(KeyError, match="no layer 'nothing'"):
        walked["nothing"]


def test_layers_of_a_passed_block_may_be_exchanged():
    """The text goes on behind them as the dense model has it."""
    model, names = tiny_model(), list(nsvd.targets(tiny_model()))
    whole, walked = nsvd.calibrate(model, IDS), Walked(walkable(model), [IDS], names)
    walked[LAST]
    model.get_submodule(FIRST).weight.data.zero_()
    assert torch.equal(walked[LAST].G, whole[LAST].G)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (Q, f"the input of layer {Q} holds NaN"),
        ("model.layers.1.mlp.up_proj", r"model\.layers\.1\.mlp\.down_proj holds NaN"),
    ],
)
def test_a_nan_is_named_when_its_block_comes(name, message):
    """And the model stays as it was."""
    model = tiny_model()
    poison(model, "model.layers.0.input_layernorm.weight" if name == Q else f"{name}.weight")
    before, walked = state(model), Walked(walkable(model), [IDS], list(nsvd.targets(model)))
    with pytest.raises(FloatingPointError, match=message):
        dict(walked.items())
    assert_same(before, model)


def test_compression_needs_them_once_and_gives_the_same_model():
    """Windows in place of statistics: equal layers, equal errors in the report."""
    one, other = tiny_model(), tiny_model()
    given = nsvd.compress_(one, nsvd.calibrate(one, IDS), method="nsvd-1", ratio=0.3, k1=0.8)
    taken = nsvd.compress_(other, method="nsvd-1", ratio=0.3, k1=0.8, windows=IDS)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert given.table.equals(taken.table)
    assert taken.calibration == given.calibration


def test_batches_are_of_tokens_and_change_nothing(monkeypatch):
    """As many windows as ``READ`` tokens are, of every domain; the moments are the same but for rounding."""
    model = tiny_model(dtype=torch.float64)
    names, seen = list(nsvd.targets(model)), []
    whole = Walked(walkable(model), [IDS, OTHER], names)
    monkeypatch.setattr(stream, "READ", 40)
    parts = Walked(walkable(model), [IDS, OTHER], names)
    model.model.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape[:2])))
    for name in names:
        torch.testing.assert_close(parts[name].G, whole[name].G, rtol=1e-9, atol=1e-12)
    assert seen[:9] == 6 * [(3, 12)] + [(1, 12), (5, 7), (4, 7)]
    assert [stream.windows_read(length) for length in (1, 20, 41, 1000)] == [40, 2, 1, 1]
