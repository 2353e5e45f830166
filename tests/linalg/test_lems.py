"""The integer program of LEMS finds what trying every choice finds, and its errors are the model's."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsvd.linalg.budget import total
from nsvd.linalg.factors import FACTORS, rank_for_ratio
from nsvd.linalg.lems import KEPT, candidates, lems_ranks
from tests.linalg.test_allocation import spectra

FEW = (0.3, 0.6, 0.9)


def tail(s, k) -> float:
    return float((s[k:] ** 2).sum())


def modelled(ranks, measured, values) -> float:
    """Σ KL · tail(r) / tail(r₀), by the formula."""
    return sum(
        measured[layer][1] * tail(values[layer], k) / tail(values[layer], measured[layer][0])
        for layer, k in ranks.items()
        if tail(values[layer], measured[layer][0])
    )


def exhaustive(measured, values, shapes, ratio, factors, multiple):
    """The least error of all choices that meet the target; None where none does."""
    choices = {layer: [None, *candidates(shapes[layer], FEW, factors, multiple=multiple)] for layer in shapes}
    limit, found = (1 - ratio) * total({}, shapes) + 1e-6, []
    for picked in itertools.product(*choices.values()):
        ranks = {layer: k for layer, k in zip(choices, picked, strict=True) if k is not None}
        if total(ranks, shapes, factors) <= limit:
            found.append(modelled(ranks, measured, values))
    return min(found, default=None)


@pytest.mark.parametrize("factors", FACTORS)
@settings(max_examples=40)
@given(
    drawn=spectra(layers=3),
    divergences=st.lists(st.floats(1e-4, 2), min_size=3, max_size=3),
    ratio=st.floats(0.05, 0.8).map(lambda x: round(x, 2)),
    multiple=st.sampled_from([1, 2, 3]),
)
def test_the_program_equals_exhaustive_search(factors, drawn, divergences, ratio, multiple):
    """On up to three layers: the target is met, no choice that meets it has a smaller error, and an impossible one is refused."""
    values, shapes = drawn
    measured = {layer: (1, kl) for layer, kl in zip(shapes, divergences, strict=False)}
    best = exhaustive(measured, values, shapes, ratio, factors, multiple)
    how = {"kept": FEW, "multiple": multiple}
    if best is None:
        with pytest.raises(ValueError, match="out of reach: the smallest candidate ranks remove"):
            lems_ranks(measured, values, shapes, ratio, factors, **how)
        return
    ranks = lems_ranks(measured, values, shapes, ratio, factors, **how)
    assert total(ranks, shapes, factors) <= (1 - ratio) * total({}, shapes) + 1e-6
    assert all(k % multiple == 0 for k in ranks.values())
    assert modelled(ranks, measured, values) == pytest.approx(best, rel=1e-5, abs=1e-9)


def test_candidates_are_multiples_that_save_parameters():
    """Of a 576 × 576 matrix, as published: kept 0.3 to 0.95, ranks in multiples of 8; not below what a method can split."""
    found = candidates((576, 576), KEPT)
    assert found == [rank_for_ratio(576, 576, 1 - kept) // 8 * 8 for kept in KEPT]
    assert len(KEPT) == 14
    assert candidates((576, 576), KEPT, least=100) == [k for k in found if k >= 100]
    assert candidates((8, 8), KEPT) == []  # smaller than a multiple: dense
    with pytest.raises(ValueError, match=r"kept fraction 1\.5"):
        candidates((8, 8), [1.5])


def test_a_layer_that_moves_nothing_goes_first():
    """With no divergence, or a negative one by rounding, its error is 0 at every rank; the other stays dense."""
    shapes, s = {"a": (40, 40), "b": (40, 40)}, torch.linspace(2, 1, 40)
    for nothing in (0.0, -1e-9):
        assert set(lems_ranks({"a": (2, nothing), "b": (2, 1.0)}, {"a": s, "b": s}, shapes, 0.2)) == {"a"}


def test_a_model_of_two_hundred_layers_is_solved():
    """At the sizes of a real one, within the solver's gap of the relaxed program's bound."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{i}.{j}": ((576, 1536), (576, 576), (192, 576))[j % 3] for i in range(30) for j in range(7)}
    values = {n: torch.rand(min(s), generator=generator).sort(descending=True).values for n, s in shapes.items()}
    measured = {n: (10, torch.rand(1, generator=generator).item()) for n in shapes}
    ranks = lems_ranks(measured, values, shapes, 0.4)
    left = total(ranks, shapes) / sum(map(math.prod, shapes.values()))
    assert 0.599 < left <= 0.6


def test_a_multiple_that_means_nothing_is_refused():
    """Zero divides nothing."""
    with pytest.raises(ValueError, match="multiple is 0"):
        lems_ranks({}, {}, {}, 0.2, multiple=0)


def test_a_layer_of_large_errors_does_not_hide_those_of_small_ones():
    """The solver stops a millionth above the least, which is no more than what small errors differ by."""
    values = {
        "a": torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
        "b": torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64),
    }
    shapes = {name: (40, 4) for name in values}
    for kl in ((1e6, 1e-3), (1.0, 1e-9)):
        measured = {name: (1, divergence) for name, divergence in zip(values, kl, strict=True)}
        for ratio in (0.1, 0.2, 0.4):
            best = exhaustive(measured, values, shapes, ratio, "plain", 1)
            ranks = lems_ranks(measured, values, shapes, ratio, "plain", kept=FEW, multiple=1)
            assert modelled(ranks, measured, values) == pytest.approx(best, rel=1e-5)
