"""Models that read images beside a text: their text decoder is compressed, all else stays, and the folder is read whole."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForSequenceClassification

import nsvd
from nsvd.stored.kinds import auto_class, check_continues
from tests.architectures import built
from tests.tiny import assert_same, float32, state, tiny_model, tiny_tokenizer, token_ids  # noqa: F401

ASVD = {"method": "asvd-1", "ratio": 0.3}


@pytest.fixture
def llava():
    """Sees one image in a text of eight tokens."""
    model = built("llava")
    images = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = token_ids(1, 8)
    ids[:, 1:5] = 299
    return model, {"input_ids": ids, "pixel_values": images}


def test_the_class_is_that_of_the_model_in_the_folder():
    """A configuration with images may be that of a model of text alone; what was saved decides."""
    mllama, llama = AutoConfig.for_model("mllama"), AutoConfig.for_model("llama")
    assert auto_class(llama) is auto_class(mllama) is AutoModelForCausalLM
    mllama.architectures = ["MllamaForConditionalGeneration"]
    assert auto_class(mllama) is auto_class(AutoConfig.for_model("llava")) is AutoModelForMultimodalLM


def test_what_continues_no_text_is_told_in_a_true_sentence(llava):
    check_continues(tiny_model())
    check_continues(llava[0])
    with pytest.raises(ValueError, match="transformers does not know LlavaModel as a model that continues a text"):
        nsvd.targets(llava[0].model)
    with pytest.raises(ValueError, match="LlamaModel as a model that continues a text; LlamaForCausalLM is one"):
        nsvd.targets(tiny_model().model)
    with pytest.raises(ValueError, match="BertForMaskedLM fills gaps in a text"):
        nsvd.targets(built("bert, masked"))
    classifier = AutoModelForSequenceClassification.from_config(built("bert, masked").config)
    with pytest.raises(ValueError, match="BertForSequenceClassification as a model that continues a text; only such"):
        nsvd.targets(classifier)  # and names no sibling, which would be an encoder, too
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        encoder = built("bert, not as a decoder").to(dtype)
        before = state(encoder)
        with pytest.raises(ValueError, match="what BertLMHeadModel says of a token depends on those behind it"):
            nsvd.compress_(encoder, method="svd", ratio=0.3)
        assert_same(before, encoder)


@torch.no_grad()
def test_the_text_decoder_beside_a_vision_tower_is_compressed(llava, tmp_path):
    """Read again the model says the same of an image to the bit; the tower is untouched, and the share of the whole is told."""
    model, seen = llava
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = nsvd.compress_(model, windows=token_ids(), **ASVD)
    assert report.table.layer.str.startswith("model.language_model.layers.").all()
    assert report.model_ratio_reached < report.ratio_reached / 3
    assert any("vision" in name for name in report.left_alone)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name in after)
    assert {name for name in before if name not in after} == {f"{name}.weight" for name in report.table.layer}
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    assert "AutoModelForMultimodalLM.from_pretrained" in (tmp_path / "low/README.md").read_text(encoding="utf-8")
    said = model(**seen).logits
    assert not torch.equal(model(input_ids=seen["input_ids"]).logits, said)
    for again in (nsvd.load(tmp_path / "low")[0], AutoModelForMultimodalLM.from_pretrained(tmp_path / "low")):
        assert torch.equal(again(**seen).logits, said)
    plain = again.dequantize()
    torch.testing.assert_close(plain(**seen).logits, said, rtol=0, atol=1e-5)


@torch.no_grad()
def test_from_folder_to_folder_it_is_the_same(llava, tmp_path):
    """Also what tells how images are read is there."""
    model, seen = llava
    nsvd.save(model, tiny_tokenizer(), tmp_path / "dense")
    (tmp_path / "dense/nsvd_manifest.json").unlink()
    (tmp_path / "dense/preprocessor_config.json").write_text(json.dumps({"size": 28}))
    (tmp_path / "text.txt").write_text(" ".join(f"word {n} of {n * n}" for n in range(900)), encoding="utf-8")
    text = {"length": 32, "count": 8}
    nsvd.compress(tmp_path / "dense", tmp_path / "low", calibration=str(tmp_path / "text.txt"), **ASVD, **text)
    windows = nsvd.windows(str(tmp_path / "text.txt"), tiny_tokenizer(), split="calibration", **text)
    nsvd.compress_(model, windows=windows, **ASVD)
    again, _ = nsvd.load(tmp_path / "low", device="cpu")
    assert torch.equal(again(**seen).logits, model(**seen).logits)
    assert json.loads((tmp_path / "low/preprocessor_config.json").read_text()) == {"size": 28}
