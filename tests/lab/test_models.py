"""Models by name: embedded, a folder, the hub."""

import pytest
from transformers import AutoTokenizer

import nsvd
from nsvd.lab import models
from tests.tiny import tiny_model, tiny_tokenizer


def test_the_embedded_model_is_loaded_by_name():
    """In evaluation mode, with its tokenizer."""
    assert "mini-llama" in nsvd.embedded_models()
    model, tokenizer = nsvd.load("mini-llama", device="cpu")
    assert not model.training
    assert len(tokenizer) <= model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_a_folder_needs_a_config(tmp_path):
    """A dense model's folder is read; an empty one is no model."""
    nsvd.save(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    assert len(nsvd.targets(nsvd.load(tmp_path / "model", device="cpu")[0])) == 14
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty is a folder without config\.json"):
        nsvd.load(tmp_path / "empty")


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "/no/such/folder", "a/b/c"])
def test_a_name_that_is_none_of_these_is_told_what_there_is(name):
    """Without asking the hub."""
    with pytest.raises(FileNotFoundError, match=r"no model .*mini-llama"):
        nsvd.load(name)


def test_a_hub_that_cannot_be_reached_is_told_apart(monkeypatch):
    """With the same advice."""

    def unreachable(*_args, **_options):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(models, "load_folder", unreachable)
    with pytest.raises(FileNotFoundError, match=r"'somebody/model' .*could not be downloaded from the hub.*mini-llama"):
        nsvd.load("somebody/model")


def test_a_model_of_the_hub_is_looked_at_like_a_folder(tmp_path, monkeypatch):
    """From the local cache, whose files are links; of the hub's files neither code nor pickles are asked for."""
    import json

    from nsvd.stored import loading

    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "hub")

    nsvd.save(tiny_model(), tiny_tokenizer(), tmp_path / "hub")
    monkeypatch.setattr(loading, "snapshot_download", snapshot)
    assert len(nsvd.targets(nsvd.load("somebody/model", device="cpu")[0])) == 14
    assert asked["name"] == "somebody/model"
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["allow_patterns"])
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(
        json.dumps(config | {"model_type": "evil", "auto_map": {"AutoConfig": "e.C"}})
    )
    (tmp_path / "hub" / "nsvd_manifest.json").unlink()
    with pytest.raises(nsvd.CheckpointError, match=r"its own code .* is not run"):
        nsvd.load("somebody/model")


def test_a_file_is_no_folder(tmp_path):
    """Not even the config.json of one."""
    nsvd.save(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file; a model is a folder"):
        nsvd.load(tmp_path / "model" / "config.json")


@pytest.mark.parametrize("name", nsvd.embedded_models())
def test_the_tokenizers_of_the_reference_models_put_nothing_before_a_text(name):
    """Their training windows began anywhere, so hardly one with a BOS: windows that did would be read worse."""
    tokenizer = AutoTokenizer.from_pretrained(nsvd.embedded_models()[name], trust_remote_code=False)
    assert tokenizer("a text")["input_ids"] == tokenizer("a text", add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token_id == 0
