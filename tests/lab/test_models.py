"""Models by name: embedded, a folder, the hub."""

import pytest

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
    with pytest.raises(FileNotFoundError, match=r"'somebody/model' .*could not be had from the hub.*mini-llama"):
        nsvd.load("somebody/model")
