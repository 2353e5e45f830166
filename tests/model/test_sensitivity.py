"""The table of STRS: one layer truncated at a time, the model as it was afterwards, everything measured once."""

import copy
import json

import pytest
import torch

import nsvd
from nsvd.lab.records import Records
from nsvd.linalg import Method, rank_for_ratio
from nsvd.linalg.allocation import n_params
from nsvd.model import allocation
from nsvd.model import sensitivity as module
from nsvd.model.layers import exchanged
from nsvd.model.loss import window_losses
from tests.linalg.reference import MATRIX
from tests.tiny import DOWN, K1, K, Q, assert_same, logits, poison, state, tiny_model, token_ids

IDS, TEXT, KEPT = token_ids(), token_ids(3, 16, seed=5), (0.3, 0.6)
FAST = {"method": "asvd-1", "kept": KEPT}


@pytest.fixture(scope="module")
def stats():
    """Moments of the tiny LLaMA, which every test builds anew."""
    return nsvd.calibrate(tiny_model(dtype=torch.float32), IDS)


@pytest.fixture
def decompositions(monkeypatch):
    """How often a layer has been decomposed."""
    calls, prepare = [], Method.prepare

    def counting(self, W, *args, **options):
        calls.append(tuple(W.shape))
        return prepare(self, W, *args, **options)

    monkeypatch.setattr(Method, "prepare", counting)
    return calls


@pytest.mark.parametrize("method", MATRIX)
def test_a_row_is_the_loss_of_the_model_with_that_layer_alone_compressed(method, stats):
    """For every method: ``compress_`` with one rank and the plain mean loss say the same."""
    options = {"k1": K1} if "k1" in nsvd.METHODS[method].options else {}
    measured = nsvd.sensitivity(tiny_model(), stats, TEXT, method=method, kept=KEPT, **options)
    assert list(measured.table.columns) == module.COLUMNS
    assert len(measured.table) == 2 * len(nsvd.targets(tiny_model()))
    rows = measured.table.set_index(["layer", "kept"])
    for name in (Q, DOWN):
        model, row = tiny_model(), rows.loc[name, 0.3]
        assert row["rank"] == rank_for_ratio(*model.get_submodule(name).weight.shape, 0.7)
        nsvd.compress_(model, stats, method=method, ranks={name: int(row["rank"])}, **options)
        losses = window_losses(model, TEXT)
        assert row.losses == losses.tolist()
        assert row.loss == pytest.approx(losses.mean().item())
    assert measured.dense == window_losses(tiny_model(), TEXT).tolist()
    assert measured.tokens == TEXT.numel() * len(measured.table)
    assert measured.seconds > 0


def test_each_layer_is_decomposed_once_and_the_model_is_left_alone(stats, decompositions):
    """All fractions come from one decomposition; none is made where ``prepared`` has it."""
    model = tiny_model()
    before = state(model)
    first = nsvd.sensitivity(model, stats, TEXT, **FAST)
    assert decompositions == [tuple(layer.weight.shape) for layer in nsvd.targets(model).values()]
    prepared = nsvd.prepare(model, stats, "asvd-1")
    decompositions.clear()
    again = nsvd.sensitivity(model, stats, TEXT, prepared=prepared, **FAST)
    assert decompositions == []
    assert again.scores == first.scores
    assert_same(before, model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_layer_is_put_back_when_something_raises(stats, monkeypatch, error):
    """In the middle of a measurement, whatever it is."""
    model, measure, seen = tiny_model(), module.window_losses, []

    def failing(changed, windows):
        seen.append([n for n, m in changed.named_modules() if isinstance(m, nsvd.LowRankLinear)])
        if len(seen) == 4:
            raise error
        return measure(changed, windows)

    monkeypatch.setattr(module, "window_losses", failing)
    before = state(model)
    with pytest.raises(error):
        nsvd.sensitivity(model, stats, TEXT, **FAST)
    assert seen == [[], [Q], [Q], [K]]
    assert_same(before, model)


def test_layers_are_exchanged_for_as_long_as_the_context_lasts():
    """A name that is not there changes nothing."""
    model = tiny_model()
    before, dense = state(model), model.get_submodule(Q)
    with exchanged(model, {Q: torch.nn.Identity()}):
        assert isinstance(model.get_submodule(Q), torch.nn.Identity)
    assert model.get_submodule(Q) is dense
    with pytest.raises(AttributeError), exchanged(model, {Q: torch.nn.Identity(), "model.nothing": dense}):
        pass
    assert_same(before, model)


def test_a_table_goes_on_where_it_stopped(tmp_path, stats, decompositions, monkeypatch):
    """Finished rows are read, not measured; another text, model or option is another table."""
    file, model, measure, calls = tmp_path / "table.jsonl", tiny_model(), module._measure, []

    def stopping(*arguments):
        calls.append(arguments[1])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(module, "_measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        nsvd.sensitivity(model, stats, TEXT, records=Records(file), **FAST)
    assert len(file.read_text().splitlines()) == 5
    decompositions.clear()
    whole = nsvd.sensitivity(model, stats, TEXT, records=Records(file), **FAST)
    assert len(calls) == 6 + 2 * 14 - 5
    assert len(decompositions) == 14 - 2  # two layers were complete
    again = nsvd.sensitivity(model, stats, TEXT, records=Records(file), **FAST)
    assert len(calls) == 6 + 2 * 14 - 5
    assert again.table.equals(whole.table)
    assert whole.scores == nsvd.sensitivity(model, stats, TEXT, **FAST).scores
    for other in ({"windows": IDS}, {"model": tiny_model(seed=1)}, {"method": "ridge"}, {"method": "ridge", "mu": 1.0}):
        before = len(calls)
        arguments = {"model": model, "stats": stats, "windows": TEXT} | FAST | other
        nsvd.sensitivity(records=Records(file), **arguments)
        assert len(calls) == before + 28


def test_nan_stops_with_the_name_of_the_layer(stats, monkeypatch):
    """In a weight, in an activation of the dense model, in the loss with one layer truncated; the model is unchanged."""
    model = tiny_model()
    poison(model, f"{DOWN}.weight")
    with pytest.raises(ValueError, match=f"weight of layer {DOWN}"):
        nsvd.sensitivity(model, stats, TEXT, **FAST)
    model = tiny_model()
    poison(model, "model.layers.1.input_layernorm.weight")
    for method in ("svd", "asvd-1"):
        with pytest.raises(FloatingPointError, match=r"input of layer model\.layers\.1\.self_attn\.q_proj"):
            nsvd.sensitivity(model, stats, TEXT, method=method)
    model, measure = tiny_model(), module.window_losses

    def broken(changed, windows):
        if isinstance(changed.get_submodule(K), nsvd.LowRankLinear):
            raise FloatingPointError("the loss of window 0 is NaN or Inf")
        return measure(changed, windows)

    monkeypatch.setattr(module, "window_losses", broken)
    before = state(model)
    with pytest.raises(FloatingPointError, match=f"layer {K}: the loss of window 0 is NaN"):
        nsvd.sensitivity(model, stats, TEXT, **FAST)
    assert_same(before, model)


def test_nan_in_one_truncated_layer_is_found_in_the_loss_itself(stats, monkeypatch):
    """Nothing is replaced by random weights: a factor that holds NaN is an error."""
    cut = Method.cut

    def spoilt(self, prepared, k, **options):
        value = cut(self, prepared, k, **options)
        if value.shape == (32, 48):
            value.left[0] = float("nan")
        return value

    monkeypatch.setattr(Method, "cut", spoilt)
    with pytest.raises(FloatingPointError, match=r"layer model\.layers\.0\.mlp\.down_proj: the loss of window 0"):
        nsvd.sensitivity(tiny_model(), stats, TEXT, **FAST)


def test_ranks_that_a_method_cannot_split_are_no_candidates(stats):
    """k1 = 0.9 of ranks up to 5 leaves no inner step; the other methods start at rank 1."""
    nested = nsvd.sensitivity(tiny_model(), stats, TEXT, method="nsvd-1", kept=(0.2, 0.6), k1=0.9).table
    plain = nsvd.sensitivity(tiny_model(), stats, TEXT, method="asvd-1", kept=(0.2, 0.6)).table
    assert plain["rank"].min() < 6 <= nested["rank"].min()
    assert len(plain) == 28 > len(nested)


@pytest.mark.parametrize("kept", [0.0, 1.0, -0.1, 0.01])
def test_a_kept_fraction_that_means_nothing_is_refused(kept, stats):
    """Outside (0, 1), or so small that no rank is left."""
    with pytest.raises(ValueError, match=f"layer {Q}"):
        nsvd.sensitivity(tiny_model(), stats, TEXT, method="asvd-1", kept=[kept])


def test_a_search_on_part_of_the_text_needs_no_new_measurement(stats):
    """``on(windows)`` is the table of those windows, at their share of the cost."""
    whole = nsvd.sensitivity(tiny_model(), stats, TEXT, **FAST)
    part, alone = whole.on([0, 2]), nsvd.sensitivity(tiny_model(), stats, TEXT[[0, 2]], **FAST)
    assert [row[:2] for row in part.scores] == [row[:2] for row in alone.scores]
    assert [row[2] for row in part.scores] == pytest.approx([row[2] for row in alone.scores], rel=1e-5)
    assert part.dense == pytest.approx(alone.dense, rel=1e-5)
    assert part.tokens == alone.tokens


@pytest.mark.parametrize("choice", ["strs", "spectrum"])
@pytest.mark.parametrize(
    ("method", "options"), [("asvd-1", {}), ("svd", {}), ("asvd", {"alpha": 1.0}), ("nsvd-1", {"k1": K1})]
)
def test_compress_meets_the_ratio_from_below_with_searched_ranks(choice, method, options, stats, decompositions):
    """One decomposition a layer; the report says the allocation and what the search cost."""
    model = tiny_model()
    report = nsvd.compress_(model, stats, method=method, ratio=0.3, allocation=choice, windows=TEXT, **options)
    assert 0.3 <= report.ratio_reached < 0.3 + 80 / report.params_before * 1.0001
    assert len(decompositions) == 14
    assert report.allocation == choice == model.config.quantization_config.allocation
    assert (report.search_tokens > 0) == (choice == "strs")
    assert report.seconds["search"] > 0
    assert json.loads(json.dumps(report.as_dict()))["allocation"] == choice
    assert not report.table.dense.all()


def test_the_ranks_follow_from_the_table(stats, tmp_path):
    """``compress_(allocation="strs")`` is the search on ``sensitivity``'s table, saved and read again."""
    searched, given, file = tiny_model(), tiny_model(), tmp_path / "table.jsonl"
    nsvd.compress_(searched, stats, method="asvd-1", ratio=0.3, allocation="strs", windows=TEXT)
    for _ in range(2):
        measured = nsvd.sensitivity(given, stats, TEXT, method="asvd-1", records=Records(file))
        ranks = allocation.strs(given, measured, 0.3)
    report = nsvd.compress_(given, stats, method="asvd-1", ranks=ranks)
    assert report.allocation == "given"
    assert torch.equal(logits(searched), logits(given))


def test_spectrum_needs_no_text_and_svd_no_statistics():
    """From the weights alone; nothing to remove is nothing to search."""
    model = tiny_model()
    report = nsvd.compress_(model, method="svd", ratio=0.4, allocation="spectrum")
    assert report.ratio_reached >= 0.4
    report = nsvd.compress_(tiny_model(), method="svd", ratio=0, allocation="spectrum")
    assert report.table.dense.all()


def test_a_perplexity_target_is_kept(stats):
    """The ranks found have at most this perplexity, and the model is left as it was."""
    model = tiny_model()
    before, dense = state(model), nsvd.perplexity(model, TEXT)
    prepared = nsvd.prepare(model, stats, "asvd-1")
    measured, target = nsvd.sensitivity(model, stats, TEXT, prepared=prepared, **FAST), 1.02 * dense
    ranks = allocation.strs_within(model, measured, prepared, TEXT, target, method="asvd-1")
    assert_same(before, model)
    assert 0 < n_params(ranks, allocation.shapes(model)) < n_params({}, allocation.shapes(model))
    changed = copy.deepcopy(model)
    nsvd.compress_(changed, stats, method="asvd-1", ranks=ranks)
    assert nsvd.perplexity(changed, TEXT) <= target
    with pytest.raises(ValueError, match="not even the dense model"):
        allocation.strs_within(model, measured, prepared, TEXT, 0.9 * dense, method="asvd-1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.3, "allocation": "best"}, "unknown allocation 'best'; there are uniform, strs, spectrum"),
        ({"ratio": 0.3, "allocation": "strs"}, "pass windows="),
        ({"ranks": {Q: 3}, "allocation": "spectrum"}, "give ratio in place of ranks"),
        ({"ratio": 0.97, "allocation": "spectrum", "method": "asvd-1"}, "out of reach"),
        ({"ratio": 1.0, "allocation": "spectrum"}, "ratio is 1"),
    ],
)
def test_an_allocation_that_cannot_be_made_changes_nothing(arguments, message, stats):
    """One sentence, before the work where that is possible."""
    model = tiny_model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        nsvd.compress_(model, stats, **arguments)
    assert_same(before, model)
