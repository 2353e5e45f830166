"""GGUF files become plain models: the numbers that were written, a tokenizer, and no quantization."""

import importlib
import sys

import gguf
import numpy as np
import pytest
import torch

import nsvd
from nsvd.stored import gguf as reader
from tests.tiny import logits, tiny_model

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as llama.cpp orders them, which rotates neighbouring channels."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def plain_model():
    return tiny_model("llama", attention_bias=False, mlp_bias=False, intermediate_size=64)


def write(model, file, kind=gguf.GGMLQuantizationType.F32, without: str = "") -> None:
    """A tiny LLaMA as llama.cpp's converter writes it, with a tokenizer of single bytes."""
    config, out = model.config, gguf.GGUFWriter(str(file), "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_rope_dimension_count(config.head_dim)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    pieces = [f"<{i}>" for i in range(198)] + ["ab", "abc"] + [chr(i + 33) for i in range(config.vocab_size - 200)]
    out.add_token_list(pieces)
    out.add_token_types([3 if i < 2 else 1 for i in range(config.vocab_size)])
    out.add_token_merges(["a b", "ab c"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    for key, value in model.state_dict().items():
        if key in ("lm_head.weight", without):
            continue
        value = value.float()
        if "q_proj" in key or "k_proj" in key:
            value = interleaved(value, config.num_attention_heads if "q_proj" in key else config.num_key_value_heads)
        name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(key)
        if name is None:
            _, _, block, rest = key.split(".", 3)
            name = f"blk.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"
        array = value.numpy().astype(np.float32)
        quantized = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        if quantized != gguf.GGMLQuantizationType.F32:
            out.add_tensor(name, gguf.quants.quantize(array, quantized), raw_dtype=quantized)
        else:
            out.add_tensor(name, array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def test_a_file_loads_as_the_model_that_was_written(tmp_path):
    """In evaluation mode, the same logits, head and embedding one tensor, no trace of a quantization."""
    model = plain_model()
    write(model, tmp_path / "m.gguf")
    loaded, tokenizer = nsvd.load(tmp_path / "m.gguf")
    assert not loaded.training
    torch.testing.assert_close(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not hasattr(loaded.config, "quantization_config")
    assert not getattr(loaded, "hf_quantizer", None)
    assert tokenizer.bos_token_id == 0
    half, _ = nsvd.load(tmp_path / "m.gguf", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_quantized_file_is_dequantized_compressed_and_saved(tmp_path):
    """Eight bits a weight: close to the model, not equal; what is saved from it loads without the file."""
    model = plain_model()
    write(model, tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_0)
    loaded, tokenizer = nsvd.load(str(tmp_path / "m.gguf"))
    error = (logits(loaded) - logits(model)).norm() / logits(model).norm()
    assert 0 < error < 0.05
    nsvd.compress_(loaded, method="svd", ratio=0.3)
    nsvd.save(loaded, tokenizer, tmp_path / "out")
    (tmp_path / "m.gguf").unlink()
    again, _ = nsvd.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("content", [b"", b"GGU", b"no model at all", b"GGUF", b"GGUF" + bytes(60)])
def test_a_damaged_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(nsvd.CheckpointError, match=r"bad\.gguf"):
        nsvd.load(tmp_path / "bad.gguf")


def test_a_nan_in_a_file_is_named(tmp_path):
    model = plain_model()
    model.model.norm.weight.data[3] = torch.nan
    write(model, tmp_path / "m.gguf")
    with pytest.raises(nsvd.CheckpointError, match=r"model\.norm\.weight holds NaN or Inf"):
        nsvd.load(tmp_path / "m.gguf")


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path):
    """transformers would put random numbers in its place."""
    write(plain_model(), tmp_path / "m.gguf", without="model.layers.1.mlp.down_proj.weight")
    with pytest.raises(
        nsvd.CheckpointError, match=r"1 tensors missing or misshaped, first model\.layers\.1\.mlp\.down"
    ):
        nsvd.load(tmp_path / "m.gguf")


def test_a_packaged_model_is_found_without_importing_the_package(tmp_path, monkeypatch):
    """Its one GGUF file; without the package one sentence says how to get it."""
    monkeypatch.setitem(reader.PACKAGED, "packed", "a_package_with_a_model")
    with pytest.raises(FileNotFoundError, match="packed is in the Python package a-package-with-a-model: pip install"):
        nsvd.load("packed")
    folder = tmp_path / "a_package_with_a_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    model = plain_model()
    write(model, folder / "m.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    loaded, _ = nsvd.load("packed")
    assert "a_package_with_a_model" not in sys.modules
    torch.testing.assert_close(logits(loaded), logits(model))


def test_without_the_reader_one_sentence_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(reader, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package gguf, which is not here: pip install --no-deps gguf"):
        nsvd.load(tmp_path / "m.gguf")
