"""Tables say what their formulas say."""

import math

import pandas as pd
import pytest

from nsvd.lab.tables import compared, gains, improvements, places, shares_closed, times, told_times


def test_gains_are_average_improvements_over_the_reference_of_the_same_method():
    """Mean of 1 − PPL / PPL(reference) over the corpora named; losses that all differ by as much leave no uncertainty."""
    rows = [
        {"method": method, "allocation": allocation, "corpus": corpus}
        | {"losses": [loss + 1, loss + 2], "perplexity": math.exp(loss + 1.5)}
        for method, base in (("svd", 2.0), ("asvd-1", 1.0))
        for allocation, shift in (("uniform", 0.0), ("strs", -0.1))
        for corpus, loss in (("home", base + 9 * shift), ("one", base + shift), ("two", base + 2 * shift))
    ]  # fmt: skip
    table = gains(pd.DataFrame(rows), ["one", "two"])
    assert list(table.index) == [("svd", "strs"), ("asvd-1", "strs")]
    expected = 1 - (math.exp(-0.1) + math.exp(-0.2)) / 2
    for row in table.itertuples():
        assert (row.improvement, row.low, row.high) == pytest.approx((expected,) * 3)


def test_the_share_closed_is_measured_against_the_reference_of_its_own_group():
    """1 − (loss − dense) / (reference − dense), averaged over the corpora named; 1 would be the dense model."""

    def row(ratio, recipe, corpus, loss):
        return {
            "ratio": ratio,
            "recipe": recipe,
            "corpus": corpus,
            "losses": [loss - 1, loss + 1],
            "perplexity": math.exp(loss),
        }

    rows = [row(0.2, "dense", corpus, 3.0) for corpus in ("home", "one", "two")]
    for ratio, lost in ((0.2, 1.0), (0.5, 4.0)):
        for corpus, part in (("home", 9.0), ("one", 0.5), ("two", 0.25)):
            rows += [row(ratio, "asvd-1", corpus, 3 + lost), row(ratio, "ours", corpus, 3 + lost * part)]
    table = shares_closed(pd.DataFrame(rows), ["one", "two"], ["ratio"])
    for ratio in (0.2, 0.5):
        assert table.loc[(ratio, "asvd-1"), ["closed", "low", "high"]].tolist() == [0, 0, 0]
        assert table.loc[(ratio, "ours")].tolist() == pytest.approx([0.625] * 3)


def test_two_recipes_are_ordered_only_beyond_the_interval_of_their_difference():
    """On the same windows; a difference that a second draw of windows could turn round is called equal."""
    losses = {"plain": [1.0, 2.0, 3.0], "lower": [0.9, 1.8, 2.9], "mixed": [1.3, 1.6, 3.01]}
    rows = [
        {"recipe": name, "corpus": corpus, "losses": each, "perplexity": math.exp(sum(each) / 3)}
        for name, each in losses.items()
        for corpus in ("home", "one")
    ]
    pairs = [("lower", "plain"), ("plain", "lower"), ("mixed", "plain"), ("plain", "plain")]
    table = compared(pd.DataFrame(rows), pairs, ["home", "one"])
    assert list(table.index) == pairs
    assert list(table.verdict) == ["better", "worse", "equal", "equal"]
    assert table.improvement.iloc[0] == pytest.approx(1 - math.exp(-0.4 / 3))
    assert 0 < table.low.iloc[0] <= table.improvement.iloc[0] <= table.high.iloc[0]


def test_an_average_over_no_set_is_nan():
    """Where the calibration domain is the only test set."""
    rows = [
        {"ratio": ratio, "method": method, "recipe": method, "allocation": method, "corpus": "home"}
        | {"losses": [loss], "perplexity": math.exp(loss)}
        for ratio, method, loss in ((0.0, "dense", 1.0), (0.5, "asvd-1", 3.0), (0.5, "nsvd-1", 2.0))
    ]
    frame = pd.DataFrame(rows)
    tables = [
        improvements(frame, [])[["improvement", "low", "high", "closed"]],
        shares_closed(frame, [], ["ratio"]),
        gains(frame.assign(method="svd"), [], reference="asvd-1"),
        compared(frame, [("nsvd-1", "asvd-1")], [])[["improvement", "low", "high"]],
    ]
    assert all(len(table) > 0 and table.isna().all(axis=None) for table in tables)


def test_places_are_home_near_and_far():
    assert places(list("abcde")) == {"home": ["a"], "near": ["b", "c"], "far": ["d", "e"]}
    assert places(list("abc")) == {"home": ["a"], "near": ["b", "c"]}
    assert places(["a"]) == {"home": ["a"]}


def test_times_are_geometric_means_over_the_sets_of_a_place():
    """A rise that is the same in every window leaves no uncertainty; one that differs does."""
    rise = {"a": 0.1, "b": 0.2, "c": 0.4, "d": 1.0, "e": 2.0}
    rows = [{"method": "dense", "ratio": 0.0, "corpus": c, "losses": [3.0, 4.0]} for c in rise]
    rows += [{"method": "svd", "ratio": 0.2, "corpus": c, "losses": [3 + r, 4 + r]} for c, r in rise.items()]
    rows += [{"method": "asvd", "ratio": 0.2, "corpus": c, "losses": [3 + 2 * r, 4.0]} for c, r in rise.items()]
    table = times(pd.DataFrame(rows), list(rise), by=["ratio", "method"])
    for place, mean in {"home": 0.1, "near": 0.3, "far": 1.5}.items():
        assert list(table.loc[(0.2, "svd"), place]) == pytest.approx([math.exp(mean)] * 3)
        middle, low, high = table.loc[(0.2, "asvd"), place]
        assert middle == pytest.approx(math.exp(mean))
        assert low < middle < high
    assert told_times(table).loc[(0.2, "svd"), "home"] == "1.11 [1.11, 1.11]"
    to_svd = times(pd.DataFrame(rows), list(rise), by=["method"], base=pd.DataFrame(rows).query("method == 'svd'"))
    assert to_svd.loc[("asvd",), ("far", "times")] == pytest.approx(1.0)


def test_intervals_are_over_documents_where_rows_name_them():
    """Eight documents of three windows each, alike inside: as wide as eight windows; each table does it."""

    def rows(repeat, **more):
        each = {("dense", 0.0): [3.0] * 8, ("asvd-1", 0.2): [3.5 + i / 20 for i in range(8)]}
        each["ours", 0.2] = [3.2 + i * i / 200 for i in range(8)]
        return pd.DataFrame(
            {"method": m, "recipe": m, "allocation": m, "ratio": r, "corpus": "home", "all": 0}
            | {"losses": [loss for loss in losses for _ in range(repeat)], "perplexity": math.exp(sum(losses) / 8)}
            | more
            for (m, r), losses in each.items()
        )

    def ends(frame):
        known = dict(by=["ratio", "method"])
        yield times(frame, ["home"], **known).loc[(0.2, "ours"), "home"][["low", "high"]]
        yield shares_closed(frame, ["home"], ["all"]).loc[(0, "ours"), ["low", "high"]]
        yield improvements(frame, ["home"]).iloc[0][["low", "high"]]
        yield gains(frame.assign(method="x"), ["home"], reference="asvd-1").iloc[1][["low", "high"]]
        yield compared(frame, [("ours", "asvd-1")], ["home"]).iloc[0][["low", "high"]]

    tables = map(ends, (rows(1), rows(3), rows(3, documents=[i for i in range(8) for _ in range(3)])))
    for one, more, known in zip(*tables, strict=True):
        assert list(known) == pytest.approx(list(one))
        assert 0 < more.high - more.low < 0.8 * (known.high - known.low)
