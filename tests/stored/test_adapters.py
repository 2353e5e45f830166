"""PEFT's adapters on the factors of compressed layers: named, trained beside them, and merged into them."""

import copy

import pytest
import torch

import nsvd
from nsvd.stored.checkpoint import is_compressed
from tests.tiny import PIVOTED, compressed, float32, logits, tiny_model, tiny_tokenizer  # noqa: F401

peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
pytestmark = pytest.mark.slow


def adapted(model, names):
    """With random adapters, in place."""
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=names, r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    ).eval()


@pytest.mark.parametrize("options", [{"method": "asvd-1"}, PIVOTED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("names", "count"), [(["up", "down"], 28), (r".*\.q_proj\.(up|down)", 4), ("all-linear", 28)])
def test_adapters_are_merged_into_the_factors(names, count, dtype, options, tmp_path):
    """In the dtype that they have, to its rounding; the folder is read again to the bit."""
    torch.manual_seed(0)
    model = compressed(tiny_model(dtype=dtype), **options)
    before, both = logits(model), adapted(model, names)
    said = logits(both)
    assert sum(name.endswith("lora_A") for name, _ in both.named_modules()) == count
    merged = both.merge_and_unload()
    moved = (said - before).float().norm()
    assert is_compressed(merged)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    if dtype == torch.float32:
        assert (logits(merged) - said).norm() < 1e-3 * moved
    nsvd.save(merged, tiny_tokenizer(), tmp_path / "low")
    assert torch.equal(logits(nsvd.load(tmp_path / "low", device="cpu")[0]), logits(merged))


def shrunk(both, share=0.1):
    """The same with adapters of this share of the factors' size, as training leaves them, in place."""
    with torch.no_grad():
        for layer in both.modules():
            if hasattr(layer, "get_delta_weight"):
                size = layer.get_delta_weight("default").float().norm() / layer.base_layer.weight.float().norm()
                layer.lora_B.default.weight *= share / size
    return both


@pytest.mark.parametrize("options", [{"method": "asvd-1"}, PIVOTED])
def test_merging_keeps_the_accuracy_of_bfloat16(options):
    """The merged model is about as near to exact sums of factors and adapters as adapters beside factors are in bfloat16."""
    torch.manual_seed(0)
    low = compressed(tiny_model(dtype=torch.bfloat16), **options)
    both = shrunk(adapted(copy.deepcopy(low), ["up", "down"]))
    exact = adapted(low.float(), ["up", "down"])
    exact.load_state_dict(both.state_dict())
    wanted, beside = logits(exact), logits(both)
    merged = logits(both.merge_and_unload())
    assert (merged - wanted).norm() < 2 * (beside - wanted).norm()


def test_the_name_of_a_layer_is_answered_by_those_of_its_factors():
    """What PEFT raises shows both."""
    with pytest.raises(ValueError, match=r"(?s)LowRankLinear.*\(down\): Linear.*\(up\): Linear.*not supported"):
        adapted(compressed(tiny_model()), ["q_proj"])
