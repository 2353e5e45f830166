"""Tensors are told apart by their fingerprints, models by names that tell nothing of the machine."""

import pytest
import torch

from nsvd.model.files import fingerprint, short_name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_a_fingerprint_changes_with_any_number(dtype):
    """Of any dtype; equal tensors have equal ones, contiguous or not."""
    tensors = [torch.arange(6).view(2, 3).to(dtype), torch.ones(2, dtype=dtype)]
    same, other = [tensors[0].T.clone().T, tensors[1]], [tensors[0].clone(), tensors[1].clone()]
    other[1][0] = 2
    assert fingerprint(tensors) == fingerprint(same)
    assert fingerprint(tensors) != fingerprint(other)
    assert len(fingerprint(tensors)) == 12


def test_a_model_in_a_folder_is_known_by_its_last_part(tmp_path, monkeypatch):
    """Also once it is gone, or is where we are; a hub id and an embedded name stay as they are."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert [short_name(name) for name in (folder, f"{folder}/", ".", tmp_path / "gone")] == 3 * ["my-model"] + ["gone"]
    assert [short_name(name) for name in ("meta-llama/Llama-2-7b-hf", "mini-llama")] == [
        "meta-llama/Llama-2-7b-hf",
        "mini-llama",
    ]
