"""Tables say what their formulas say."""

import math

import pandas as pd
import pytest

from nsvd.lab.tables import gains


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
