"""A walk over the blocks is the model: forward, and backward, for every family, without knowing one."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from nsvd.walk.decoder import Decoder, block_list
from nsvd.walk.stream import Stream
from tests.tiny import FAMILIES, state, tiny_model, token_ids

SIZES = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
OTHERS = {
    "gemma3_text": {"head_dim": 12}, "phi3": {}, "olmo2": {}, "granite": {}, "smollm3": {}, "falcon": {}, "bloom": {},
    "mixtral": {}, "gptj": {"rotary_dim": 12, "num_key_value_heads": 4}, "starcoder2": {}, "cohere": {}, "gpt2": {},
    "qwen3_moe": {"head_dim": 12},
}  # fmt: skip


def a_model(kind: str):
    if kind in FAMILIES:
        return tiny_model(kind)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | OTHERS[kind])).eval()


def output_gradients(run, layers) -> dict[str, torch.Tensor]:
    """Gradients at the outputs of the named layers while ``run()`` goes on."""
    seen, handles = {}, []

    def watch(name):
        def hook(_module, _args, out):
            if out.requires_grad:
                out.register_hook(lambda g: seen.__setitem__(name, g))

        return hook

    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(watch(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("kind", [*FAMILIES, *OTHERS])
def test_a_walk_gives_the_logits_and_every_gradient_of_the_whole_graph(kind):
    """Forward to the bit; the loss's gradient at the output of every linear layer of every block to rounding."""
    model, ids = a_model(kind).requires_grad_(False), token_ids(2, 12)
    decoder = Decoder(model)
    entered = decoder.enter(ids)
    borders, hidden = [], entered.hidden
    for index, call in enumerate(entered.calls):
        borders.append(hidden)
        with torch.no_grad():
            hidden = decoder.run(index, hidden, call)
    layers = {n: m for n, m in decoder.blocks.named_modules() if isinstance(m, nn.Linear)}

    def whole():
        leaf = model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_(True))
        try:
            whole.logits = model(input_ids=ids, use_cache=False).logits
        finally:
            leaf.remove()
        cross_entropy(whole.logits.flatten(0, 1), ids.flatten(), reduction="sum").backward()

    def walked():
        last = hidden.detach().requires_grad_(True)
        walked.logits = decoder.logits(entered.ids, last)
        cross_entropy(walked.logits.flatten(0, 1), ids.flatten(), reduction="sum").backward()
        gradient = last.grad
        for index in reversed(range(len(decoder))):
            gradient = decoder.pull(index, borders[index], entered.calls[index], gradient)

    ours, theirs = output_gradients(walked, layers), output_gradients(whole, layers)
    assert torch.equal(walked.logits, whole.logits)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm() for name in theirs)


def test_the_model_is_whole_again_after_every_step_and_after_an_error():
    """Stubs stand in the list of blocks during a pass only."""
    model = tiny_model()
    before, decoder = state(model), None
    decoder = Decoder(model)
    decoder.enter(token_ids(2, 8))
    with pytest.raises(ValueError, match=r"hidden states \(2, 8, 5\) in the place of \(2, 8, 32\)"):
        decoder.logits(token_ids(2, 8), torch.zeros(2, 8, 5))
    assert state(model)["modules"] == before["modules"]


@pytest.mark.parametrize("kind", ["llama", "opt", "falcon"])
def test_a_pass_can_begin_at_any_block(kind):
    """With the hidden states that the model has there, its own pass gives the logits to the bit; the blocks before rest."""
    model, ids = a_model(kind), token_ids(2, 12)
    decoder = Decoder(model)
    stream, borders, ran = Stream(decoder, [ids]), [], []
    while stream.at < len(decoder):
        borders.append(stream.hidden[0])
        stream.step()
    for number, block in enumerate(decoder.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        for index, hidden in enumerate([*borders, stream.hidden[0]]):
            ran.clear()
            with decoder.resumed(index, hidden):
                assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
            assert ran == list(range(index, len(decoder)))


def test_calls_of_one_shape_are_shared():
    """Masks and rotations are those of a shape; another shape has its own."""
    decoder = Decoder(tiny_model())
    first = decoder.enter(token_ids(2, 8))
    assert decoder.enter(token_ids(2, 8, seed=3), like=first).calls is first.calls
    assert decoder.enter(token_ids(2, 9), like=first).calls is not first.calls


class _Gossiping(nn.Module):
    """A block that hands the next one something beside the hidden states."""

    heard = 0.0

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, hidden, *args, **kwargs):
        out = self.block(hidden, *args, **kwargs) + _Gossiping.heard
        _Gossiping.heard = _Gossiping.heard + 1.0
        return out


def test_blocks_that_talk_to_each_other_are_refused():
    """What one walk gives is then not what the model gives."""
    model = tiny_model()
    _, blocks = block_list(model)
    for index, block in enumerate(blocks):
        blocks[index] = _Gossiping(block)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be run block by block: its blocks hand on more"):
        Decoder(model)


def test_a_model_that_remembers_its_text_is_refused():
    """Where a block looks at the token ids behind its arguments, it would look at those of the last text that entered."""
    model, seen = tiny_model(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    block = model.model.layers[0]
    block.register_forward_hook(lambda _m, _a, out: out + 1e-2 * seen[-1][..., None])
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be run block by block"):
        Decoder(model)


def test_a_layer_outside_the_blocks_is_named():
    decoder = Decoder(tiny_model())
    assert decoder.index("model.layers.1.mlp.up_proj") == 1
    with pytest.raises(ValueError, match=r"lm_head is in none of the blocks model\.layers"):
        decoder.index("lm_head")
    with pytest.raises(ValueError, match="no list of blocks"):
        Decoder(nn.Linear(2, 2))
