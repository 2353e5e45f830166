"""Models with weights that were quantized in place: neither saved nor compressed, and told what to do first."""

import copy
import re

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import nsvd
from nsvd.lab import bits
from nsvd.stored.quantized import is_quantized
from tests.tiny import GROUPED, Q, compressed, float32, logits, tiny_model, tiny_tokenizer  # noqa: F401

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
    with pytest.raises(
        ValueError, match=r"quantized \(IntxUnpackedToInt8Tensor\) and cannot be saved: save the model first"
    ):
        nsvd.save(again, tiny_tokenizer(), tmp_path / "out")


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
