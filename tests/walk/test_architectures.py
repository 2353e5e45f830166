"""One path for every family: nothing in it knows a model by name."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import nsvd
from nsvd.compression import sola, whole_layers
from nsvd.stored.layers import CompressedLayer
from tests.tiny import FAMILIES, K1, assert_same, logits, state, tiny_model, tiny_tokenizer, token_ids


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


@pytest.mark.parametrize("recipe", [{"method": "ridge", "factors": "pivoted"}, {"method": "best", "neurons": 0}])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_stored_pivoted_too(family, recipe, tmp_path):
    """Pivoted factors, and with them ``best`` on the model's own text: the same bits read again, a plain model after."""
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


RECIPES = {
    "svd": {"method": "svd"},
    "nsvd-1": {"method": "nsvd-1", "k1": K1, "windows": token_ids()},
    "strs": {"method": "asvd-1", "allocation": "strs", "windows": token_ids()},
    "zero-sum": {"method": "asvd-1", "allocation": "zero-sum", "windows": token_ids()},
    "sola": {"method": "sola", "grid": 1, "keep_outer": 0, "floor": 0.0, "windows": token_ids()},
    "best": {"method": "best", "windows": token_ids()},
}


def gpt2(**changes):
    return tiny_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, **changes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gpt2_keeps_its_transposed_weights_where_they_stay_dense(recipe, tmp_path):
    """``Conv1D`` layers are compressed as linear ones are; ``dequantize`` gives a model that plain transformers reads."""
    model, folder = gpt2(), tmp_path / "low"
    names = [name for name, module in model.named_modules() if type(module) is Conv1D]
    assert len(names) == 8
    assert list(nsvd.targets(model)) == names
    assert {type(model.get_submodule(name)) for name in names} == {Conv1D}
    tensors = model.state_dict()
    for name, layer in nsvd.targets(model).items():
        assert torch.equal(layer.weight, tensors[f"{name}.weight"].T)
    dense = logits(model)
    report = nsvd.compress_(model, ratio=0.3, exclude="h.1.mlp.*" if recipe != "sola" else None, **RECIPES[recipe])
    assert report.ratio_reached >= 0.3
    found, said = low_rank(model), logits(model)
    assert {type(model.get_submodule(name)) for name in names if name not in found} <= {Conv1D}
    assert not torch.allclose(said, dense, atol=1e-4)
    nsvd.save(model, tiny_tokenizer(), folder)
    plain = read_again(folder, found, said, biases(model), True).dequantize()
    assert {type(plain.get_submodule(name)) for name in names} == {Conv1D}
    torch.testing.assert_close(logits(plain), said, rtol=0, atol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    reread, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(reread.eval()), logits(plain))


def test_gpt2_is_what_the_same_model_of_linear_layers_is():
    """The same moments, gradients and factors, to rounding."""
    model = gpt2()
    linear = copy.deepcopy(model)
    for name, layer in nsvd.targets(linear).items():
        same = nn.Linear(layer.in_features, layer.out_features)
        same.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        linear.set_submodule(name, same)
    before = logits(model)
    for one in (model, linear):
        nsvd.compress_(one, windows=token_ids(), method="best", ratio=0.3)
    assert (logits(model) - logits(linear)).norm() < 1e-3 * (logits(model) - before).norm()


@pytest.mark.parametrize("recipe", ["nsvd-1", "sola", "best"])
def test_gpt2_is_what_it_was_when_something_raises(recipe, monkeypatch):
    """Every layer is the ``Conv1D`` that it was, the fitted and permuted ones among them."""
    model = gpt2()
    before, layers = state(model), dict(model.named_modules())

    def fail(*_):
        raise ValueError("not this one")

    for place in (whole_layers, sola):
        monkeypatch.setattr(place, "check_exchanged", fail)
    with pytest.raises(ValueError, match="not this one"):
        nsvd.compress_(model, ratio=0.3, **RECIPES[recipe])
    assert_same(before, model)
    assert dict(model.named_modules()) == layers


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
