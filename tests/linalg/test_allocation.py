"""Every target is met from below, by as little as the order of the steps allows."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsvd.linalg import rank_for_ratio, saves_parameters
from nsvd.linalg.budget import after, cut, cut_where, spectrum_steps, strs_steps, total
from nsvd.linalg.factors import FACTORS, least_rank, n_params, split_rank

KEPT = (0.1, 0.3, 0.5, 0.7, 0.9)
ratios = st.floats(0, 0.89).map(lambda x: round(x, 3))


@st.composite
def tables(draw):
    """Shapes of a few layers, and a score for every kept fraction of each; nothing forces scores to fall with it."""
    sizes = st.tuples(st.integers(20, 60), st.integers(20, 60))
    shapes = {f"layer{i}": shape for i, shape in enumerate(draw(st.lists(sizes, min_size=1, max_size=5)))}
    score = st.floats(0, 9) | st.sampled_from([1.0, 2.0])  # with ties
    return [(layer, kept, draw(score)) for layer in shapes for kept in KEPT], shapes


@st.composite
def spectra(draw, layers: int = 5, largest: int = 40):
    """Shapes and descending singular values, some zero."""
    sizes = st.tuples(st.integers(4, largest), st.integers(4, largest))
    shapes = {f"layer{i}": shape for i, shape in enumerate(draw(st.lists(sizes, min_size=1, max_size=layers)))}
    values = {}
    for layer, shape in shapes.items():
        s = draw(st.lists(st.floats(0, 5), min_size=min(shape), max_size=min(shape)))
        values[layer] = torch.tensor(sorted(s, reverse=True))
    return values, shapes


def reachable(steps, shapes, ratio, factors="plain") -> bool:
    return total(after(steps), shapes, factors) <= (1 - ratio) * total({}, shapes)


def assert_met(steps, shapes, ratio, factors="plain"):
    """From below, and by less than a rank of the layer that moved last."""
    ranks, target = cut(steps, shapes, ratio, factors), (1 - ratio) * total({}, shapes)

    def met(ranks) -> bool:
        return total(ranks, shapes, factors) <= target + 1e-6

    assert met(ranks)
    if ranks:
        best = after(steps[: next(c for c in itertools.count(1) if met(after(steps[:c])))])
        moved = [layer for layer in ranks if ranks[layer] != best[layer]]
        assert len(moved) <= 1
        assert all(ranks[layer] >= best[layer] for layer in ranks)
        assert target - total(ranks, shapes, factors) < max(sum(shapes[layer]) for layer in moved or ranks)
    assert all(saves_parameters(*shapes[layer], k, factors) for layer, k in ranks.items())


@pytest.mark.parametrize("factors", FACTORS)
@given(table=tables(), ratio=ratios)
def test_strs_meets_the_target_from_below(factors, table, ratio):
    """On any table, for either way to store factors; what is still to spare is less than one rank of one layer."""
    rows, shapes = table
    steps = strs_steps(rows, shapes, factors)
    if reachable(steps, shapes, ratio, factors):
        assert_met(steps, shapes, ratio, factors)
    else:
        with pytest.raises(ValueError, match="out of reach"):
            cut(steps, shapes, ratio, factors)


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("relative", [True, False])
@given(drawn=spectra(), ratio=ratios)
def test_spectrum_meets_the_target_from_below(factors, relative, drawn, ratio):
    """The same rule, the same promise."""
    values, shapes = drawn
    steps = spectrum_steps(values, shapes, factors, relative=relative)
    if reachable(steps, shapes, ratio, factors):
        assert_met(steps, shapes, ratio, factors)


@given(tables(), ratios)
def test_bisection_finds_what_trying_every_cut_finds(table, ratio):
    """The best cut of all that meet the target, not the last one looked at."""
    rows, shapes = table
    steps, target = strs_steps(rows, shapes), (1 - ratio) * total({}, shapes) + 1e-6
    admissible = [c for c in range(len(steps) + 1) if total(after(steps[:c]), shapes) <= target]
    if not admissible:
        return
    ranks, brute = cut(steps, shapes, ratio), after(steps[: admissible[0]])
    if admissible[0]:
        last = steps[admissible[0] - 1][0]
        while total(brute | {last: brute[last] + 1}, shapes) <= target:
            brute[last] += 1
    assert ranks == brute


@given(tables(), ratios, ratios)
def test_a_larger_ratio_gives_no_layer_a_larger_rank(table, first, second):
    """Ranks only fall; a layer once factored does not become dense again."""
    rows, shapes = table
    steps, (low, high) = strs_steps(rows, shapes), sorted((first, second))
    if reachable(steps, shapes, high):
        less, more = cut(steps, shapes, low), cut(steps, shapes, high)
        assert less.keys() <= more.keys()
        assert all(more[layer] <= k for layer, k in less.items())


@given(tables(), st.randoms())
def test_the_answer_follows_from_the_saved_table(table, random):
    """Whatever the order of its lines, ties included."""
    rows, shapes = table
    again = [tuple(json.loads(json.dumps(row))) for row in rows]
    random.shuffle(again)
    assert strs_steps(again, shapes) == strs_steps(rows, shapes)


def test_each_layer_takes_the_smallest_rank_on_the_admissible_side():
    """The example by hand: ``b`` may go to 0.3 before it may go to 0.7, and stays there."""
    shapes = {"a": (40, 40), "b": (40, 40)}
    rows = [("b", 0.3, 1.0), ("a", 0.9, 1.5), ("b", 0.7, 2.0), ("a", 0.5, 3.0)]
    steps = strs_steps(rows, shapes)
    assert steps == [("b", 6), ("a", 18), ("b", 14), ("a", 10)]
    assert cut(steps, shapes, 0.0) == {}
    assert cut(steps, shapes, 0.35) == {"b": 6}
    assert cut(steps, shapes, 0.3) == {"b": 8}  # 2240 = 1600 + 8 · 80
    assert cut(steps, shapes, 0.38) == {"b": 6, "a": 18}
    assert cut(steps, shapes, 0.5) == {"b": 6, "a": 14}
    with pytest.raises(ValueError, match=r"ratio 0\.7 is out of reach: the smallest candidate ranks remove 0\.6000"):
        cut(steps, shapes, 0.7)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", 0.5, math.nan), r"layer a: the score at kept fraction 0\.5 is NaN"),
        (("b", 0.5, 1.0), "a layer b, which is not to be compressed"),
        (("a", 1.0, 1.0), r"layer a: kept fraction 1\.0"),
        (("a", 0.01, 1.0), "rank 0"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(row, message):
    """By name."""
    with pytest.raises(ValueError, match=message):
        strs_steps([("a", 0.2, 1.0), row], {"a": (20, 20)})


@pytest.mark.parametrize("ratio", [-0.1, 1.0, math.nan])
def test_a_ratio_out_of_range_is_refused(ratio):
    """As everywhere."""
    with pytest.raises(ValueError, match="ratio is"):
        cut([], {"a": (20, 20)}, ratio)


@given(tables(), st.integers(0, 25))
def test_a_measured_target_gets_the_most_steps_that_are_admitted(table, most):
    """For a monotone measurement the last admitted cut, in few probes; the answer itself was probed and admitted."""
    rows, shapes = table
    steps, probed = strs_steps(rows, shapes), []
    limit = total(after(steps[:most]), shapes)

    def admissible(ranks):
        probed.append((dict(ranks), total(ranks, shapes) >= limit))
        return probed[-1][1]

    ranks = cut_where(steps, admissible)
    assert (ranks, True) in probed
    assert len(probed) <= 2 + math.ceil(math.log2(len(steps) + 1))
    later = [c for c in range(len(steps) + 1) if total(after(steps[:c]), shapes) >= limit]
    assert ranks == after(steps[: later[-1]])


def test_a_measured_target_that_nothing_meets_is_an_error():
    """Not the dense model passed off as an answer."""
    with pytest.raises(ValueError, match="not even the dense model"):
        cut_where([("a", 3)], lambda ranks: False)


def errors(s: torch.Tensor, k: int | None, relative: bool) -> float:
    """Squared error of rank k, relative to the whole or not; dense has none."""
    if k is None or not s.square().any():
        return 0.0
    return (s[k:].square().sum() / (s.square().sum() if relative else 1)).item()


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("relative", [True, False])
@given(drawn=spectra(layers=3, largest=9))
def test_no_choice_of_ranks_is_better_than_a_cut_of_the_spectrum(factors, relative, drawn):
    """Everett: after any number of steps no ranks with as few parameters have a smaller sum of errors."""
    values, shapes = drawn
    steps = spectrum_steps(values, shapes, factors, relative=relative)
    options = {}
    for layer, shape in shapes.items():
        saving = [k for k in range(1, min(shape)) if saves_parameters(*shape, k, factors)]
        options[layer] = [(k, n_params(*shape, k, factors), errors(values[layer], k, relative)) for k in saving]
        options[layer] += [(None, math.prod(shape), 0.0)]
    everything = [(sum(o[1] for o in c), sum(o[2] for o in c)) for c in itertools.product(*options.values())]
    for c in range(len(steps) + 1):
        ranks = after(steps[:c])
        size = total(ranks, shapes, factors)
        ours = sum(errors(values[layer], ranks.get(layer), relative) for layer in shapes)
        assert ours <= min(error for n, error in everything if n <= size) + 1e-9


def test_equal_spectra_share_the_parameters_evenly():
    """Where layers are alike, so are their ranks, but for the one that was given back what was to spare."""
    s, shapes = torch.logspace(0, -3, 40), {f"layer{i}": (40, 60) for i in range(5)}
    for ratio in (0.5, 0.7, 0.8):
        ranks = cut(spectrum_steps(dict.fromkeys(shapes, s), shapes), shapes, ratio)
        assert ranks.keys() == shapes.keys()
        assert max(ranks.values()) - min(ranks.values()) <= 1
        assert min(ranks.values()) == rank_for_ratio(40, 60, ratio)


def test_a_layer_with_a_flat_spectrum_keeps_more_than_one_with_a_steep_one():
    """… and where they are not, they are not."""
    values, shapes = {"flat": torch.ones(40), "steep": torch.logspace(0, -6, 40)}, {"flat": (40, 40), "steep": (40, 40)}
    assert cut(spectrum_steps(values, shapes), shapes, 0.3) == {"steep": 8}


def test_the_costs_of_plain_factors_do_not_order_pivoted_ones():
    """Their last ranks are the cheapest to give up: for a flat spectrum the hull goes to the least rank in one step."""
    s, shapes = {"a": torch.ones(12)}, {"a": (12, 12)}
    assert spectrum_steps(s, shapes, "pivoted") == [("a", 1)]
    assert spectrum_steps({"a": torch.logspace(0, -6, 12)}, shapes, "pivoted")[:2] == [("a", 11), ("a", 10)]
    assert spectrum_steps({"a": torch.logspace(0, -6, 12)}, shapes)[0] == ("a", 5)  # plain factors save nothing above


def test_errors_in_one_unit_are_not_made_relative():
    """A layer that matters a hundred times as much is spared; relative to its own size it is like the other."""
    s, shapes = torch.logspace(0, -2, 20), {"much": (20, 20), "little": (20, 20)}
    values = {"much": 10 * s, "little": s}
    told = cut(spectrum_steps(values, shapes, "pivoted", relative=False), shapes, 0.3, "pivoted")
    assert told.get("much", 20) > told["little"] + 2
    alike = cut(spectrum_steps(values, shapes, "pivoted"), shapes, 0.3, "pivoted")
    assert abs(alike["much"] - alike["little"]) <= 2


def test_no_step_goes_below_the_least_rank():
    """And a layer that has no rank from there to break-even is left alone."""
    values, shapes = {"a": torch.ones(40), "b": torch.ones(12)}, {"a": (40, 40), "b": (12, 12)}
    steps = spectrum_steps(values, shapes, least=7)
    assert {layer for layer, _ in steps} == {"a"}
    assert min(k for _, k in steps) == 7


@given(st.floats(0.01, 0.99))
def test_the_least_rank_is_where_the_split_begins_to_work(k1):
    """Every rank from there can be split, the one below cannot."""
    k = least_rank(k1)
    for more in range(k, k + 50):
        split_rank(more, k1)
    with pytest.raises(ValueError, match="rounds"):
        split_rank(k - 1, k1)


@pytest.mark.parametrize("k1", [0.0, 1.0])
def test_one_step_alone_works_from_rank_one(k1):
    """Nothing to split."""
    assert least_rank(k1) == 1
