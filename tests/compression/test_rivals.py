"""The published allocations in the whole: what they measure on a text, and every way they go together with what else there is."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

import nsvd
from nsvd.compression import lems as module
from nsvd.compression import ranks as allocation
from nsvd.compression.lems import probes
from nsvd.linalg import rank_for_ratio
from nsvd.walk.gradients import weight_gradients_into
from tests.tiny import (
    DOWN,
    K1,
    LATE_WINDOW,
    assert_refused,
    assert_same,
    float32,  # noqa: F401
    logits,
    state,
    statistics,
    tiny_model,
    token_ids,
)

IDS, TEXT = token_ids(), token_ids(3, 16, seed=5)
LARGER = {"hidden_size": 96, "intermediate_size": 160}  # room for ranks in multiples of 8


@pytest.fixture(scope="module")
def stats():
    """Moments and gradients of the larger tiny LLaMA, which every test builds anew."""
    return statistics(tiny_model(dtype=torch.float32, **LARGER), IDS)


def louder(stats) -> nsvd.Statistics:
    """The same in a unit in which all truncation errors are above 1, as those of a trained model are."""
    return nsvd.Statistics(
        {name: replace(one, G=1e14 * one.G) for name, one in stats.moments.items()},
        stats.inputs,
        stats.origin,
        stats.gradients,
    )


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gpt_neox", {}), ("qwen2", LATE_WINDOW)])
def test_a_divergence_is_that_of_the_whole_model_with_one_layer_cut(family, changes):
    """KL of the predictions at temperature 0.6, from half-way of short windows on; the model is what it was."""
    model = tiny_model(family, dtype=torch.float64, **changes)
    prepared, before = nsvd.prepare(model, nsvd.calibrate(model, IDS), "asvd-1"), state(model)
    found = probes(model, TEXT, prepared, method="asvd-1")
    assert_same(before, model)
    assert list(found.measured) == list(nsvd.targets(model))
    assert found.tokens == TEXT.numel() * len(found.measured)
    with torch.no_grad():
        dense = (model(input_ids=TEXT).logits[:, 8:] / 0.6).log_softmax(-1)
        for name in list(found.measured)[::3]:
            k, told = found.measured[name]
            changed = copy.deepcopy(model)
            changed.get_submodule(name).weight.copy_(prepared[name].truncate(k).dense())
            ours = (changed(input_ids=TEXT).logits[:, 8:] / 0.6).log_softmax(-1)
            assert told == pytest.approx((dense.exp() * (dense - ours)).sum(-1).mean().item(), rel=1e-4, abs=1e-9)


def test_blocks_before_the_layer_do_not_run_again(monkeypatch):
    """A layer of the second of two blocks costs one block a batch, one of the first two."""
    model, ran = tiny_model(), []
    prepared, run = nsvd.prepare(model, None, "svd"), module.Text.before
    monkeypatch.setattr(module.Text, "before", lambda self, index: ran.append(index) or run(self, index))
    probes(model, TEXT, prepared, method="svd")
    assert ran == [0] * 7 + [1] * 7


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gpt_neox", {}), ("qwen2", LATE_WINDOW)])
def test_the_slope_of_every_weight_is_autograd_s(family, changes):
    """Of the mean loss of the next tokens over two texts of different lengths; nothing is left on the model."""
    model = tiny_model(family, dtype=torch.float64, **changes)
    texts, shares, found, before = [TEXT, token_ids(2, 9, seed=6)], [0.25, 0.75], {}, state(model)
    weight_gradients_into(found, model, texts, shares)
    assert_same(before, model)
    loss = sum(
        share * cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        for ids, share in zip(texts, shares, strict=True)
    )
    layers = nsvd.targets(model)
    expected = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
    assert set(found) == set(layers)
    for name, slope in zip(layers, expected, strict=True):
        torch.testing.assert_close(found[name], slope, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="windows of one token"):
        weight_gradients_into({}, model, [TEXT[:, :1]], [1.0])


def test_a_term_that_goes_changes_the_loss_as_predicted():
    """Cutting a twentieth of a term moves the loss by a twentieth of its predicted change, to first order."""
    model = tiny_model(dtype=torch.float64)
    prepared = nsvd.prepare(model, nsvd.calibrate(model, IDS), "asvd-1")
    changes = allocation.zero_sum_changes(model, None, prepared, [TEXT])
    layer, one, small = model.get_submodule(DOWN), prepared[DOWN], 0.05
    weight = layer.weight.detach().clone()

    @torch.no_grad()
    def loss_without(part: torch.Tensor) -> float:
        layer.weight.copy_(weight - part)
        return cross_entropy(model(input_ids=TEXT).logits[:, :-1].flatten(0, 1), TEXT[:, 1:].flatten()).item()

    for i in (0, 5, 31):
        term = small * torch.outer(one.U[:, i], one.right[i])
        moved = (loss_without(term) - loss_without(-term)) / 2
        assert moved / small == pytest.approx(changes[DOWN][i].item(), rel=1e-2, abs=1e-7)


@pytest.mark.parametrize("factors", ["plain", "pivoted"])
@pytest.mark.parametrize("choice", ["lems", "zero-sum", "svd-llm-v2"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("asvd-1", {}), ("nsvd-1", {"k1": K1}), ("kfac", {}), ("ridge", {"shifted": True}), ("kfac", {"shifted": True})],
)
def test_compress_meets_the_ratio_from_below(choice, method, options, factors, stats):
    """With every kind of method, way to store factors, and order; the report says the allocation and what the search read."""
    model = tiny_model(**LARGER)
    how = {"method": method, "ratio": 0.3, "allocation": choice, "factors": factors, "windows": TEXT}
    report = nsvd.compress_(model, louder(stats) if choice == "svd-llm-v2" else stats, **how, **options)
    assert 0.3 <= report.ratio_reached < 0.36
    assert report.allocation == choice == model.config.quantization_config.allocation
    assert (report.search_tokens > 0) == (choice != "svd-llm-v2") == ("search" in report.texts)
    assert json.loads(json.dumps(report.as_dict()))["allocation"] == choice
    assert logits(model).isfinite().all()


def test_svd_llm_v2_is_the_formula_on_the_whole_model(stats):
    """Ranks from L = ‖(W − Ŵ) X‖ at the common ratio, over the tokens of the calibration, within each name and shape."""
    model, stats = tiny_model(**LARGER), louder(stats)
    ranks = allocation.svd_llm_v2(model, stats, nsvd.prepare(model, stats, "asvd-1"), 0.3, method="asvd-1")
    weights = {}
    for name, layer in nsvd.targets(model).items():
        W = layer.weight.double()
        gone = W - nsvd.METHODS["asvd-1"](W, stats[name], rank_for_ratio(*W.shape, 0.3)).dense()
        loss = (stats[name].n * torch.trace(gone @ stats[name].G @ gone.T)).sqrt()
        weights.setdefault(name.split(".", 3)[3], {})[name] = 1 / loss.log().item()
    for group in weights.values():
        for name, weight in group.items():
            shape = model.get_submodule(name).weight.shape
            assert ranks[name] == rank_for_ratio(*shape, 0.3 * 2 * weight / sum(group.values()))


def test_the_ranks_of_lems_may_be_multiples_of_another_number(stats):
    """From the same measurements; given to ``compress_`` as ranks."""
    model = tiny_model(**LARGER)
    prepared = nsvd.prepare(model, stats, "asvd-1")
    found = probes(model, TEXT, prepared, method="asvd-1")
    eight, three = (allocation.lems(model, found, prepared, 0.3, method="asvd-1", multiple=m) for m in (8, 3))
    assert all(k % 8 == 0 for k in eight.values())
    assert all(k % 3 == 0 for k in three.values())
    report = nsvd.compress_(model, stats, method="asvd-1", ranks=three)
    assert report.ratio_reached >= 0.3


def test_fewer_windows_may_be_read(stats):
    """Ranks are those of a search on the first of them alone."""
    how = {"method": "asvd-1", "ratio": 0.3}
    for choice in ("lems", "zero-sum"):
        some = nsvd.compress_(tiny_model(**LARGER), stats, allocation=choice, windows=TEXT, search_count=2, **how)
        alone = nsvd.compress_(tiny_model(**LARGER), stats, allocation=choice, windows=TEXT[:2], **how)
        assert some.table["rank"].equals(alone.table["rank"])
        assert some.search_tokens == alone.search_tokens > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allocation": "lems"}, "'lems' measures the model on a text: pass windows="),
        ({"allocation": "lems", "windows": [IDS, IDS[:, :9]]}, "'lems' measures .* of one length"),
        ({"allocation": "zero-sum"}, "'zero-sum' takes the gradient of the loss on a text: pass windows="),
        ({"allocation": "zero-sum", "windows": IDS[:, :1]}, "windows of one token"),
        ({"allocation": "lems", "windows": IDS, "ratio": 0.8}, "out of reach: the smallest candidate ranks remove 0"),
        ({"allocation": "svd-llm-v2", "search_count": 2}, "search_count needs allocation .*, not 'svd-llm-v2'"),
        ({"allocation": "svd-llm-v2", "method": "kfac"}, "layer .*: the truncation error is .* logarithm"),
    ],
)
def test_an_allocation_that_cannot_be_made_changes_nothing(arguments, message, stats):
    """One sentence, before the work where that is possible."""
    assert_refused(tiny_model(**LARGER), stats, {"method": "asvd-1", "ratio": 0.3} | arguments, message)
