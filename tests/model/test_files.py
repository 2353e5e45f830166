"""Tensors are told apart by their fingerprints."""

import pytest
import torch

from nsvd.model.files import fingerprint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_a_fingerprint_changes_with_any_number(dtype):
    """Of any dtype; equal tensors have equal ones, contiguous or not."""
    tensors = [torch.arange(6).view(2, 3).to(dtype), torch.ones(2, dtype=dtype)]
    same, other = [tensors[0].T.clone().T, tensors[1]], [tensors[0].clone(), tensors[1].clone()]
    other[1][0] = 2
    assert fingerprint(tensors) == fingerprint(same)
    assert fingerprint(tensors) != fingerprint(other)
    assert len(fingerprint(tensors)) == 12
