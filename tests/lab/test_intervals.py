"""Intervals cover what another text of the same kind might say, and no less."""

import math

import pytest
import torch

from nsvd.lab.evaluation import average_improvement
from nsvd.lab.intervals import mean_with_interval, paired_interval, resampled


def losses(shift: float, noise: float, seed: int) -> list[torch.Tensor]:
    """Windows of three corpora: hard and easy ones alike, ``shift`` better than nothing."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    draw = {"dtype": torch.float64}
    return [
        3 + torch.randn(40, generator=common, **draw) - shift + noise * torch.randn(40, generator=own, **draw)
        for _ in range(3)
    ]


def test_the_interval_of_a_model_against_itself_is_nothing():
    """The windows are drawn in pairs, so what both share cancels."""
    same = losses(0, 0, 1)
    assert paired_interval(same, same) == (0, 0)


def test_the_interval_covers_no_difference_and_excludes_a_clear_one():
    """Though the windows differ by far more than the models."""
    reference = losses(0, 0.02, 1)
    low, high = paired_interval(losses(0, 0.02, 2), reference)
    assert low < 0 < high
    low, high = paired_interval(losses(0.1, 0.02, 2), reference)
    assert 0.08 < low < 1 - math.exp(-0.1) < high < 0.11


def test_the_interval_is_around_the_average_improvement_and_repeatable():
    """The same seed gives the same interval, a higher level a wider one."""
    ours, theirs = losses(0.05, 0.1, 2), losses(0, 0.1, 1)
    value = average_improvement(*([x.mean().exp().item() for x in side] for side in (ours, theirs)))
    low, high = paired_interval(ours, theirs)
    wide = paired_interval(ours, theirs, level=0.999)
    assert wide[0] < low < value < high < wide[1]
    assert paired_interval(ours, theirs) == (low, high)


def test_windows_of_one_document_count_as_one():
    """Every window four times under one document: the interval of the windows alone, and half as wide without documents."""
    ours, theirs = losses(0.05, 0.1, 2), losses(0, 0.1, 1)
    often = [[values.repeat_interleave(4) for values in side] for side in (ours, theirs)]
    documents = [torch.arange(40).repeat_interleave(4).tolist()] * 3
    low, high = paired_interval(ours, theirs)
    together = paired_interval(*often, documents=documents)
    assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(together, (low, high), strict=True))
    apart = paired_interval(*often)
    assert 0.4 < (apart[1] - apart[0]) / (high - low) < 0.6
    rises = [a - b for a, b in zip(*often, strict=True)]
    one, low, high = mean_with_interval(rises, documents)
    assert low < one < high
    assert one == mean_with_interval(rises)[0]


@pytest.mark.parametrize(("count", "windows", "least"), [(9, 2, 0.92), (5, 3, 0.9), (16, 1, 0.92)])
def test_the_interval_covers_the_mean_as_often_as_it_says(count, windows, least):
    """Of few documents, too, where half of the variance is common to a document; windows drawn one by one cover less often."""
    generator, draw = torch.Generator().manual_seed(0), {"dtype": torch.float64}
    which = [torch.arange(count).repeat_interleave(windows).tolist()]
    covered, alone = 0, 0
    for _ in range(600):
        common = torch.randn(count, 1, generator=generator, **draw)
        text = (common + torch.randn(count, windows, generator=generator, **draw)).flatten()
        ends, apart = mean_with_interval([text], which, draws=400)[1:], mean_with_interval([text], draws=400)[1:]
        covered += ends[0] < 0 < ends[1]
        alone += apart[0] < 0 < apart[1]
    assert least < covered / 600 < 0.98
    assert windows == 1 or alone / 600 < 0.9


def test_a_document_of_many_windows_weighs_as_many():
    """Means over members, not over documents, and farther from their mean by √(n/(n − 1))."""
    values = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    drawn = resampled(values, torch.tensor([0, 0, 1]), 200, torch.Generator().manual_seed(0)).flatten()
    expected = [3 + math.sqrt(2) * (mean - 3) for mean in (1.5, 3.0, 6.0)]  # the first document, both, the second
    assert sorted(set(drawn.tolist())) == pytest.approx(expected)


def test_of_one_document_nothing_is_known_of_others():
    values = [torch.tensor([1.0, 2.0, 6.0])]
    assert mean_with_interval(values, [[7, 7, 7]])[0] == 3
    assert all(math.isnan(end) for end in mean_with_interval(values, [[7, 7, 7]])[1:])
    assert all(math.isnan(end) for end in paired_interval(values, [2 * values[0]], documents=[[7, 7, 7]]))


def test_of_no_group_there_is_no_interval():
    assert all(math.isnan(value) for value in (*mean_with_interval([]), *paired_interval([], [])))
