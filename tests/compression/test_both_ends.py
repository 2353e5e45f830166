"""``best`` weighs errors by gradients from both ends of its way: the dense model and the compressed one."""

import copy

import pytest
import torch

import nsvd
from nsvd.compression import whole_layers
from nsvd.compression.exchange import Exchange
from nsvd.compression.measure import gradient_texts
from nsvd.walk.gradients import drawn_labels
from tests.tiny import assert_same, logits, state, tiny_model, token_ids

IDS = token_ids(40, 9)
AT_ONCE = {"method": "kfac", "allocation": "fisher", "factors": "pivoted", "windows": IDS}


def model_and_statistics():
    model = tiny_model(dtype=torch.float64)
    return model, nsvd.calibrate(model, IDS).with_gradients(nsvd.fisher(model, IDS[::2]))


def ranks(report) -> dict[str, int]:
    return {row.layer: int(row["rank"]) for _, row in report.table.iterrows() if not row.dense}


def test_the_gradients_are_those_of_both_ends_averaged():
    """Step by step: compress at once, take gradients there, average, find the ranks again, go in order with these ranks."""
    model, stats = model_and_statistics()
    there = copy.deepcopy(model)
    nsvd.compress_(there, stats, ratio=0.4, **AT_ONCE)
    (text,) = gradient_texts([IDS], others=True)
    H = nsvd.fisher(there, text, layers=stats.gradients, labels=drawn_labels(model, text))
    both = stats.with_gradients({name: (stats[name].H + H[name]) / 2 for name in H})
    found = ranks(nsvd.compress_(copy.deepcopy(model), both, ratio=0.4, **AT_ONCE))
    expected, one_end = copy.deepcopy(model), copy.deepcopy(model)
    in_order = {"method": "kfac", "factors": "pivoted", "shifted": True, "windows": IDS}
    full = {
        name: min(layer.weight.shape) for name, layer in nsvd.targets(model).items()
    }  # they stay dense, and are fitted
    nsvd.compress_(expected, both, ranks=full | found, **in_order)
    nsvd.compress_(one_end, stats, ranks=full | found, **in_order)
    report = nsvd.compress_(model, stats, method="best", ratio=0.4, windows=IDS, neurons=0, mu=0.01)
    assert ranks(report) == found
    torch.testing.assert_close(logits(model), logits(expected))
    assert (logits(model) - logits(one_end)).norm() > 1e-6 * logits(model).norm()


def test_the_windows_of_the_two_ends_are_others():
    """Every second of forty for the one, as sixteen at least are wanted, those between for the other."""
    (first,), (others,) = gradient_texts([IDS]), gradient_texts([IDS], others=True)
    assert len(first) == len(others) == 20
    assert not set(map(tuple, first.tolist())) & set(map(tuple, others.tolist()))


def test_ranks_are_found_on_every_second_window_and_all_are_followed(monkeypatch):
    """Where ranks are given, or layers are not followed, the statistics are of all."""
    followed = []

    def in_order(self, *args, known=Exchange.in_order):
        followed.append([tuple(ids.shape) for ids in self.ask.domains])
        return known(self, *args)

    monkeypatch.setattr(Exchange, "in_order", in_order)
    how = {"method": "best", "windows": IDS}
    report = nsvd.compress_(tiny_model(), ratio=0.4, **how)
    assert report.calibration["windows"] == [20, 9]
    found = ranks(report)
    assert nsvd.compress_(tiny_model(), ranks=found, **how).calibration["windows"] == [40, 9]
    assert nsvd.compress_(tiny_model(), ratio=0.4, shifted=False, **how).calibration["windows"] == [40, 9]
    assert followed == [[(40, 9)]] * 2


def test_an_error_at_the_other_end_leaves_the_model_as_it_was(monkeypatch):
    """Gradients fail while the compressed layers are in their place."""
    model, stats = model_and_statistics()
    before = state(model)

    def fails(*_args, **_how):
        raise FloatingPointError("no gradient")

    monkeypatch.setattr(whole_layers, "fisher_into", fails)
    with pytest.raises(FloatingPointError, match="no gradient"):
        nsvd.compress_(model, stats, method="best", ratio=0.4, windows=IDS)
    assert_same(before, model)
