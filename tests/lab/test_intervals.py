"""Intervals cover what another text of the same kind might say, and no less."""

import math

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


def test_the_spread_over_documents_is_that_of_repeated_texts():
    """Half of the variance is common to a document: its bootstrap tells the spread of the mean, that over windows too little."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(400, 12, 1, generator=generator, dtype=torch.float64)
    texts = (common + torch.randn(400, 12, 5, generator=generator, dtype=torch.float64)).flatten(1)
    true = texts.mean(1).std()
    which = torch.arange(12).repeat_interleave(5).tolist()
    told = torch.stack([resampled(t[:, None], which, 300, generator).std() for t in texts]).mean()
    alone = torch.stack([resampled(t[:, None], None, 300, generator).std() for t in texts]).mean()
    assert abs(told / true - 1) < 0.1
    assert alone / true < 0.7


def test_a_document_of_many_windows_weighs_as_many():
    """Means over members, not over documents: with a single document every draw is the mean of all."""
    values = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    assert resampled(values, [7, 7, 7], 5, torch.Generator()).tolist() == [[3.0]] * 5
    drawn = resampled(values, [0, 0, 1], 200, torch.Generator().manual_seed(0)).flatten()
    assert set(drawn.tolist()) == {1.5, 3.0, 6.0}, "the first document, both, the second"


def test_of_no_group_there_is_no_interval():
    assert all(math.isnan(value) for value in (*mean_with_interval([]), *paired_interval([], [])))
