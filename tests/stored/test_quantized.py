"""Models with weights that were quantized in place: neither saved nor compressed, and told what to do first."""

import copy
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModel, AutoModelForCausalLM

import nsvd
from nsvd import CheckpointError
from nsvd.lab import bits
from nsvd.stored import quantized
from nsvd.stored.folder import headers
from nsvd.stored.quantized import is_quantized
from tests.tiny import GROUPED, Q, compressed, float32, logits, tiny_model, tiny_tokenizer, token_ids  # noqa: F401

PIVOTED = {"method": "asvd-1", "factors": "pivoted"}


def wrapped(model, layer):
    """With a tensor that is made of others as a weight, in place."""
    weight = model.get_submodule(layer).weight.detach()
    model.get_submodule(layer).weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    return model


@pytest.mark.parametrize("low", [False, True])
def test_a_quantized_model_is_not_saved(low, tmp_path):
    """By no way, and nothing is left."""
    model = wrapped(compressed(tiny_model(), method="svd"), f"{Q}.up") if low else wrapped(tiny_model(), Q)
    said = rf"{Q}.*weight is quantized \(TwoTensor\) and cannot be saved: save the model first"
    with pytest.raises(ValueError, match=said):
        nsvd.save(model, tiny_tokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    if low:
        with pytest.raises(ValueError, match=said):
            model.save_pretrained(tmp_path / "theirs")
        assert not list(tmp_path.glob("theirs/*"))


def test_a_quantized_model_is_not_compressed():
    with pytest.raises(
        ValueError, match=rf"layer {Q} keeps its weight quantized \(TwoTensor\): compress the model before"
    ):
        nsvd.compress_(wrapped(tiny_model(), Q), method="svd", ratio=0.3)


def test_the_bytes_counted_are_those_of_a_folder(tmp_path):
    """In bfloat16, but for the header of the file and the two numbers beside the factors."""
    model = compressed(tiny_model(), **PIVOTED)
    nsvd.save(model.to(torch.bfloat16), tiny_tokenizer(), tmp_path / "low")
    file = tmp_path / "low" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == bits.stored_bytes(model) + 2 * 4
    assert bits.stored_bytes(model.float()) == bits.stored_bytes(model)


@pytest.mark.parametrize("options", [{}, {"method": "asvd-1"}, PIVOTED])
def test_torchao_rounds_weights_and_factors(options, tmp_path):
    """Fewer bits are fewer bytes and larger errors; what was saved before is loaded and rounded to the same."""
    pytest.importorskip("torchao", reason="needs torchao: pip install 'nsvd[quantize]'")
    model = compressed(tiny_model(), **options) if options else tiny_model()
    rounded, sizes, errors = {}, [bits.stored_bytes(model)], [0.0]
    for number in (8, 4, 2):
        rounded[number] = copy.deepcopy(model)
        bits.quantize_(rounded[number], number)
        sizes.append(bits.stored_bytes(rounded[number]))
        errors.append((logits(rounded[number]) - logits(model)).norm().item())
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert 0 < errors[1] < 0.02 * logits(model).norm()
    nsvd.save(model, tiny_tokenizer(), tmp_path / "m")
    again, _ = nsvd.load(tmp_path / "m", device="cpu")
    bits.quantize_(again, 4)
    assert torch.equal(logits(again), logits(rounded[4]))
    if options:
        nsvd.save(again, tiny_tokenizer(), tmp_path / "out")
        assert torch.equal(logits(nsvd.load(tmp_path / "out", device="cpu")[0]), logits(again))
    else:
        said = r"quantized \(IntxUnpackedToInt8Tensor\) and cannot be saved: save the model first"
        with pytest.raises(ValueError, match=said):
            nsvd.save(again, tiny_tokenizer(), tmp_path / "out")


@pytest.fixture(params=["int8", "int4"])
def rounded(request, tmp_path):
    """A compressed model in bfloat16, read from a folder and quantized by torchao, in a folder of several files."""
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install 'nsvd[quantize]'")
    how = torchao.Int8WeightOnlyConfig() if request.param == "int8" else torchao.IntxWeightOnlyConfig(torch.int4)
    nsvd.save(compressed(tiny_model(dtype=torch.bfloat16), **PIVOTED), tiny_tokenizer(), tmp_path / "whole")
    model, _ = nsvd.load(tmp_path / "whole", device="cpu")
    torchao.quantize_(model, how)
    nsvd.save(model, tiny_tokenizer(), tmp_path / "out", max_shard_size=20_000)
    return model, tmp_path / "out"


def test_quantized_factors_are_stored_and_read_again(rounded):
    """The same bits, by both ways to load, without the head, and saved once more; whole numbers take a byte each."""
    model, folder = rounded
    assert len(list(folder.glob("*.safetensors"))) > 2
    stored = headers(folder.glob("*.safetensors"))
    shape = tuple(model.get_submodule(Q).up.weight.shape)
    assert (stored[f"{Q}.up._weight_qdata"].dtype, stored[f"{Q}.up._weight_qdata"].shape) == ("I8", shape)
    assert f"{Q}.up.weight" not in stored
    ours, theirs = nsvd.load(folder, device="cpu")[0], AutoModelForCausalLM.from_pretrained(folder).eval()
    for again in (ours, theirs):
        assert is_quantized(again.get_submodule(Q).up.weight)
        assert torch.equal(logits(again), logits(model))
    ids = token_ids(2, 9)
    assert torch.equal(AutoModel.from_pretrained(folder).eval()(ids)[0], model.model(ids)[0])
    ours.save_pretrained(folder / "second", max_shard_size=20_000)
    for file in (folder / "second").glob("*.safetensors"):
        assert load_file(file).keys() == load_file(folder / file.name).keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder / "second").eval()), logits(model))


def test_quantized_factors_are_multiplied_out(rounded):
    """``dequantize`` leaves a plain dense model."""
    model, folder = rounded
    dense = nsvd.load(folder, device="cpu")[0].dequantize()
    assert not any(map(is_quantized, dense.parameters()))
    torch.testing.assert_close(logits(dense), logits(model), rtol=0, atol=0.02)
    dense.save_pretrained(folder / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder / "dense").eval()), logits(dense))


def test_what_is_wrong_with_quantized_factors_is_said(rounded, monkeypatch):
    """Another dtype, a scale that is no number, a tensor that is missing, a library that is."""
    _, folder = rounded
    with pytest.raises(CheckpointError, match="is quantized from bfloat16, and cannot be loaded in float32"):
        nsvd.load(folder, dtype="float32", device="cpu")
    with monkeypatch.context() as without:
        without.setattr(quantized, "_known", list)
        with pytest.raises(CheckpointError, match="torchao is not installed: pip install torchao"):
            nsvd.load(folder, device="cpu")
    file = next(f for f in folder.glob("*.safetensors") if f"{Q}.up._weight_scale" in load_file(f))
    with safe_open(file, "pt") as stored:
        about = stored.metadata()
    tensors = load_file(file)
    tensors[f"{Q}.up._weight_scale"][0] = float("nan")
    save_file(tensors, file, about)
    with pytest.raises(CheckpointError, match=rf"{Q}\.up\._weight_scale holds NaN or Inf"):
        nsvd.load(folder, device="cpu", verify=False)
    del tensors[f"{Q}.up._weight_scale"]
    save_file(tensors, file, about)
    with pytest.raises(CheckpointError, match=rf"{Q}\.up\._weight_scale"):
        nsvd.load(folder, device="cpu", verify=False)
    for text in ("[", "[]", '{"model.norm.weight": {"_type": "Int8Tensor"}}', '{"lm_head.weight": {"_type": "Popen"}}'):
        for other in folder.glob("*.safetensors"):
            save_file(load_file(other), other, about | {"torchao": text})
        with pytest.raises(CheckpointError, match="the weights that torchao has quantized cannot be read"):
            nsvd.load(folder, device="cpu", verify=False)


def test_a_weight_of_four_bits_is_counted_as_half_a_byte():
    """With a scale of two bytes for a row, or for a group that divides it."""
    pytest.importorskip("torchao", reason="needs torchao: pip install 'nsvd[quantize]'")
    model = tiny_model()
    weights = [layer.weight.shape for layer in nsvd.targets(model).values()]
    rest = bits.stored_bytes(model) - 2 * sum(rows * width for rows, width in weights)
    bits.quantize_(model, 4)
    groups = {32: 1, 48: 1}  # widths that one group holds
    counted = sum(rows * width // 2 + 2 * rows * groups[width] for rows, width in weights)
    assert bits.stored_bytes(model) == rest + counted


@pytest.mark.parametrize("bits_", [0, 9, 16])
def test_there_are_1_to_8_bits(bits_):
    with pytest.raises(ValueError, match=f"rounded to 1 to 8 bits, not to {bits_}"):
        bits.quantize_(tiny_model(), bits_)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt_oss"])
def test_all_linear_layers_are_rounded(name):
    """Also those that keep their weight the other way round, and the experts of a mixture."""
    pytest.importorskip("torchao", reason="needs torchao: pip install 'nsvd[quantize]'")
    more = {} if name == "gpt2" else {"num_local_experts": 4, "head_dim": 8, **GROUPED}
    model = tiny_model(name, **more)
    before, whole = logits(model), bits.stored_bytes(model)
    bits.quantize_(model, 8)
    plain = {key for key, value in model.named_parameters() if value.ndim > 1 and not is_quantized(value)}
    assert not {key for key in plain if not re.search(r"wte|wpe|embed|lm_head|router|gate\.weight|_bias", key)}
    assert bits.stored_bytes(model) < 0.75 * whole
    assert 0 < (logits(model) - before).norm() < 0.05 * before.norm()
