"""A layer is taken if it computes W x + b in a block of the text decoder, and left alone or refused by name if not."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import nsvd
from tests.tiny import DOWN, SIZES, Q, assert_same, logits, state, tiny_model, tiny_tokenizer, token_ids

IDS = token_ids()
MOE = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}


def put(model: nn.Module, name: str, make) -> nn.Module:
    """The model with ``make(layer)`` in the place of a layer."""
    model.set_submodule(name, make(model.get_submodule(name)))
    return model


def subclass(forward, **members):
    """A layer of a class derived from ``nn.Linear`` with this forward, and the weight and bias of another."""
    kind = type("Derived", (nn.Linear,), {"forward": forward, **members})

    def make(layer: nn.Linear) -> nn.Linear:
        new = kind(layer.in_features, layer.out_features, layer.bias is not None)
        new.load_state_dict(layer.state_dict())
        return new

    return make


class Adapted(nn.Module):
    """A layer with low-rank adapters beside it, as libraries for fine-tuning put it in the layer's place."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, layer.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def refused(model: nn.Module, message: str) -> None:
    """By ``targets`` and ``compress_`` alike, the model as it was."""
    before = state(model)
    with pytest.raises(ValueError, match=message):
        nsvd.targets(model)
    with pytest.raises(ValueError, match=message):
        nsvd.compress_(model, windows=IDS, method="asvd-1", ratio=0.3)
    assert_same(before, model)


def test_a_subclass_that_computes_the_same_is_taken():
    """As Falcon's own linear layer does, in other words."""
    twin = subclass(lambda self, x: x @ self.weight.T + self.bias)
    model = put(tiny_model(), Q, twin)
    assert list(nsvd.targets(model)) == list(nsvd.targets(tiny_model()))
    nsvd.compress_(model, windows=IDS, method="asvd-1", ratio=0.3)
    assert isinstance(model.get_submodule(Q), nsvd.LowRankLinear)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: 3 * nn.Linear.forward(self, x),
        lambda self, x: (nn.Linear.forward(self, x), None)[0] + 1e-3,
        lambda self, x: nn.Linear.forward(self, x.relu()),
    ],
)
def test_a_subclass_that_computes_something_else_is_left_alone(forward):
    """Nothing that its forward does is lost: the layer stays what it is, and the report says so."""
    model = put(tiny_model(), DOWN, subclass(forward))
    layer = model.get_submodule(DOWN)
    assert set(nsvd.targets(tiny_model())) - set(nsvd.targets(model)) == {DOWN}
    report = nsvd.compress_(model, windows=IDS, method="best", ratio=0.3)
    assert model.get_submodule(DOWN) is layer
    assert DOWN not in set(report.table.layer)


def test_a_subclass_that_gives_out_more_or_takes_more_is_left_alone():
    """A router that returns a tuple, a layer that has to be told something."""
    for forward in (
        lambda self, x: (nn.Linear.forward(self, x), x),
        lambda self, x, mask: nn.Linear.forward(self, x) * mask,
    ):
        assert Q not in nsvd.targets(put(tiny_model(), Q, subclass(forward)))


def test_a_layer_of_one_output_is_no_target():
    """There is no rank to give it."""
    model = tiny_model("qwen2_moe", **MOE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    assert not any(name.endswith("shared_expert_gate") for name in nsvd.targets(model))
    assert nsvd.compress_(model, windows=IDS, method="asvd-1", ratio=0.3).ratio_reached >= 0.3


@pytest.mark.parametrize("holds", ["base layer", "own weight"])
def test_an_adapter_is_refused(holds):
    """Beside a layer, or in a layer beside its weight: it has to be merged first, or would be lost."""

    def own(layer: nn.Linear) -> nn.Linear:
        new = subclass(nn.Linear.forward)(layer)
        new.lora_A, new.lora_B = nn.Parameter(torch.zeros(4, 32)), nn.Parameter(torch.zeros(32, 4))
        return new

    model = put(tiny_model(), Q, Adapted if holds == "base layer" else own)
    refused(model, rf"layer {Q} \(\w+\) holds an adapter beside its weight: merge it first")


def test_a_quantized_layer_or_model_is_refused():
    """A weight of eight bits is a code; a model that another library has quantized says so in its configuration."""

    def eight_bits(layer: nn.Linear) -> nn.Linear:
        new = subclass(lambda self, x: nn.functional.linear(x, self.weight.to(x.dtype)))(layer)
        new.weight = nn.Parameter((layer.weight * 100).to(torch.int8), requires_grad=False)
        return new

    refused(put(tiny_model(), Q, eight_bits), rf"layer {Q} \(Derived\) keeps its weight as int8 \(32, 32\): dequantize")
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    refused(model, "LlamaForCausalLM is quantized by bitsandbytes: dequantize it first")


def test_a_wrapped_model_is_refused():
    """Names inside a wrapper would not be those of the model that is saved."""
    refused(nn.DataParallel(tiny_model()), r"DataParallel is a wrapper .* its module \(LlamaForCausalLM\)")


def test_an_encoder_with_a_decoder_is_refused():
    """Its blocks read two texts."""
    config = AutoConfig.for_model("t5", d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=300)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    refused(model, "T5ForConditionalGeneration is an encoder with a decoder")


def test_a_vision_tower_is_left_alone(tmp_path):
    """Of a model that sees, the text decoder is compressed; what is saved is read again."""
    text = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert {name.split(".layers.")[0] for name in nsvd.targets(model)} == {"model.language_model"}
    nsvd.compress_(model, method="svd", ratio=0.3)
    said = logits(model)
    assert said.isfinite().all()
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    assert torch.equal(logits(nsvd.load(tmp_path / "low", device="cpu")[0]), said)


BIGCODE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64}
LLAMA4 = {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 48, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_bigcode", BIGCODE),
        ("phimoe", MOE),
        ("llama4_text", LLAMA4 | {"num_key_value_heads": 2}),
        ("falcon", {}),
        ("mixtral", MOE),
    ],
)
@pytest.mark.parametrize("method", ["svd", "asvd-1", "best"])
def test_a_family_that_does_more_than_call_its_layers(family, changes, method, tmp_path):
    """Routers that are linear layers, weights that are looked at, outputs that are added to in place: right, and read again."""
    model = tiny_model(family, **changes)
    report = nsvd.compress_(model, windows=IDS, method=method, ratio=0.3)
    said = logits(model)
    assert report.ratio_reached >= 0.3
    assert said.isfinite().all()
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    again, _ = nsvd.load(tmp_path / "low", device="cpu")
    torch.testing.assert_close(logits(again), said, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factors", ["plain", "pivoted"])
def test_weights_and_biases_that_are_read_and_not_called_are_those_of_the_factors(factors, tmp_path):
    """Mamba multiplies by the weight of a layer and adds its bias by itself."""
    model = tiny_model("mamba", state_size=4)
    name = "backbone.layers.0.mixer.dt_proj"
    nsvd.compress_(model, method="svd", ratio=0.3, factors=factors)
    layer, plain = model.get_submodule(name), model.get_submodule(name).to_linear()
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)
    said = logits(model)
    model.set_submodule(name, plain)
    torch.testing.assert_close(logits(model), said, rtol=0, atol=1e-5)
    model.set_submodule(name, layer)
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    torch.testing.assert_close(logits(nsvd.load(tmp_path / "low", device="cpu")[0]), said, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "message"), [("raise", "does not run any more"), ("nan", "predicts NaN")])
@pytest.mark.parametrize("method", ["svd", "sola"])
def test_a_model_that_does_not_run_after_the_exchange_is_put_back(kind, message, method, monkeypatch):
    """Eight tokens are tried before anything is returned; the one layer that breaks the model is named."""

    def broken(self, x):
        y = self.up(self.down(x))
        if self is not hit[-1]:
            return y
        if kind == "raise":
            raise KeyError("here")
        return y * float("nan")

    model, hit = tiny_model(hidden_size=64), []
    before, build = state(model), nsvd.LowRankLinear.__init__

    def remember(self, *args, **options):
        build(self, *args, **options)
        if self.in_features == self.out_features or not hit:
            hit.append(self)

    monkeypatch.setattr(nsvd.LowRankLinear, "__init__", remember)
    monkeypatch.setattr(nsvd.LowRankLinear, "forward", broken)
    with pytest.raises(
        (ValueError, FloatingPointError), match=rf"layer model\.layers\.\d\.\S+: once it is exchanged.*{message}"
    ):
        nsvd.compress_(
            model, windows=IDS, method=method, ratio=0.3, **({"grid": 1, "keep_outer": 0} if method == "sola" else {})
        )
    assert_same(before, model)
