"""SVD-LLM V2's ratios are the published formula, and their mean within a type is the common one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsvd.linalg.svd_llm_v2 import MOST, log_ratios


@given(
    losses=st.lists(st.floats(1.5, 1e6), min_size=1, max_size=6),
    others=st.lists(st.floats(1.5, 1e6), min_size=1, max_size=6),
    ratio=st.floats(0.01, 0.15),
)
def test_within_a_type_the_mean_is_the_common_ratio_and_a_smaller_loss_loses_more(losses, others, ratio):
    """Whatever the other type is; a layer alone of its type has the common ratio."""
    all_losses = {f"q{i}": loss for i, loss in enumerate(losses)} | {f"o{i}": loss for i, loss in enumerate(others)}
    found = log_ratios(all_losses, {layer: layer[0] for layer in all_losses}, ratio)
    q = [found[f"q{i}"] for i in range(len(losses))]
    assert math.fsum(q) / len(q) == pytest.approx(ratio)
    assert [round(share * math.log(loss), 9) for share, loss in zip(q, losses, strict=True)] == pytest.approx(
        [q[0] * math.log(losses[0])] * len(q)
    )


def test_a_loss_without_a_positive_logarithm_is_refused():
    """The layer is named."""
    with pytest.raises(ValueError, match=r"layer a: the truncation error is 0\.5"):
        log_ratios({"b": 2.0, "a": 0.5}, {"a": 0, "b": 0}, 0.2)


@given(losses=st.lists(st.floats(1.0001, 1e6), min_size=1, max_size=6), ratio=st.floats(0.01, 0.99))
def test_no_layer_loses_more_than_the_cap_and_the_mean_stays(losses, ratio):
    """The others keep the published proportions."""
    named = {str(number): loss for number, loss in enumerate(losses)}
    found, most = log_ratios(named, dict.fromkeys(named, 0), ratio), max(MOST, ratio)
    assert math.fsum(found.values()) / len(found) == pytest.approx(ratio)
    assert all(0 <= share <= most * (1 + 1e-12) for share in found.values())
    rest = [share * math.log(named[name]) for name, share in found.items() if share < most * (1 - 1e-9)]
    assert rest == pytest.approx([rest[0]] * len(rest) if rest else [])


def test_a_logarithm_close_to_zero_takes_the_cap():
    found = log_ratios({"a": 1.01, "b": 20.0, "c": 40.0}, dict.fromkeys("abc", 0), 0.4)
    assert found["a"] == MOST
    assert found["b"] + found["c"] == pytest.approx(0.3)
