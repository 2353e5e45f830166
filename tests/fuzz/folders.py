"""Model folders: dense, sharded, compressed with factors of each kind, with a latent cache; damaged once to three times."""

import functools
import random
import shutil
from pathlib import Path
from unittest import mock

import torch

import nsvd
from nsvd import cli
from nsvd.stored import manifest
from tests.fuzz import damage
from tests.fuzz.harness import Case
from tests.tiny import compressed, tiny_model, tiny_tokenizer, token_ids

SECTION = {"quant_method": "awq", "bits": 4}
EXTRA = {
    "config.json": {
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "attn_implementation": "a/b",
        "_attn_implementation": "a/b", "model_type": "opt", "quantization_config": SECTION, "compression_config": SECTION,
        "transformers_weights": "../x.safetensors", "num_hidden_layers": 1_000_000, "num_labels": 10**9, "dtype": "float16",
        "torch_dtype": "int8", "rope_parameters": {"rope_type": "yarn"}, "rope_scaling": {"type": "linear", "factor": -1},
        "text_config": {"attn_implementation": "a/b"}, "tie_word_embeddings": True, "layer_types": ["x"], "head_dim": 10**6,
        "is_encoder_decoder": True, "sliding_window": -1, "architectures": ["Evil"], "id2label": {"a": 1},
        "pruned_heads": {"0": [0]},
        "max_position_embeddings": 10**12, "adapter_config": {}, "problem_type": "x", "use_cache": "x",
        "distributed_config": {"tp_size": 2}, "fusion_config": {"x": True}, "output_attentions": True, "to_dict": 5,
    },
    "tokenizer_config.json": {
        "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "LlamaTokenizer", "tokenizer_file": "/etc/passwd",
        "model_max_length": 10**30, "added_tokens_decoder": {"5": "x"}, "chat_template": "{{", "bos_token": {"a": 1},
        "extra_special_tokens": 5, "vocab_file": "../x", "fast_tokenizer_files": ["../x"], "processor_class": "Evil",
    },
    "generation_config.json": {"custom_generate": "a/b", "max_length": "x", "cache_implementation": "x", "num_beams": -1},
    "model.safetensors.index.json": {"metadata": 5, "weight_map": {"x": "../x.safetensors"}},
}  # fmt: skip


@functools.cache
def originals() -> dict[str, tuple[Path, torch.Tensor]]:
    """Whole folders and what their models say, by name; made once."""
    torch.set_default_dtype(torch.float32)
    place, model = Path.cwd(), tiny_model()
    kinds = {
        "dense": model,
        "sharded": model,
        "tied": tiny_model("gemma2"),
        "factors": compressed(model, ratio=0.3),
        "pivoted": compressed(model, method="asvd-1", factors="pivoted").to(torch.bfloat16),
        "latent": compressed(model, method="svd"),
    }
    nsvd.compress_kv_(kinds["latent"], method="svd", cache_ratio=0.5, joint=True)
    for name, each in kinds.items():
        nsvd.save(each, tiny_tokenizer(), place / name)
    (place / "sharded" / "model.safetensors").unlink()
    model.save_pretrained(place / "sharded", max_shard_size="40KB")
    manifest.write(place / "sharded")
    return {name: (place / name, said(nsvd.load(place / name, device="cpu")[0])) for name in kinds}


@torch.no_grad()
def said(model) -> torch.Tensor:
    return model(token_ids(1, 8)).logits.float()


def folders(seed: int) -> Case:
    """One folder, damaged as the seed tells."""
    rng = random.Random(seed)
    name = rng.choice(sorted(originals()))
    original, expected = originals()[name]
    folder = Path.cwd() / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    done = [_damage(folder, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    sums = rng.choice(("kept", "written again", "written again", "left out"))
    sheet = folder / manifest.NAME
    if sums != "kept" and (sheet.is_file() or sheet.is_symlink()):
        sheet.unlink()
    if sums == "written again" and not sheet.exists():
        manifest.write(folder)
    sealed = sums == "kept" and sheet.is_file()  # without the file nothing is promised
    return Case(f"{name}: {'; '.join(done)}; sums {sums}", functools.partial(_look, folder, expected, sealed))


def _damage(folder: Path, rng: random.Random) -> str:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    weights = [file for file in files if file.suffix == ".safetensors"]
    texts = [file for file in files if file.suffix == ".json"]
    way = rng.choice(("bytes", "whole", "config", "config", "config", "json", "header", "tensors"))
    if way == "config" and (folder / "config.json").is_file():
        return damage.change_json(folder / "config.json", rng, EXTRA["config.json"])
    if way == "json" and texts:
        file = rng.choice(texts)
        return damage.change_json(file, rng, EXTRA.get(file.name, {}))
    if way in ("header", "tensors") and weights:
        return (damage.change_header if way == "header" else damage.change_tensors)(rng.choice(weights), rng)
    hows = (damage.overwrite, damage.misplace) if way == "whole" else (damage.flip, damage.cut)
    return rng.choice(hows)(rng.choice(files), rng) if files else "nothing left"


def _look(folder: Path, expected: torch.Tensor, sealed: bool) -> int:
    """``nsvd info``; and where it tells of a model under the old sums, what the model says."""
    read = []

    def load(*arguments, **options):
        read.append(nsvd_load(*arguments, **options))
        return read[-1]

    nsvd_load = nsvd.load
    with mock.patch.object(nsvd, "load", load):
        code = cli.main(["info", str(folder)])
    if code == 0 and sealed:
        assert torch.equal(said(read[0][0]), expected), "the model says something else"
    return code
