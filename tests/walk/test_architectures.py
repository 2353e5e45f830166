"""One path for every family: nothing in it knows a model by name."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import nsvd
from nsvd.stored.layers import CompressedLayer
from tests.tiny import FAMILIES, K1, logits, tiny_model, tiny_tokenizer, token_ids


def biases(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every bias under the name of its layer, wherever in the layer it is kept."""
    named = {name.replace(".up.bias", ".bias"): p.detach().clone() for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if name.endswith(".bias")}


def is_tied(model: nn.Module) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def low_rank(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, CompressedLayer)]


def assert_same_biases(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = biases(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], bias) for name, bias in expected.items())


def read_again(folder, layers, said, before, tied):
    """The model read in both ways: the same layers, bits, biases and ties as it was saved with."""
    for again in (nsvd.load(folder, device="cpu")[0], AutoModelForCausalLM.from_pretrained(folder).eval()):
        assert low_rank(again) == layers
        assert torch.equal(logits(again), said)
        assert_same_biases(again, before)
        assert is_tied(again) == tied
    return again


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_calibrated_compressed_saved_and_read_again(family, tmp_path):
    """Calibrate, compress, save; both ways of reading give the same bits, and ``dequantize`` a plain model that says the same."""
    model, folder, plain_folder = tiny_model(family), tmp_path / "low", tmp_path / "plain"
    layers, before, tied = list(nsvd.targets(model)), biases(model), is_tied(model)
    assert tied == model.config.tie_word_embeddings
    dense = logits(model)

    report = nsvd.compress_(model, nsvd.calibrate(model, token_ids()), method="nsvd-1", ratio=0.3, k1=K1)
    assert low_rank(model) == layers
    assert report.ratio_reached >= 0.3
    said = logits(model)
    assert said.isfinite().all()
    assert not torch.allclose(said, dense, atol=1e-4)

    nsvd.save(model, tiny_tokenizer(), folder)
    plain = read_again(folder, layers, said, before, tied).dequantize()
    assert low_rank(plain) == []
    assert all(type(plain.get_submodule(name)) is nn.Linear for name in layers)
    torch.testing.assert_close(logits(plain), said, rtol=0, atol=1e-5)
    plain.save_pretrained(plain_folder)
    assert "quantization_config" not in json.loads((plain_folder / "config.json").read_text())
    reread = AutoModelForCausalLM.from_pretrained(plain_folder).eval()
    assert torch.equal(logits(reread), logits(plain))
    assert_same_biases(reread, before)
    assert is_tied(reread) == tied


@pytest.mark.parametrize("recipe", [{"method": "ridge", "factors": "pivoted"}, {"method": "best"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_stored_pivoted_too(family, recipe, tmp_path):
    """Pivoted factors, and the recipe of all ingredients on the model's own text: the same bits read again, a plain model after."""
    model, folder = tiny_model(family), tmp_path / "low"
    layers, before, tied, dense = list(nsvd.targets(model)), biases(model), is_tied(model), logits(model)
    windows = None if recipe["method"] == "best" else token_ids()
    report = nsvd.compress_(model, windows=windows, ratio=0.3, **recipe)
    found = low_rank(model)
    assert {type(model.get_submodule(name)) for name in found} == {nsvd.PivotedLinear}
    assert found == layers or (windows is None and set(found) < set(layers))  # the search may leave one dense
    assert report.ratio_reached >= 0.3
    said = logits(model)
    assert said.isfinite().all()
    assert not torch.allclose(said, dense, atol=1e-4)
    nsvd.save(model, tiny_tokenizer(), folder)
    plain = read_again(folder, found, said, before, tied).dequantize()
    assert low_rank(plain) == []
    torch.testing.assert_close(logits(plain), said, rtol=0, atol=1e-5)
    assert_same_biases(plain, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stored_precision_is_kept(family, tmp_path):
    """A bfloat16 model stays one in memory, on disk, read again and dequantised; statistics are float64 all the same."""
    model = tiny_model(family, dtype=torch.bfloat16)
    stats = nsvd.calibrate(model, token_ids())
    assert {m.G.dtype for m in stats.values()} == {torch.float64}
    report = nsvd.compress_(model, stats, ratio=0.3, k1=K1)
    assert report.bytes_after == 2 * report.params_after
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    again, _ = nsvd.load(tmp_path / "low", device="cpu")
    assert torch.equal(logits(again), logits(model))
    for held in (model, again, again.dequantize()):
        assert {p.dtype for p in held.parameters()} == {torch.bfloat16}


def test_gpt2_is_refused_by_the_name_of_its_layers():
    """GPT-2 keeps transposed weights in ``Conv1D``; every entrance says so and changes nothing."""
    model = tiny_model("gpt2")
    before = logits(model)
    for refused in (
        lambda: nsvd.targets(model),
        lambda: nsvd.calibrate(model, token_ids()),
        lambda: nsvd.compress_(model, method="svd", ratio=0.3),
    ):
        with pytest.raises(ValueError, match="Conv1D"):
            refused()
    assert torch.equal(logits(model), before)


def test_a_model_without_linear_layers_is_refused_by_what_it_has():
    """The message names the kinds of layers that were found instead."""
    with pytest.raises(ValueError, match=r"no nn\.Linear layer.*Embedding, LayerNorm"):
        nsvd.targets(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)))


def test_the_output_head_is_left_out():
    """Of every ``nn.Linear`` only the output embedding is no target, tied or not."""
    for family in FAMILIES:
        model = tiny_model(family)
        head = model.get_output_embeddings()
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        assert list(nsvd.targets(model)) == linear
