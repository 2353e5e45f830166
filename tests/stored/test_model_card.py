"""A compressed folder has a card: what it was made of, how, how it is loaded. Somebody's own text is kept."""

import json

import pytest
import torch
import yaml

import nsvd
from nsvd.stored import manifest, model_card
from tests.tiny import compressed, logits, tiny_model, tiny_tokenizer


@pytest.fixture
def dense(tmp_path):
    """A dense model in a folder that tells of its licence, as those of the hub do."""
    folder = tmp_path / "base"
    nsvd.save(tiny_model(), tiny_tokenizer(), folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# base\n", encoding="utf-8")
    return folder


def front(folder) -> dict:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(model_card.FRONT.match(text)[1])


def test_from_folder_to_folder_the_card_tells_all(dense, tmp_path):
    """Base model, licence, method, options, calibration, a table, and how to load; nothing of the machine."""
    (tmp_path / "t.txt").write_text("A few words to read, and some more. " * 200, encoding="utf-8")
    how = {"calibration": str(tmp_path / "t.txt"), "count": 4, "length": 16}
    nsvd.compress(dense, tmp_path / "low", method="nsvd-1", ratio=0.3, k1=0.8, **how)
    text = (tmp_path / "low" / "README.md").read_text(encoding="utf-8")
    assert front(tmp_path / "low") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nsvd", "low-rank"],
        "license": "mit",
    }
    for told in (
        "# `base`, compressed",
        "`base`, compressed",
        "import nsvd",
        '* method: `"nsvd-1"`',
        '{"k1": 0.8}',
        "t.txt",
        "Its licence",
    ):
        assert told in text
    assert "| `model.layers.*.self_attn.q_proj` | 2 | 32 × 32 | low-rank | 11 | 69% |" in text
    assert "of the compressed layers and" in text
    assert '"corpus": "t.txt", "windows": [[4, 16]]' in text
    assert str(tmp_path) not in text
    nsvd.load(tmp_path / "low", device="cpu")


def test_a_model_in_memory_has_a_card_too(tmp_path):
    """Without a source: no base model and no licence are told, none is made up."""
    nsvd.save(compressed(tiny_model(), method="best"), tiny_tokenizer(), tmp_path / "low")
    text = (tmp_path / "low" / "README.md").read_text(encoding="utf-8")
    assert "base_model" not in text
    assert "was not told" in text
    assert "| pivoted |" in text


def test_a_hub_id_is_the_base_model(tmp_path):
    """As the hub links it; it stays that of a model that was read and saved again."""
    model = tiny_model()
    model.config._name_or_path = "somebody/small"
    nsvd.compress_(model, method="svd", ratio=0.3)
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    assert front(tmp_path / "low")["base_model"] == "somebody/small"
    again, tokenizer = nsvd.load(tmp_path / "low", device="cpu")
    nsvd.save(again, tokenizer, tmp_path / "again")
    assert front(tmp_path / "again")["base_model"] == "somebody/small"


@pytest.mark.parametrize("own", [True, False])
def test_a_readme_in_the_folder_is_no_obstacle(own, tmp_path):
    """Ours is written again; somebody's own is kept to the byte, and may be changed without a word to the manifest."""
    folder = tmp_path / "low"
    nsvd.save(compressed(tiny_model(), method="svd"), tiny_tokenizer(), folder)
    first = (folder / "README.md").read_bytes()
    text = b"# mine\r\n\xff" if own else first.replace(b"\n# ", b"\n# changed ", 1)
    (folder / "README.md").write_bytes(text)
    nsvd.load(folder, device="cpu")
    nsvd.save(compressed(tiny_model(seed=1), method="svd"), tiny_tokenizer(), folder)
    assert (folder / "README.md").read_bytes() == (text if own else first)
    assert "README.md" not in json.loads((folder / manifest.NAME).read_text())["files"]


def test_a_dense_model_gets_no_card(tmp_path):
    """One that is there is kept."""
    nsvd.save(tiny_model(), tiny_tokenizer(), tmp_path / "m")
    assert not (tmp_path / "m" / "README.md").exists()
    (tmp_path / "m" / "README.md").write_text("mine", encoding="utf-8")
    nsvd.save(tiny_model(), tiny_tokenizer(), tmp_path / "m")
    assert (tmp_path / "m" / "README.md").read_text(encoding="utf-8") == "mine"


def test_files_are_no_larger_than_asked(tmp_path):
    """``max_shard_size`` goes to transformers; the parts are read again with the same bits."""
    model = compressed(tiny_model(), method="svd")
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low", max_shard_size="50KB")
    files = list((tmp_path / "low").glob("model-*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 60_000 for file in files)
    assert torch.equal(logits(nsvd.load(tmp_path / "low", device="cpu")[0]), logits(model))
