"""A sweep measures what ``compress_`` and ``perplexity`` would, each thing once."""

import copy
import json

import pytest

import nsvd
from nsvd.lab import sweep as module
from nsvd.lab.records import Records
from nsvd.lab.sweep import DENSE, by_document, measure, sweep, trial
from tests.tiny import K1, assert_same, state, tiny_model, tiny_tokenizer, token_ids

CALIBRATION = token_ids(6, 16, seed=1)
CORPORA = {"first": token_ids(4, 12, seed=2), "second": token_ids(5, 12, seed=3)}
CELLS = [  # five metrics
    ("nsvd-1", 0.3, {"k1": K1}),
    ("svd", 0.3, {}),
    ("asvd-1", 0.5, {}),
    ("asvd", 0.3, {"alpha": 1.0}),
    ("nsvd-1", 0.3, {"k1": 0.6}),
    ("asvd", 0.3, {}),
    ("nid-1", 0.3, {"k1": K1}),
    ("ridge", 0.3, {}),
]


@pytest.fixture
def swept(tmp_path):
    """A sweep of one tiny model into one file, to be called again and again."""
    model = tiny_model()
    stats = nsvd.calibrate(model, CALIBRATION)

    def call(cells=CELLS, *, model=model, stats=stats, corpora=CORPORA):
        return sweep(model, stats, corpora, cells, Records(tmp_path / "records.jsonl"), name="tiny")

    call.model, call.stats, call.file = model, stats, tmp_path / "records.jsonl"
    return call


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of ``prepare`` and ``evaluate`` in the sweep; ``limit`` is when ``evaluate`` is interrupted."""
    counts = {"prepare": 0, "evaluate": 0, "limit": 10**6}
    prepare, evaluate = module.prepare, module.evaluate

    def counting_prepare(*args, **options):
        counts["prepare"] += 1
        return prepare(*args, **options)

    def counting_evaluate(*args, **options):
        if counts["evaluate"] == counts["limit"]:
            raise KeyboardInterrupt
        counts["evaluate"] += 1
        return evaluate(*args, **options)

    monkeypatch.setattr(module, "prepare", counting_prepare)
    monkeypatch.setattr(module, "evaluate", counting_evaluate)
    return counts


def table(frame) -> dict:
    """Perplexity by method, ratio, options and corpus."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return {
        (row["method"], row["ratio"], row.get("k1"), row.get("alpha"), row["corpus"]): row["perplexity"] for row in rows
    }


def test_a_sweep_measures_what_is_had_by_hand(swept):
    """Every cell on every corpus and the dense model; the model itself stays as it is."""
    before = state(swept.model)
    frame = swept()
    assert_same(before, swept.model)
    assert len(frame) == (len(CELLS) + 1) * len(CORPORA)
    found = table(frame)
    for method, ratio, options in [(DENSE, 0.0, {}), *CELLS]:
        model = copy.deepcopy(swept.model)
        if method != DENSE:
            nsvd.compress_(model, swept.stats, method=method, ratio=ratio, **options)
        chosen = nsvd.METHODS[method].resolve(options) if method != DENSE else {}
        for corpus, windows in CORPORA.items():
            key = (method, ratio, chosen.get("k1"), chosen.get("alpha"), corpus)
            assert found[key] == pytest.approx(nsvd.perplexity(model, windows), rel=1e-9)


def test_rows_carry_losses_for_paired_comparisons(swept):
    """The nll of every window, their mean and its standard error; the seconds go by stage."""
    frame = swept([("svd", 0.3, {})])
    for row in frame.to_dict("records"):
        assert len(row["losses"]) == len(CORPORA[row["corpus"]])
        assert sum(row["losses"]) / len(row["losses"]) == pytest.approx(row["nll"], abs=1e-5)
    assert set(frame.attrs["seconds"]) == {"prepare", "compress", "evaluate"}


def test_each_metric_is_decomposed_once(swept, calls):
    """ASVD-I, NSVD-I and NID-I share one, two exponents α are two; whatever the order of the cells."""
    swept()
    assert calls["prepare"] == 5
    assert calls["evaluate"] == (len(CELLS) + 1) * len(CORPORA)


def test_the_second_call_measures_nothing(swept, calls):
    """And says the same."""
    first = swept()
    calls["limit"] = calls["evaluate"]
    second = swept()
    assert calls["prepare"] == 5
    assert table(second) == table(first)
    assert len(swept.file.read_text().splitlines()) == len(first)


def test_an_interrupted_sweep_goes_on_where_it_stopped(swept, calls):
    """In the middle of a cell, even."""
    calls["limit"] = 7
    with pytest.raises(KeyboardInterrupt):
        swept()
    assert len(swept.file.read_text().splitlines()) == 7
    calls["limit"] = 10**6
    resumed = swept()
    assert calls["evaluate"] == len(resumed) == 18
    swept.file.unlink()
    assert table(swept()) == table(resumed)


def test_only_what_is_new_is_measured(swept, calls):
    """One more ratio costs one more cell, one more corpus one more column."""
    swept([("svd", 0.3, {})])
    swept([("svd", 0.3, {}), ("svd", 0.5, {})])
    assert calls["evaluate"] == 4 + 2
    swept([("svd", 0.3, {})], corpora=CORPORA | {"third": token_ids(3, 12, seed=4)})
    assert calls["evaluate"] == 6 + 2


def test_other_weights_statistics_or_windows_are_measured_anew(swept, calls):
    """The names may be the same; the dense model does not depend on statistics."""
    cells = [("asvd-1", 0.3, {})]
    swept(cells)
    swept(cells, stats=nsvd.calibrate(swept.model, token_ids(6, 16, seed=9)))
    assert calls["evaluate"] == 4 + 2
    other = tiny_model(seed=5)
    swept(cells, model=other, stats=nsvd.calibrate(other, CALIBRATION))
    assert calls["evaluate"] == 6 + 4
    swept(cells, corpora={"first": CORPORA["second"], "second": CORPORA["first"]})
    assert calls["evaluate"] == 10 + 4


def test_an_option_the_method_has_not_stops_before_anything_is_measured(swept, calls):
    """The same error as from ``compress_``."""
    with pytest.raises(ValueError, match="SVD has no option k1"):
        swept([("asvd-1", 0.3, {}), ("svd", 0.3, {"k1": 0.9})])
    assert calls["evaluate"] == 0


def test_one_model_on_all_corpora_is_built_only_where_something_is_missing(tmp_path):
    """A row a corpus, and nothing a second time; what ``about`` says is part of the question."""
    built, records = [], Records(tmp_path / "results.jsonl")

    def build():
        built.append(tiny_model())
        return built[-1]

    rows = measure(build, CORPORA, records, {"model": "tiny"})
    assert [row["corpus"] for row in rows] == list(CORPORA)
    assert [row["perplexity"] for row in rows] == [nsvd.perplexity(built[0], ids) for ids in CORPORA.values()]
    assert measure(build, CORPORA, records, {"model": "tiny"}) == rows
    assert len(built) == 1
    measure(build, CORPORA, records, {"model": "another"})
    measure(build, CORPORA | {"first": token_ids(4, 12, seed=9)}, records, {"model": "tiny"})
    assert len(built) == 3


def test_a_trial_is_a_compression_measured_and_counted_once(tmp_path, calls):
    """As by hand, with the fraction removed; recorded, so that the second time nothing is computed."""
    model = tiny_model()
    before, stats = state(model), nsvd.calibrate(model, CALIBRATION)
    how = {"method": "sola", "ratio": 0.2, "grid": 1, "floor": 0.0, "keep_outer": 0}
    rows = trial(model, stats, CORPORA, Records(tmp_path / "r.jsonl"), {"model": "tiny"}, **how)
    assert_same(before, model)
    changed = copy.deepcopy(model)
    report = nsvd.compress_(changed, stats, **how)
    assert {row["removed"] for row in rows} == {report.ratio_reached}
    for row, (corpus, windows) in zip(rows, CORPORA.items(), strict=True):
        assert (row["corpus"], row["model"], row["grid"]) == (corpus, "tiny", 1)
        assert row["perplexity"] == pytest.approx(nsvd.perplexity(changed, windows), rel=1e-6)
    done = calls["evaluate"]
    assert trial(model, stats, CORPORA, Records(tmp_path / "r.jsonl"), {"model": "tiny"}, **how) == rows
    assert calls["evaluate"] == done == len(CORPORA)


def test_sola_can_be_swept(swept):
    """Its blocks are prepared as the layers of other methods are."""
    options = {"grid": 1, "floor": 0.0, "keep_outer": 0}
    frame = swept([("sola", 0.2, options), ("sola", 0.3, options)])
    changed = copy.deepcopy(swept.model)
    nsvd.compress_(changed, swept.stats, method="sola", ratio=0.3, **options)
    found = frame[(frame.method == "sola") & (frame.ratio == 0.3)].set_index("corpus").perplexity
    for corpus, windows in CORPORA.items():
        assert found[corpus] == pytest.approx(nsvd.perplexity(changed, windows), rel=1e-6)


def test_rows_say_the_documents_of_their_windows_once_they_are_recorded(tmp_path):
    """Of a corpus of three documents; another reader of the file finds them, too."""
    model, tokenizer, file = tiny_model(), tiny_tokenizer(), tmp_path / "records.jsonl"
    text = tmp_path / "three.jsonl"
    text.write_text("".join(json.dumps({"text": letter * 30}) + "\n" for letter in "abc"), encoding="utf-8")
    corpora = {str(text): nsvd.windows(str(text), tokenizer, length=8)}
    assert "documents" not in measure(lambda: model, corpora, Records(file), {"method": DENSE})[0]
    by_document(corpora, tokenizer, Records(file))
    (row,) = measure(lambda: model, corpora, Records(file), {"method": DENSE})
    assert len(row["documents"]) == len(row["losses"])
    assert set(row["documents"]) == {0, 1, 2}
    size = file.stat().st_size
    by_document(corpora, tokenizer, Records(file))
    assert file.stat().st_size == size, "it is recorded once"
