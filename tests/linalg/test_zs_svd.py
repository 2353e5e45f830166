"""Zero-sum selection: what a naive simulation selects, and a sum that stays near zero."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsvd.linalg import METHODS, Moments
from nsvd.linalg.budget import total
from nsvd.linalg.factors import FACTORS, saves_parameters
from nsvd.linalg.zs_svd import first_order, zero_sum


@st.composite
def drawn_changes(draw):
    """Shapes of a few layers, and a signed change for every term."""
    sizes = st.tuples(st.integers(4, 24), st.integers(4, 24))
    shapes = {f"layer{i}": shape for i, shape in enumerate(draw(st.lists(sizes, min_size=1, max_size=4)))}
    number = st.floats(-1, 1) | st.sampled_from([0.0, 0.5, -0.5])
    return {
        n: torch.tensor(draw(st.lists(number, min_size=min(s), max_size=min(s)))) for n, s in shapes.items()
    }, shapes


def simulated(changes, shapes, ratio, factors):
    """The rule as told, looking at all candidates at every step: ranks, and the sum after every step with its candidates."""
    ranks, running, trace = {n: len(v) for n, v in changes.items()}, 0.0, []
    while total(ranks, shapes, factors) > (1 - ratio) * total({}, shapes) + 1e-6:
        last = {n: changes[n][k - 1].item() for n, k in ranks.items() if k > 1}
        wanted = {n: c for n, c in last.items() if (c > 0) == (running <= 0)}
        if not last:
            return None, trace
        layer = min(wanted or last, key=lambda n: (abs(last[n]), n))
        running += last[layer]
        ranks[layer] -= 1
        trace.append((running, bool(wanted)))
    return {n: k for n, k in ranks.items() if saves_parameters(*shapes[n], k, factors)}, trace


@pytest.mark.parametrize("factors", FACTORS)
@settings(max_examples=40)
@given(drawn=drawn_changes(), ratio=st.floats(0, 0.9).map(lambda x: round(x, 3)))
def test_the_heaps_select_what_the_rule_says(factors, drawn, ratio):
    """What saves nothing is dense again; while both signs are there the sum stays within the largest change."""
    changes, shapes = drawn
    expected, trace = simulated(changes, shapes, ratio, factors)
    if expected is None:
        with pytest.raises(ValueError, match="out of reach"):
            zero_sum(changes, shapes, ratio, factors)
        return
    ranks = zero_sum(changes, shapes, ratio, factors)
    assert ranks == expected
    assert total(ranks, shapes, factors) <= (1 - ratio) * total({}, shapes) + 1e-6
    largest = max(c.abs().max().item() for c in changes.values())
    for running, both in trace:
        if not both:
            break
        assert abs(running) <= largest + 1e-12


@pytest.mark.parametrize("method", ["svd", "asvd-1", "asvd-2", "kfac"])
def test_a_change_is_the_slope_along_the_term_that_goes(method):
    """For a loss of slope B, cutting term i changes it by the i-th number exactly; for ASVD-I this is the paper's formula."""
    W, B, X, g = torch.randn(9, 12), torch.randn(9, 12), torch.randn(12, 40), torch.randn(9, 40)
    one = METHODS[method].prepare(W, Moments(X @ X.T / 40, X.abs().mean(1), 40, g @ g.T / 40))
    changes = first_order(one, B)
    for k in range(9):
        fall = (B * (one.truncate(k).dense() - one.truncate(k + 1).dense())).sum()
        assert changes[k].item() == pytest.approx(fall.item(), abs=1e-10)
    if method == "asvd-1":
        L = torch.linalg.cholesky(X @ X.T / 40)
        U, s, Vh = torch.linalg.svd(W @ L, full_matrices=False)
        torch.testing.assert_close(changes, -s * ((U.T @ B @ torch.linalg.inv(L).T) * Vh).sum(1))


def test_no_layer_falls_below_the_least_rank():
    """Where a method has to split the rank; and a change that is no number names its layer."""
    changes, shapes = {"a": -torch.ones(12), "b": torch.ones(12)}, {"a": (12, 12), "b": (12, 12)}
    assert min(zero_sum(changes, shapes, 0.5, least=3).values()) == 3
    with pytest.raises(ValueError, match=r"out of reach: all terms that may go remove 0\.5"):
        zero_sum(changes, shapes, 0.6, least=3)
    with pytest.raises(ValueError, match="layer b: a predicted change"):
        zero_sum(changes | {"b": torch.full((12,), math.nan)}, shapes, 0.5)
