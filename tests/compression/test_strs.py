"""The table of STRS: one layer truncated at a time, the model as it was afterwards, everything measured once."""

import copy
import json

import pytest
import torch

import nsvd
from nsvd.compression import ranks as allocation
from nsvd.compression import strs as module
from nsvd.lab.records import Records
from nsvd.linalg import Method, rank_for_ratio
from nsvd.linalg.budget import total
from nsvd.walk.loss import window_losses
from tests.linalg.reference import MATRIX
from tests.tiny import (
    DOWN,
    K1,
    LATE_WINDOW,
    K,
    Q,
    assert_refused,
    assert_same,
    logits,
    poison,
    state,
    statistics,
    tiny_model,
    token_ids,
)

IDS, TEXT, KEPT = token_ids(), token_ids(3, 16, seed=5), (0.3, 0.6)
FAST = {"method": "asvd-1", "kept": KEPT}


@pytest.fixture(scope="module")
def stats():
    """Moments and gradients of the tiny LLaMA, which every test builds anew."""
    return statistics(tiny_model(dtype=torch.float32), IDS)


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


def test_blocks_of_other_masks_are_measured_alike():
    """A layer behind blocks that look less far back than the first: the loss is that of ``compress_``."""
    build, name = lambda: tiny_model("qwen2", **LATE_WINDOW), "model.layers.2.mlp.down_proj"
    measured = nsvd.sensitivity(build(), None, TEXT, method="svd", kept=(0.3,))
    row, model = measured.table.set_index("layer").loc[name], build()
    nsvd.compress_(model, method="svd", ranks={name: int(row["rank"])})
    assert row.losses == window_losses(model, TEXT).tolist()


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


def test_what_was_prepared_for_something_else_is_refused(stats):
    """A plain mapping, another outer step, other weights or statistics: wherever ``prepared`` is taken."""
    model, other = tiny_model(), tiny_model(seed=1)
    ours, theirs = nsvd.prepare(model, stats, "asvd-1"), nsvd.prepare(model, stats, "asvd-0")
    table = nsvd.sensitivity(model, stats, TEXT, prepared=ours, **FAST)
    another = nsvd.prepare(model, nsvd.calibrate(model, TEXT), "asvd-1")
    how = {"method": "asvd-1"}
    uses = [
        (
            lambda prepared, model: nsvd.sensitivity(model, stats, TEXT, prepared=prepared, **FAST),
            [dict(ours), another],
        ),
        (lambda prepared, model: module.strs_within(model, table, prepared, TEXT, 9.0, **how), [dict(ours)]),
        (lambda prepared, model: allocation.spectrum(model, prepared, 0.3, **how), []),
        (lambda prepared, model: allocation.by_loss(model, stats, prepared, 0.3, **how), []),
    ]
    for use, more in uses:
        for prepared, where in [(theirs, model), (ours, other), *((one, model) for one in more)]:
            with pytest.raises(ValueError, match=r"prepared (is|was made) "):
                use(prepared, where)


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
    with module.exchanged(model, {Q: torch.nn.Identity()}):
        assert isinstance(model.get_submodule(Q), torch.nn.Identity)
    assert model.get_submodule(Q) is dense
    with pytest.raises(AttributeError), module.exchanged(model, {Q: torch.nn.Identity(), "model.nothing": dense}):
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
    model.get_submodule("model.layers.1.input_layernorm").register_forward_hook(lambda _m, _args, y: y * float("nan"))
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


def test_nan_in_one_truncated_layer_is_found_in_its_factors(stats, monkeypatch):
    """Nothing is replaced by random weights: a factor that holds NaN is an error."""
    cut = Method.cut

    def spoilt(self, prepared, k, **options):
        value = cut(self, prepared, k, **options)
        if value.shape == (32, 48):
            value.left[0] = float("nan")
        return value

    monkeypatch.setattr(Method, "cut", spoilt)
    with pytest.raises(
        FloatingPointError, match=r"layer model\.layers\.0\.mlp\.down_proj: up\.weight of its low-rank factors"
    ):
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


def test_a_kept_fraction_is_a_larger_rank_of_pivoted_factors(stats, tmp_path):
    """The loss is measured at the rank that the search will give; of the two tables neither is taken for the other."""
    records, model = Records(tmp_path / "table.jsonl"), tiny_model()
    plain, piv = (
        nsvd.sensitivity(model, stats, TEXT, factors=name, records=records, **FAST).table
        for name in ("plain", "pivoted")
    )
    for tables, name in ((plain, "plain"), (piv, "pivoted")):
        shapes = allocation.shapes(model)
        assert list(tables["rank"]) == [rank_for_ratio(*shapes[r.layer], 1 - r.kept, name) for r in tables.itertuples()]
    more = piv["rank"] > plain["rank"]
    assert more.any()
    assert (piv["rank"] >= plain["rank"]).all()
    assert ((piv.loss == plain.loss) == ~more).all()


def test_other_gradients_are_another_table(stats, tmp_path):
    """As other moments are."""
    records, model = Records(tmp_path / "table.jsonl"), tiny_model()
    other = stats.with_gradients(nsvd.fisher(model, TEXT, seed=5))
    tables = [nsvd.sensitivity(model, s, TEXT, method="kfac", kept=[0.3], records=records) for s in (stats, other)]
    assert tables[0].scores != tables[1].scores


def test_the_search_may_read_fewer_windows_than_are_followed():
    """Ranks are those of a search on the first of them alone; all tokens of both searches are counted."""
    how = {"method": "kfac", "ratio": 0.3, "allocation": "strs", "windows": TEXT}
    given = nsvd.calibrate(tiny_model(), TEXT).with_gradients(nsvd.fisher(tiny_model(), TEXT))
    some = nsvd.compress_(tiny_model(), given, search_count=2, **how)
    alone = nsvd.compress_(tiny_model(), given, **how | {"windows": TEXT[:2]})
    assert some.table["rank"].equals(alone.table["rank"])
    assert some.search_tokens == alone.search_tokens > 0
    twice = nsvd.compress_(tiny_model(), given, search_count=2, shifted=True, **how)
    assert twice.search_tokens == 2 * some.search_tokens


@pytest.mark.parametrize("factors", ["plain", "pivoted"])
@pytest.mark.parametrize("choice", ["strs", "spectrum", "fisher"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("asvd-1", {}), ("svd", {}), ("asvd", {"alpha": 1.0}), ("nsvd-1", {"k1": K1}), ("kfac", {})],
)
def test_compress_meets_the_ratio_from_below_with_searched_ranks(
    choice, method, options, factors, stats, decompositions
):
    """One decomposition a layer; the report says the allocation and what the search cost."""
    model, how = tiny_model(), {"ratio": 0.3, "allocation": choice, "factors": factors}
    report = nsvd.compress_(model, stats, method=method, windows=TEXT, **how, **options)
    assert 0.3 <= report.ratio_reached < 0.3 + 80 / report.params_before * 1.0001
    assert len(decompositions) == 14
    assert report.allocation == choice == model.config.quantization_config.allocation
    assert (report.search_tokens > 0) == (choice == "strs")
    assert report.seconds["search"] > 0
    assert json.loads(json.dumps(report.as_dict()))["allocation"] == choice
    assert report.factors == factors == model.config.quantization_config.factors
    assert not report.table.dense.all()


def test_the_loss_s_gradients_say_which_layers_to_spare(stats):
    """Made ten times as large for one layer, its outputs are kept more exactly; relative spectra would not see it."""
    spared = dict(stats.gradients) | {DOWN: 100 * stats.gradients[DOWN]}
    for method in ("kfac", "asvd-1"):
        errors = {"fisher": [], "spectrum": []}
        for choice, found in errors.items():
            for gradients in (stats.gradients, spared):
                how = {"method": method, "ratio": 0.3, "allocation": choice, "factors": "pivoted"}
                report = nsvd.compress_(tiny_model(), stats.with_gradients(gradients), **how)
                found.append(report.table.set_index("layer")["rank"].fillna(32)[DOWN])
        assert errors["fisher"][1] > errors["fisher"][0]
        assert errors["spectrum"][1] == errors["spectrum"][0]


def test_the_fisher_allocation_takes_what_it_needs_from_a_text():
    """Also for a method that asks for no statistics; without text and gradients the layer is named."""
    report = nsvd.compress_(tiny_model(), method="svd", ratio=0.3, allocation="fisher", windows=IDS)
    assert report.ratio_reached >= 0.3
    assert {"calibrate", "gradients"} <= report.seconds.keys()
    for stats in (None, nsvd.calibrate(tiny_model(), IDS)):
        with pytest.raises(
            ValueError, match=f"allocation 'fisher' weighs the outputs of layer {Q} by the loss: pass windows="
        ):
            nsvd.compress_(tiny_model(), stats, method="svd", ratio=0.3, allocation="fisher")


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
    ranks = module.strs_within(model, measured, prepared, TEXT, target, method="asvd-1")
    assert_same(before, model)
    assert 0 < total(ranks, allocation.shapes(model)) < total({}, allocation.shapes(model))
    changed = copy.deepcopy(model)
    nsvd.compress_(changed, stats, method="asvd-1", ranks=ranks)
    assert nsvd.perplexity(changed, TEXT) <= target
    with pytest.raises(ValueError, match="not even the dense model"):
        module.strs_within(model, measured, prepared, TEXT, 0.9 * dense, method="asvd-1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.3, "allocation": "best"}, "unknown allocation 'best'; there are uniform, strs, spectrum"),
        ({"ratio": 0.3, "allocation": "strs"}, "pass windows="),
        ({"ratio": 0.3, "allocation": "strs", "windows": []}, "pass windows="),
        (
            {"ratio": 0.3, "search_count": 2, "windows": IDS},
            "search_count needs allocation strs, lems, zero-sum, not 'uniform'",
        ),
        ({"ratio": 0.3, "allocation": "strs", "search_count": 0, "windows": IDS}, "search_count is 0"),
        ({"ratio": 0.3, "allocation": "strs", "windows": [IDS, IDS[:, :9]]}, "pass windows=, of one length"),
        ({"ratio": 0.3, "factors": "sparse"}, "unknown factors 'sparse'; there are plain, pivoted"),
        ({"ranks": {Q: 3}, "allocation": "fisher"}, "give ratio in place of ranks"),
        ({"ranks": {Q: 3}, "allocation": "spectrum"}, "give ratio in place of ranks"),
        ({"ratio": 0.97, "allocation": "spectrum", "method": "asvd-1"}, "out of reach"),
        ({"ratio": 1.0, "allocation": "spectrum"}, "ratio is 1"),
    ],
)
def test_an_allocation_that_cannot_be_made_changes_nothing(arguments, message, stats):
    """One sentence, before the work where that is possible."""
    assert_refused(tiny_model(), stats, arguments, message)
