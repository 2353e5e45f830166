"""A compressed folder opened by ``device_map``: spread by accelerate, or partly left on disk."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import nsvd
from tests.tiny import compressed, float32, logits, tiny_model, tiny_tokenizer  # noqa: F401

pytest.importorskip("accelerate", reason="device_map needs accelerate: pip install accelerate")
WAYS = {
    "plain": {"method": "svd"},
    "pivoted": {"method": "svd", "factors": "pivoted"},
    "best": {"method": "best"},
}


@pytest.fixture(params=WAYS)
def low(request, tmp_path):
    """A compressed model and its folder."""
    model = compressed(tiny_model(), **WAYS[request.param])
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    return model, tmp_path / "low"


def offloaded(folder):
    """The last block on disk."""
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    parts |= {"model.layers.1": "disk", "lm_head": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=parts, offload_folder=folder.parent / "offload")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_spread_automatically_it_says_the_same(low, dtype):
    whole, spread = (
        AutoModelForCausalLM.from_pretrained(low[1], dtype=dtype, **how) for how in ({}, {"device_map": "auto"})
    )
    assert torch.equal(logits(spread).cpu(), logits(whole))


def test_partly_on_disk_it_says_the_same_and_is_saved_again(low, tmp_path):
    model, folder = low
    there = offloaded(folder)
    assert any(p.is_meta for p in there.parameters())
    torch.testing.assert_close(logits(there), logits(model), rtol=0, atol=1e-6)  # other kernels may round otherwise
    there.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_what_is_on_disk_cannot_be_made_dense(low):
    """It would have numbers that nobody has written. In memory it is."""
    _, folder = low
    there = offloaded(folder)
    kinds = [type(module) for module in there.modules()]
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.\S+ is offloaded"):
        there.dequantize()
    assert [type(module) for module in there.modules()] == kinds
    AutoModelForCausalLM.from_pretrained(folder).dequantize()
