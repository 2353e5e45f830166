"""Tiny random models of many architectures, and what becomes of each: works and is read again with the same bits, or is refused.

    python -m tests.architectures

writes ``docs/architectures.md``; ``tests/walk/test_table.py`` holds every row of it to what happens.
"""

from __future__ import annotations

import re
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)
from transformers.utils import logging

import nsvd
from tests.tiny import FAMILIES, GROUPED, SIZES, tiny_tokenizer, token_ids

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "architectures.md"
OLDEST = re.search(r'"transformers>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
LOCKED = re.search(r"^transformers==(\S+)", (ROOT / "constraints-lock.txt").read_text(encoding="utf-8"), re.M)[1]
METHODS = ("svd", "asvd-1", "nsvd-1", "sola", "best")
OPTIONS = {"nsvd-1": {"k1": 0.5}, "sola": {"keep_outer": 0, "grid": 2, "floor": 0.0}}  # so small are they
IDS = token_ids()
WIDE = GROUPED | {"head_dim": 8}
FOUR = {"num_local_experts": 4}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {"shared_expert_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = GROUPED | ROUTED | LATENT | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
TWO = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
STATES = {"mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
STATES |= {"expert_layer_period": 2, "expert_layer_offset": 1}
PLAIN = {"intermediate_size": 48}
VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": 28, "patch_size": 14}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False}
DEEP = {"depth": 4, "hidden_size": 32, "num_heads": 4, "patch_size": 14}
STACKED = DEEP | PLAIN | {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
TILES = {"attention_heads": 4, "num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 64}
TILES |= {"supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1}
SOUND = {"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 4}
SOUND |= {"encoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 32}
ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
ENDS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SPEECH = {"max_source_positions": 32, "max_target_positions": 64, "num_mel_bins": 8, "decoder_start_token_id": 2}
ARCHITECTURES: dict[str, dict] = FAMILIES | {
    "gemma": WIDE,
    "gemma3_text": WIDE,
    "phi3": GROUPED,
    "falcon": {},
    "bloom": {"n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "gptj": GPT | {"rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "codegen": GPT | {"rotary_dim": 8},
    "gpt_bigcode": GPT | {"n_inner": 48},
    "starcoder2": GROUPED,
    "stablelm": GROUPED,
    "cohere": GROUPED,
    "olmo2": GROUPED,
    "granite": GROUPED,
    "glm4": WIDE,
    "nemotron": GROUPED,
    "smollm3": GROUPED,
    "ernie4_5": GROUPED,
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "biogpt": PLAIN,
    "bert": PLAIN | {"is_decoder": True},
    "modernbert-decoder": PLAIN,
    "mixtral": GROUPED | FOUR,
    "phimoe": GROUPED | FOUR,
    "qwen2_moe": GROUPED | ROUTED | SHARED,
    "qwen3_moe": WIDE | ROUTED,
    "olmoe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": GROUPED | FOUR,
    "gpt_oss": WIDE | FOUR,
    "deepseek_v2": DEEPSEEK | {"first_k_dense_replace": 1},
    "deepseek_v3": DEEPSEEK | {"first_k_dense_replace": 1},
    "llama4_text": WIDE | {"num_local_experts": 2, "intermediate_size_mlp": 48},
    "qwen3_next": WIDE | ROUTED | SHARED | TWO | {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": GROUPED | STATES | {"num_experts": 4, "use_mamba_kernels": False},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "recurrent_gemma": WIDE | {"lru_width": 32, "num_hidden_layers": 3},
    "rwkv": PLAIN | {"attention_hidden_size": 32, "context_length": 64},
    "gpt2": GPT,
    "gemma3": {
        "text_config": SIZES | WIDE,
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
    },
}


def beside(kind: str, vision: dict | None = None, **text) -> dict:
    """Sizes of a model with a text decoder of this kind beside a vision tower; token 299 stands for an image."""
    images = {"image_token_index": 299, "image_token_id": 299, "vision_config": vision or VISION}
    return images | {"text_config": SIZES | GROUPED | {"model_type": kind} | text}


OTHERS: dict[str, tuple[type, str, dict]] = {  # of another kind than those that continue a text alone
    "llava": (AutoModelForMultimodalLM, "llava", beside("llama", VISION | {"model_type": "clip_vision_model"})),
    "mistral3": (AutoModelForMultimodalLM, "mistral3", beside("mistral", VISION | {"model_type": "pixtral"}, head_dim=8)),
    "idefics3": (AutoModelForMultimodalLM, "idefics3", beside("llama")),
    "qwen2_vl": (AutoModelForMultimodalLM, "qwen2_vl", beside("qwen2_vl_text", DEEP | {"embed_dim": 32}, **ROTATED)),
    "qwen3_vl": (AutoModelForMultimodalLM, "qwen3_vl", beside("qwen3_vl_text", STACKED, head_dim=8, **ROTATED)),
    "qwen3_5, with vision": (
        AutoModelForMultimodalLM, "qwen3_5",
        beside("qwen3_5_text", STACKED, head_dim=8, layer_types=["linear_attention", "full_attention"], **TWO),
    ),
    "qwen2_audio": (
        AutoModelForMultimodalLM, "qwen2_audio",
        {"text_config": SIZES | GROUPED | {"model_type": "qwen2"}, "audio_config": SOUND, "audio_token_index": 299},
    ),
    "mllama, with vision": (
        AutoModelForMultimodalLM, "mllama",
        beside("mllama_text_model", VISION | TILES, num_hidden_layers=3, cross_attention_layers=[1],
               rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    ),
    "paligemma": (AutoModelForMultimodalLM, "paligemma", beside("gemma", SIGLIP, head_dim=8) | {"projection_dim": 32}),
    "bert, not as a decoder": (AutoModelForCausalLM, "bert", PLAIN),
    "bert, masked": (AutoModelForMaskedLM, "bert", PLAIN),
    "bert, to classify": (AutoModelForSequenceClassification, "bert", PLAIN),
    "llama, to classify": (AutoModelForSequenceClassification, "llama", GROUPED),
    "llama, without a head": (AutoModel, "llama", GROUPED),
    "modernbert": (AutoModelForMaskedLM, "modernbert", PLAIN),
    "t5": (AutoModelForSeq2SeqLM, "t5", {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}),
    "bart": (AutoModelForSeq2SeqLM, "bart", {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48} | ENDS),
    "whisper": (AutoModelForSpeechSeq2Seq, "whisper", {"d_model": 32} | ENDS | SPEECH),
}  # fmt: skip
HEAD = f"""# Architectures

Tiny random models, tried with methods that need no text (`svd`), one pass over a text (`asvd-1`, and `nsvd-1` in two steps),
neurons kept whole (`sola`, on all blocks), and gradients, shifted inputs, pivoted factors and neurons left out (`best`). **works**:
compressed, saved, and read again with the same bits. Otherwise the sentence with which it is refused before anything is changed;
**likewise** is the sentence to the left. The second column is the share of the blocks' parameters in the layers that are
compressed; what else there is stays dense, such as convolutions and states. **works on** names the share where it is another one:
experts that are one tensor of three dimensions are taken apart and compressed, each for its own tokens, but not by methods that
follow inputs or ask for gradients, nor by `sola`. Experts of llama4, which are another kind of tensor, stay dense.
Of a model that reads images or sounds the blocks are those of its text decoder; all else is left alone.

Written by `python -m tests.architectures`, and held to what happens by `tests/walk/test_table.py`:
transformers {OLDEST} and {LOCKED}. Where the router of jamba is a linear layer, as in {OLDEST}, it has one layer more.

| architecture | share of the blocks | {" | ".join(METHODS)} |
|---|---|{"---|" * len(METHODS)}
"""


def built(name: str) -> PreTrainedModel:
    """A random model in evaluation mode."""
    auto, kind, sizes = OTHERS.get(name) or (AutoModelForCausalLM, name, ARCHITECTURES[name])
    config = AutoConfig.for_model(kind, **({} if "text_config" in sizes else SIZES) | sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def outcome(name: str, method: str) -> tuple[str, float | None]:
    """What a cell of the table says, and the share of the blocks; raises ``AssertionError`` if another model is read again."""
    model, how = built(name), {"method": method} | OPTIONS.get(method, {})
    try:
        report = nsvd.compress_(model, windows=None if method == "svd" else IDS, ratio=0.3, **how)
    except ValueError as error:
        return str(error), None
    said = model(input_ids=IDS[:3]).logits
    with tempfile.TemporaryDirectory() as place:
        nsvd.save(model, tiny_tokenizer(), f"{place}/low")
        again, _ = nsvd.load(f"{place}/low", device="cpu")
    assert torch.equal(again(input_ids=IDS[:3]).logits, said), f"{name} by {method}: another model is read again"
    return "works", report.blocks_covered


def row(name: str) -> str:
    """The line of the table."""
    found = [outcome(name, method) for method in METHODS]
    shares = [f"{share:.0%}" for _, share in found if share is not None] or [""]
    cells = [
        cell if share is None or f"{share:.0%}" == shares[0] else f"{cell} on {share:.0%}" for cell, share in found
    ]
    cells = [
        "likewise" if before == cell and not cell.startswith("works") else cell
        for before, cell in pairwise(["", *cells])
    ]
    return f"| {name} | {shares[0]} | {' | '.join(cells)} |"


def main() -> None:
    logging.set_verbosity_error()
    TABLE.write_text(HEAD + "".join(f"{row(name)}\n" for name in (*ARCHITECTURES, *OTHERS)), encoding="utf-8")


if __name__ == "__main__":
    main()
