"""Neurons of feed-forwards that are left out beside lower ranks."""

import copy
from dataclasses import replace

import pytest
import torch

import nsvd
from nsvd.compression import exchange, whole_layers
from nsvd.compression.compress import carry_out
from nsvd.compression.exchange import Exchange
from nsvd.compression.report import Clock
from nsvd.compression.request import resolve
from nsvd.compression.whole_layers import put_narrow, without_neurons
from nsvd.linalg.neurons import Neurons
from nsvd.stored.checkpoint import describe
from nsvd.stored.layers import CompressedLayer, NarrowLinear
from nsvd.walk.folder import open_folder
from nsvd.walk.narrow import NARROW, narrow, tell_sizes, write_narrow
from nsvd.walk.shelf import Kept, Shelf
from nsvd.walk.statistics import Statistics
from nsvd.walk.targets import targets
from tests.tiny import (  # noqa: F401
    DOWN,
    assert_refused,
    assert_same,
    float32,
    logits,
    state,
    statistics,
    tiny_model,
    tiny_tokenizer,
    token_ids,
)

HOW = {"method": "best", "ratio": 0.4, "neurons": 0.5}
BREAKS = ("nsvd.compression.whole_layers.tell_sizes", "nsvd.compression.exchange.Exchange._cut")
BREAKS += ("nsvd.compression.whole_layers.check_runs",)
FAMILIES = ("llama", "qwen2", "gemma2", "opt", "gpt_neox", "phi", "gpt2")


def narrowed(family="llama", **changes):
    """A compressed model, its report, and the dense one."""
    dense = tiny_model(family)
    model = copy.deepcopy(dense)
    return model, nsvd.compress_(model, windows=token_ids(16, 24), **HOW | changes), dense


def asked(model, **changes):
    """The job of a compression, before anything is exchanged."""
    rest = dict.fromkeys(("ranks", "allocation", "factors", "shifted", "search_count"))
    how = {"refine": 0, "distill": 0, "weights": "uniform", "seed": 0, "progress": False}
    ask = resolve("best", {}, ratio=0.4, neurons=0.5, windows=token_ids(16, 24), **rest | how | changes)
    return Exchange(model, targets(model), statistics(model), ask, Clock())


def fail(*_):
    raise FloatingPointError("broken")


def in_files(folder, **changes):
    """A model that stays in its folder."""
    nsvd.save(tiny_model(**changes), tiny_tokenizer(), folder / "dense")
    return open_folder(folder / "dense", device="cpu")[0]


def targets_now(model):
    """The layers, or what is in their places."""
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear | CompressedLayer) and m is not model.lm_head]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_is_met_and_a_folder_gives_the_same_model_back(family, tmp_path):
    model, report, dense = narrowed(family)
    table = report.table
    assert 0.4 <= report.ratio_reached < 0.42
    weights = [p for m in model.modules() if isinstance(m, CompressedLayer) for p in m.parameters() if p.ndim == 2]
    rest = [layer.weight for layer in _some_dense(model).values()]
    assert sum(p.numel() for p in (*weights, *rest)) == report.params_after == table.params.sum()
    assert (table.outputs < table.d_out).any()
    assert (table.inputs < table.d_in).any()
    nsvd.save(model, None, tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    assert torch.equal(logits(again), logits(model))
    whole = again.dequantize()
    assert {n: t.shape for n, t in whole.state_dict().items()} == {n: t.shape for n, t in dense.state_dict().items()}
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-5)


def _some_dense(model):
    try:
        return targets(model)
    except ValueError:
        return {}


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_model_is_closer_than_by_ranks_alone_at_the_same_size(family):
    torch.manual_seed(0)
    dense = tiny_model(family, num_hidden_layers=3, vocab_size=300)
    for name, layer in targets(dense).items():  # half of the neurons hardly do anything
        if name.endswith(("gate_proj", "up_proj", "fc1")):
            layer.weight.data[::2] *= 0.02
            layer.weight.data *= 8
            if layer.bias is not None:
                layer.bias.data[::2] = 0
    found = {}
    for choice in (0.0, 0.5):
        model = copy.deepcopy(dense)
        nsvd.compress_(model, windows=token_ids(48, 24), **HOW | {"neurons": choice})
        found[choice] = float((logits(model) - logits(dense)).norm())
    assert found[0.5] < 0.9 * found[0.0]


def left_with(job, last, first, kept):
    """The job of a model with some neurons of one feed-forward left."""
    write_narrow(job.shelf, job.layers, last, first, kept, whole_layers._neurons(job, last).refitted(kept))
    return replace(job, **narrow(job.layers, job.stats, {last: first}, {last: kept}, job.shelf)._asdict())


def test_what_is_left_out_is_what_costs_least_for_each_parameter():
    job = asked(tiny_model())
    found = {DOWN: tuple(DOWN.replace("down", part) for part in ("gate", "up"))}
    found |= {
        name.replace("layers.1", "layers.0"): tuple(f.replace("layers.1", "layers.0") for f in first)
        for name, first in found.items()
    }
    removals = {last: whole_layers._neurons(job, last).removal(36) for last in found}
    kept = whole_layers.neurons_kept(job, found, removals)
    gone = {last: 48 - len(index) for last, index in kept.items()}
    unit, goal = 3 * 32, 0.5 * 0.4 * 15_360
    assert goal - 2 * 8 * unit <= unit * sum(gone.values()) <= goal  # whole multiples of eight are left
    rise = sum(float(removals[last].losses[count]) for last, count in gone.items())
    first, second = found
    for a in range(0, 37, 8):
        b = sum(gone.values()) - a
        if 0 <= b <= 36:
            assert rise <= float(removals[first].losses[a] + removals[second].losses[b]) + 1e-12


def test_the_narrow_model_is_the_refitted_one_and_its_statistics_are_those_of_what_is_left():
    model = tiny_model("opt")
    dense, job = copy.deepcopy(model), asked(model)
    fc1, fc2 = "model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"
    kept = torch.arange(0, 48, 2)
    smaller = left_with(job, fc2, (fc1,), kept)
    put_narrow(smaller)
    H = job.stats[fc2].H.double()
    ridge = job.options["eta"] * H.diagonal().mean() * torch.eye(len(H))
    D = dense.get_submodule(fc2).weight.double()
    wanted = Neurons(D, job.stats[fc2].G.double(), H + ridge, mu=job.options["mu"]).refitted(kept)
    torch.testing.assert_close(model.get_submodule(fc2).weight, wanted.float())
    assert torch.equal(model.get_submodule(fc1).weight, dense.get_submodule(fc1).weight[kept])
    assert torch.equal(model.get_submodule(fc1).bias, dense.get_submodule(fc1).bias[kept])
    assert torch.equal(smaller.stats[fc2].G, job.stats[fc2].G[kept][:, kept])
    assert torch.equal(smaller.stats[fc1].H, job.stats[fc1].H[kept][:, kept])
    assert torch.equal(smaller.stats[fc1].G, job.stats[fc1].G)
    assert 1 - smaller.ratio == pytest.approx(int(0.6 * 14_336) / (14_336 - 2 * 24 * 32))
    for name in (fc1, fc2):
        model.set_submodule(name, NarrowLinear.of(model.get_submodule(name)))
    tell_sizes(model, smaller.originals)
    assert describe(model.get_submodule(fc1)) == {"layer": NarrowLinear.kind, "outputs": 24}
    whole = model.get_submodule(fc2).to_linear()
    assert torch.equal(whole.weight[:, :24], model.get_submodule(fc2).weight)
    assert not whole.weight[:, 24:].any()


def test_the_dense_stream_is_that_of_the_dense_model():
    """With nothing else removed, the layers behind make up for the neurons that are gone."""
    dense = tiny_model(num_hidden_layers=3)
    model = copy.deepcopy(dense)
    job = asked(model)
    last = "model.layers.0.mlp.down_proj"
    first = tuple(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up"))
    smaller = left_with(job, last, first, torch.arange(16))
    put_narrow(smaller)
    before = float((logits(model) - logits(dense)).norm())
    with torch.no_grad():
        smaller.in_order(list(smaller.layers), {})
    assert float((logits(model) - logits(dense)).norm()) < 0.9 * before


@pytest.mark.parametrize("place", BREAKS)
def test_when_something_raises_the_model_is_as_it_was(monkeypatch, place):
    model = tiny_model()
    before = state(model)
    monkeypatch.setattr(place, fail)
    with pytest.raises(FloatingPointError, match="broken"):
        nsvd.compress_(model, windows=token_ids(16, 24), **HOW)
    assert_same(before, model)


@pytest.mark.parametrize("place", BREAKS)
def test_when_something_raises_a_model_in_files_is_as_it_was(monkeypatch, place, tmp_path):
    model = in_files(tmp_path)
    before, ask = logits(model), asked(model).ask
    monkeypatch.setattr(place, fail)
    with pytest.raises(FloatingPointError, match="broken"):
        carry_out(model, ask, shelf=Shelf(tmp_path / "shelf"))
    assert torch.equal(logits(model), before)
    assert not any(isinstance(module, CompressedLayer) for module in model.modules())


@pytest.mark.once
def test_one_block_is_in_memory_at_a_time(monkeypatch, tmp_path):
    """Of eight in files, with what its layers were, in all that follows the choice of neurons."""
    model, most, begun = in_files(tmp_path, num_hidden_layers=8), [], []
    ask = asked(model).ask
    parts = (*model.model.layers[0].modules(), *model.model.layers[7].modules())

    def watch(job):
        def look(*_):
            layers = {id(layer): layer for layer in (*job.before.values(), *job.layers.values(), *targets_now(model))}
            most.append(sum(p.nbytes for one in layers.values() for p in one.parameters() if not p.is_meta))

        for module in parts:
            module.register_forward_pre_hook(look)
        begun.append(job)

    put_in = whole_layers.put_narrow
    monkeypatch.setattr(whole_layers, "put_narrow", lambda job: (put_in(job), watch(job)))
    carry_out(model, ask, shelf=Shelf(tmp_path / "shelf"))
    (job,) = begun
    assert len(job.originals) > 15
    block = sum(p.nbytes for n, one in targets(tiny_model()).items() if ".0." in n for p in one.parameters())
    assert block / 2 < max(most) < 2 * block
    assert all(p.is_meta for one in (*job.before.values(), *job.layers.values()) for p in one.parameters())


def test_statistics_on_a_shelf_are_cut_there():
    """So they are not in memory at once; those that were given stay as they are."""
    model, shelf = tiny_model(), Shelf()
    job = asked(model)
    moments, gradients = shelf.kept("moments"), shelf.kept("gradients")
    moments.update(job.stats.moments)
    gradients.update(job.stats.gradients)
    known = Statistics(moments, job.stats.inputs, job.stats.origin, gradients)
    given, ours = without_neurons(job), without_neurons(replace(job, stats=known))
    assert isinstance(ours.stats.moments, Kept)
    assert isinstance(ours.stats.gradients, Kept)
    assert ours.originals.keys() == given.originals.keys()
    for name, layer in given.layers.items():
        assert torch.equal(layer.weight, ours.layers[name].weight)
        assert torch.equal(given.stats[name].G, ours.stats[name].G)
        assert torch.equal(given.stats[name].mean_abs, ours.stats[name].mean_abs)
        assert torch.equal(given.stats[name].H, ours.stats[name].H)
        assert (len(layer.weight), layer.weight.shape[1]) == (len(given.stats[name].H), len(given.stats[name].G))
    assert len(job.stats[DOWN].G) == 48 > len(given.stats[DOWN].G)
    assert not shelf.keys(NARROW)


def test_what_does_not_go_with_it_is_refused():
    model, stats = tiny_model(), statistics(tiny_model())
    for how in ({"method": "asvd-1"}, {"allocation": "uniform"}, {"shifted": False}):
        assert_refused(model, stats, HOW | {"windows": token_ids()} | how, "neurons are left out by what")
    assert_refused(model, stats, HOW | {"windows": token_ids(), "neurons": 1.5}, "a share of what is removed")
    assert_refused(model, stats, HOW | {"windows": token_ids(), "neurons": "half"}, "neurons is 'half'")
    assert_refused(model, stats, HOW | {"windows": token_ids(), "mu": 0.0}, "positive ridge")
    prepared = nsvd.prepare(model, stats, "kfac")
    assert_refused(model, stats, HOW | {"windows": token_ids(), "prepared": prepared}, "give one of the two")


def test_a_feed_forward_that_is_not_chosen_whole_loses_none():
    model, stats = tiny_model(), statistics(tiny_model())
    how = HOW | {"windows": token_ids(), "exclude": "gate_proj"}
    assert_refused(model, stats, how, "none of them is among the layers whole")
    report = nsvd.compress_(
        model, stats, **HOW | {"windows": token_ids(), "exclude": "layers.0.mlp.gate_proj", "ratio": 0.3}
    )
    table = report.table.set_index("layer")
    assert table.loc[DOWN, "inputs"] < 48
    assert table.loc[DOWN.replace("1", "0"), "inputs"] == 48


@pytest.mark.parametrize("size", [37, 48, 50])
def test_neurons_alone_remove_no_more_than_is_asked(size):
    dense = tiny_model(intermediate_size=size)
    model = copy.deepcopy(dense)
    report = nsvd.compress_(model, windows=token_ids(16, 24), **HOW | {"neurons": 1.0, "ratio": 0.1})
    assert 0.1 <= report.ratio_reached < 0.13
    assert report.params_after == sum(report.table.params)


def test_labels_and_the_teacher_of_the_distillation_are_the_dense_model_s(monkeypatch):
    model = tiny_model()
    dense, seen = copy.deepcopy(model), []
    drawn, distilled = whole_layers.drawn_labels, exchange.distill_

    def labels(now, *rest, **how):
        seen.append(torch.equal(logits(now), logits(dense)))
        return drawn(now, *rest, **how)

    def distil(now, teacher, *rest, **how):
        assert len(teacher) == 14
        seen.append(all(torch.equal(layer.weight, dense.get_submodule(n).weight) for n, layer in teacher.items()))
        return distilled(now, teacher, *rest, **how)

    monkeypatch.setattr(whole_layers, "drawn_labels", labels)
    monkeypatch.setattr(exchange, "distill_", distil)
    report = nsvd.compress_(
        model, windows=[token_ids(16, 24), token_ids(16, 24, seed=3)], **HOW | {"distill": 12, "refine": 12}
    )
    assert seen == [True, True, True]
    assert len(report.losses) in (0, 12)


def test_the_parameters_of_the_whole_model_are_counted_with_its_biases():
    _, report, dense = narrowed("opt")
    assert report.model_params_before == dense.num_parameters()


def test_a_narrow_layer_is_one_of_ours():
    layer = torch.nn.Linear(6, 4).double()
    narrow = NarrowLinear.of(layer)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(narrow(x), layer(x))
    assert narrow.weight is narrow.kept.weight
    assert narrow.left() == {}
    assert describe(narrow) == {"layer": "narrow"}
    with pytest.raises(ValueError, match="5 outputs and 6 inputs of a 4 × 6 matrix"):
        NarrowLinear.like(layer, outputs=5)


def test_neurons_that_a_norm_reads_are_not_left_out():
    """What one of them gives depends on all: asked for they are refused, and ``best`` does without."""
    model = tiny_model("bitnet", intermediate_size=48, num_key_value_heads=2)
    before = state(model)
    with pytest.raises(ValueError, match="neurons cannot be left out of BitNetForCausalLM: what one of them gives"):
        nsvd.compress_(model, windows=token_ids(16, 24), **HOW)
    assert_same(before, model)
    report = nsvd.compress_(model, method="best", windows=token_ids(16, 24), ratio=0.4)
    assert report.neurons == 0
    assert 0.4 <= report.ratio_reached < 0.42


@pytest.mark.parametrize(
    "how", [{"layers": "self_attn.*"}, {"allocation": "uniform"}, {"shifted": False}, {"neurons": 0.0}]
)
def test_best_does_without_where_there_are_none_to_leave_out(how):
    """The same bits as those of its other ingredients; the report, and with it the card, says so."""
    ours, theirs = tiny_model(), tiny_model()
    report = nsvd.compress_(ours, windows=token_ids(16, 24), method="best", ratio=0.4, **how)
    spelt = {"method": "kfac", "mu": 0.3, "allocation": "fisher", "factors": "pivoted", "shifted": True}
    nsvd.compress_(theirs, windows=token_ids(16, 24), ratio=0.4, **spelt | {"neurons": 0.0} | how)
    assert report.neurons == 0
    assert torch.equal(logits(ours), logits(theirs))
    prepared = nsvd.prepare(tiny_model(), statistics(tiny_model()), "kfac", mu=0.3)
    how = {"method": "best", "windows": token_ids(16, 24), "ratio": 0.4, "shifted": False, "prepared": prepared}
    assert nsvd.compress_(tiny_model(), statistics(tiny_model()), **how).neurons == 0


def test_the_card_and_the_overview_tell_of_them(tmp_path):
    model, _, _ = narrowed()
    nsvd.save(model, None, tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert "neurons" in card
    assert "48 × 32" in card
