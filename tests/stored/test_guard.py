"""A compressed folder is loud where nsvd is not imported, and knows its ranks where config.json has lost them."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import nsvd
from nsvd.stored import guard, manifest
from nsvd.walk.folder import open_folder
from tests.tiny import compressed, logits, tiny_model, tiny_tokenizer

DENSE = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model():
    return compressed(tiny_model(), method="svd")


@pytest.fixture
def folder(model, tmp_path):
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    return tmp_path / "low"


def without_section(folder) -> dict:
    """Take ``quantization_config`` out of config.json, as transformers advises; returns it."""
    config = json.loads((folder / "config.json").read_text())
    section = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / manifest.NAME).unlink()
    return section


def test_a_process_that_forgets_the_import_fails_and_reads_what_to_do(folder):
    """Not a model with random weights: transformers alone raises, and what it prints names the import."""
    program = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r}); print('loaded')"
    usual = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}  # a command sets it
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=usual)
    assert done.returncode != 0
    assert "loaded" not in done.stdout
    said = re.sub(r"\x1b\[\d*m", "", done.stdout + done.stderr)
    assert "import nsvd before loading" in said
    assert "RuntimeError" in said


def test_with_the_import_nothing_of_it_is_seen(folder, model):
    """Both ways to read it give the same bits, and not a tensor too many."""
    for again in (nsvd.load(folder, device="cpu")[0], AutoModelForCausalLM.from_pretrained(folder).eval()):
        assert torch.equal(logits(again), logits(model))
        assert again.state_dict().keys() == model.state_dict().keys()
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())


def test_what_transformers_saves_by_itself_is_loud_too(folder, tmp_path):
    """``save_pretrained``, whole or in shards, writes the same two tensors and metadata; a dense model has none."""
    again, _ = nsvd.load(folder, device="cpu")
    for place, size in (("one", "1GB"), ("many", "20KB")):
        again.save_pretrained(tmp_path / place, max_shard_size=size)
        files = sorted((tmp_path / place).glob("*.safetensors"))
        stored = {key: value.shape for file in files for key, value in load_file(file).items()}
        assert (stored[DENSE], stored[guard.ADVICE]) == ((1,), (1,))
        assert all(guard.told([file])["modules"] == again.hf_quantizer.quantization_config.modules for file in files)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / place).eval()), logits(again))
    again.dequantize().save_pretrained(tmp_path / "dense")
    assert guard.ADVICE not in load_file(tmp_path / "dense" / "model.safetensors")
    assert guard.told([tmp_path / "dense" / "model.safetensors"]) is None


def test_a_folder_written_block_by_block_is_the_same(tmp_path):
    """From folder to folder the same tensors are written."""
    nsvd.save(tiny_model(), tiny_tokenizer(), tmp_path / "m")
    nsvd.compress(tmp_path / "m", tmp_path / "low", method="svd", ratio=0.3)
    stored = load_file(tmp_path / "low" / "model.safetensors")
    assert (stored[DENSE].shape, stored[guard.ADVICE].shape) == ((1,), (1,))
    assert guard.told([tmp_path / "low" / "model.safetensors"])["method"] == "svd"


def test_a_folder_that_lost_its_section_is_still_known(folder, model):
    """The ranks are in the weight files; transformers alone, which does not look there, raises."""
    section = without_section(folder)
    again, _ = nsvd.load(folder, device="cpu")
    assert torch.equal(logits(again), logits(model))
    assert again.hf_quantizer.quantization_config.modules == section["modules"]
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="compressed already"):
        open_folder(folder, device="cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("5", "do not tell"), ('{"quant_method": "awq"}', "do not tell"), ("[" * 9999, "JSON")],
)
def test_damaged_metadata_are_refused(text, message, folder):
    """As a damaged config.json is."""
    without_section(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "nsvd": text})
    with pytest.raises(nsvd.CheckpointError, match=message):
        nsvd.load(folder, device="cpu")


def test_an_older_folder_without_any_of_this_is_read(folder, model):
    """As version 0 wrote it."""
    file = folder / "model.safetensors"
    plain = {key: value for key, value in load_file(file).items() if key not in (DENSE, guard.ADVICE)}
    save_file(plain, file, metadata={"format": "pt"})
    (folder / manifest.NAME).unlink()
    assert torch.equal(logits(nsvd.load(folder, device="cpu")[0]), logits(model))


def test_a_whole_weight_beside_its_factors_is_not_passed_over(folder):
    """Only the tensor of one number is."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | {DENSE: torch.zeros(32, 48)}, file, metadata={"format": "pt"})
    (folder / manifest.NAME).unlink()
    for read in (nsvd.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(nsvd.CheckpointError, match="stored beside the factors"):
            read(folder)


def test_every_header_tells(folder):
    """What is told is what config.json holds."""
    with safe_open(folder / "model.safetensors", "pt") as stored:
        told = json.loads(stored.metadata()["nsvd"])
    assert told == json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("about", [{}, {"format": "pt"}, {"z": '{"ä": [1, "}"]}', "format": "pt", "a": "b"}])
def test_metadata_are_sorted_in_their_place(about, tmp_path):
    """Whatever they hold; the tensors and all else stay. Two files of the same are the same bytes."""
    values, seen = {"w": torch.arange(5.0), "v": torch.ones(2, 3)}, set()
    for number in range(12):
        file = tmp_path / f"{number}.safetensors"
        save_file(values, file, metadata=about or None)
        guard.sort_metadata(file)
        seen.add(file.read_bytes())
        with safe_open(file, "pt") as stored:
            assert (stored.metadata() or {}) == about
        assert all(torch.equal(value, values[name]) for name, value in load_file(file).items())
    assert len(seen) == 1
