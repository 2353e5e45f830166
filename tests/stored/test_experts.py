"""Experts of one tensor: apart they say the same, and what is compressed of them is stored and read again."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import nsvd
from nsvd.stored.experts import ExpertsApart, are_experts
from nsvd.stored.layers import CompressedLayer
from nsvd.walk.experts import experts_apart
from tests.architectures import built
from tests.tiny import GROUPED, K1, assert_same, logits, state, tiny_model, tiny_tokenizer, token_ids

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "jamba"]
RECIPES = {
    "svd": {"method": "svd"},
    "asvd-1": {"method": "asvd-1", "windows": token_ids()},
    "nsvd-1": {"method": "nsvd-1", "k1": K1, "windows": token_ids()},
    "ridge": {"method": "ridge", "factors": "pivoted", "windows": token_ids()},
}
OF = ".experts."


def moe(name: str):
    """A tiny random model whose biases are not zero."""
    model = built(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def low_rank(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, CompressedLayer)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_experts_apart_say_what_they_said(name, dtype):
    """To rounding; no number is copied for it, and afterwards the parameters are those that they were."""
    model = moe(name).to(dtype)
    before, said, parameters = state(model), logits(model), dict(model.named_parameters())
    with experts_apart(model):
        apart = [module for module in model.modules() if isinstance(module, ExpertsApart)]
        assert apart
        assert not any(map(are_experts, model.modules()))
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in parameters.values())
        places = {p.untyped_storage().data_ptr() for p in parameters.values()}
        assert {p.untyped_storage().data_ptr() for p in model.parameters()} == places
        torch.testing.assert_close(logits(model), said, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)
    assert_same(before, model)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[key] for key, p in model.named_parameters())
    assert torch.equal(logits(model), said)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_compressed_saved_and_read_again(name, recipe, tmp_path):
    """Both ways of reading give the same bits; ``dequantize`` a model of the usual form, which plain transformers reads."""
    model = moe(name)
    dense, form = logits(model), {key: value.shape for key, value in model.state_dict().items()}
    report = nsvd.compress_(model, ratio=0.3, **RECIPES[recipe])
    layers = low_rank(model)
    assert sum(OF in layer for layer in layers) == 2 * 2 * 4  # blocks, layers of an expert, experts
    assert report.ratio_reached >= 0.3
    assert report.blocks_covered > 0.9
    said = logits(model)
    assert said.isfinite().all()
    assert not torch.allclose(said, dense, atol=1e-4)
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    for again in (nsvd.load(tmp_path / "low", device="cpu")[0], AutoModelForCausalLM.from_pretrained(tmp_path / "low")):
        assert low_rank(again) == layers
        assert torch.equal(logits(again.eval()), said)
    plain = again.dequantize()
    assert {key: value.shape for key, value in plain.state_dict().items()} == form
    torch.testing.assert_close(logits(plain), said, rtol=0, atol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    reread, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(reread.eval()), logits(plain))


@pytest.mark.parametrize(
    ("layers", "count"), [("experts.*.gate_up", 2), ("layers.1.*.experts.?.down", 1), ("q_proj", 0)]
)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_what_stays_dense_of_experts_is_stored_as_well(name, layers, count, tmp_path):
    """One layer of each expert, experts of one block, or none: the same bits are read again, and only those are apart."""
    model = moe(name)
    nsvd.compress_(model, method="svd", ratio=0.3, layers=layers)
    said, apart = logits(model), [n for n, m in model.named_modules() if isinstance(m, ExpertsApart)]
    assert len(apart) == count
    shared = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(shared)) == len(shared)  # no layer holds the numbers of the whole tensor
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    again = nsvd.load(tmp_path / "low", device="cpu")[0]
    assert [n for n, m in again.named_modules() if isinstance(m, ExpertsApart)] == apart
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(again), said)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_stored_precision_is_kept_over_several_files(name, tmp_path):
    """A bfloat16 model of shards: the same bits, and a bfloat16 model after ``dequantize``."""
    model = tiny_model(name, dtype=torch.bfloat16, num_local_experts=4, head_dim=8, **GROUPED)
    nsvd.compress_(model, windows=token_ids(), method="asvd-1", ratio=0.3)
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low", max_shard_size="50KB")
    assert len(list((tmp_path / "low").glob("*.safetensors"))) > 1
    again = nsvd.load(tmp_path / "low", device="cpu")[0]
    assert torch.equal(logits(again), logits(model))
    for held in (model, again, again.dequantize()):
        assert {p.dtype for p in held.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])  # experts are stored one by one, or as they are in the model
def test_a_process_that_forgets_the_import_fails(name, tmp_path):
    """Also where nothing but experts is compressed."""
    model = moe(name)
    nsvd.compress_(model, method="svd", ratio=0.3, layers="experts.*")
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    assert torch.equal(logits(nsvd.load(tmp_path / "low", device="cpu")[0]), logits(model))
    program = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'low')!r})"
    usual = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=usual, check=False)
    assert done.returncode != 0
    assert "import nsvd before loading" in done.stdout + done.stderr


def test_experts_of_another_form_are_left_alone():
    """They get their tokens sorted, and are called with nothing else; the share that is left is told."""
    model = built("llama4_text")
    report = nsvd.compress_(model, method="svd", ratio=0.3)
    assert not any(OF in row["layer"] for row in report.rows)
    assert report.blocks_covered < 0.5
    assert next(iter(report.left_alone)) == "model.layers.*.feed_forward.experts.gate_up_proj"


def test_experts_that_say_something_else_apart_are_left_alone():
    """A forward that does more than its parts: seen by trying."""
    model = moe("mixtral")
    kind = type(model.model.layers[0].mlp.experts)
    louder = type("Louder", (kind,), {"forward": lambda self, *args: 2 * kind.forward(self, *args)})
    model.model.layers[0].mlp.experts.__class__ = louder
    before = state(model)
    with experts_apart(model):
        assert type(model.model.layers[0].mlp.experts) is louder
        assert type(model.model.layers[1].mlp.experts) is ExpertsApart
    assert_same(before, model)
