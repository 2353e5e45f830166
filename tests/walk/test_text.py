"""What a model cannot read is refused; logits are made within a budget, and are the same for it."""

import pytest
import torch

import nsvd
from nsvd.lab.evaluation import divergence, evaluate
from nsvd.walk import text
from nsvd.walk.loss import window_losses
from nsvd.walk.text import predictions, tokens_at_once, windows_at_once
from tests.tiny import FAMILIES, assert_same, compressed, state, tiny_model, token_ids

IDS = token_ids(3, 40)


def readings(model) -> dict:
    """Everything that reads a text."""
    return {
        "evaluate": lambda ids: evaluate(model, ids),
        "divergence": lambda ids: divergence(model, model, ids),
        "calibrate": lambda ids: nsvd.calibrate(model, ids),
        "fisher": lambda ids: nsvd.fisher(model, ids),
        "compress_": lambda ids: nsvd.compress_(model, method="asvd-1", ratio=0.3, windows=ids),
        "best": lambda ids: nsvd.compress_(model, method="best", ratio=0.3, windows=[IDS, ids]),
        "compress_kv_": lambda ids: nsvd.compress_kv_(model, method="asvd-1", cache_ratio=0.5, windows=ids),
    }


@pytest.mark.parametrize("token", [300, 40_000, -1])
@pytest.mark.parametrize("reading", readings(None))
def test_a_token_that_the_model_does_not_know_is_named(reading, token):
    """With the size of its vocabulary, before any index fails."""
    model, ids = tiny_model(), IDS.clone()
    ids[2, 5] = token
    before = state(model)
    with pytest.raises(ValueError, match=rf"token {token}, but the model's vocabulary has 300 tokens"):
        readings(model)[reading](ids)
    assert_same(before, model)


@pytest.mark.parametrize("method", ["best", "sola"])
@pytest.mark.parametrize("vocabulary", [1, 5, 8])
def test_a_model_of_few_tokens_can_be_worked_on(method, vocabulary):
    """Whatever is tried first is tried on tokens that it knows."""
    how = {"grid": 1, "floor": 0.0, "keep_outer": 0} if method == "sola" else {}
    model = tiny_model(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    assert text.trial(model).tolist() == [[i % vocabulary for i in range(8)]]
    ids = token_ids() % vocabulary
    report = nsvd.compress_(model, method=method, ratio=0.3, windows=ids, **how)
    assert report.ratio_reached >= 0.3
    nsvd.compress_kv_(model, method="svd", cache_ratio=0.5)
    assert nsvd.perplexity(model, ids) <= vocabulary + 1


WRITING = {
    "sample": lambda model: nsvd.sample(model, 2, 8),
    "own_text": nsvd.own_text,
    "the dense model of divergence": lambda model: divergence(tiny_model(), model, IDS),
}


@pytest.mark.parametrize("reading", [*readings(None), *WRITING])
def test_a_wrapper_is_refused_wherever_a_model_is_wanted(reading):
    """By the sentence that names the model inside, before any attribute is missed."""
    wrapped = torch.nn.DataParallel(tiny_model())
    with pytest.raises(ValueError, match=r"DataParallel is a wrapper .* its module \(LlamaForCausalLM\)"):
        WRITING[reading](wrapped) if reading in WRITING else readings(wrapped)[reading](IDS)


@pytest.mark.parametrize("reading", [name for name in readings(None) if name != "compress_kv_"])
def test_windows_longer_than_the_learned_positions_are_refused(reading):
    """OPT has learned 64; rotations go on for ever."""
    with pytest.raises(ValueError, match="windows of 65 tokens: the model has learned 64 positions"):
        readings(tiny_model("opt"))[reading](token_ids(2, 65))
    evaluate(tiny_model(), token_ids(2, 65))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_parts_are_those_of_the_whole(family, dtype, monkeypatch):
    """By the head and the caps of the model itself; the body reads the text once."""
    model, calls = tiny_model(family, dtype=dtype), []
    monkeypatch.setattr(text, "LOGIT_BYTES", 14 * 4 * 300)
    with torch.no_grad():
        whole = model(input_ids=IDS[:2], use_cache=False).logits[:, :-1]
        model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: calls.append(args[0].numel()))
        parts = list(predictions(model, IDS[:2]))
    assert [part.shape[1] for part in parts] == [7, 7, 7, 7, 7, 4]
    error = 2 * torch.finfo(dtype).eps * whole.abs().max().item()
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=error)
    assert calls == [80, 2, 2, 2, 2, 2]
    assert not model.get_decoder()._forward_hooks


def test_a_body_that_gives_out_something_else_is_read_whole(monkeypatch):
    """Where no hidden states are found by name."""
    model = tiny_model()
    with torch.no_grad():
        (whole,) = predictions(model, IDS[:1])
        monkeypatch.setattr(text, "LOGIT_BYTES", 4 * 300)
        monkeypatch.setattr(model, "get_decoder", lambda: model.model.norm)
        (part,) = predictions(model, IDS[:1])
    assert torch.equal(part, whole)


def test_losses_do_not_depend_on_the_budget(monkeypatch):
    """Nor does the divergence of two models; the budget is in bytes."""
    model = tiny_model()
    model.model.norm.weight.data.mul_(30)  # or a random model predicts all tokens alike
    low = compressed(model)
    losses, apart = window_losses(model, IDS), divergence(low, model, IDS)
    for budget, (tokens, windows) in {4 * 300 * 90: (90, 2), 4 * 300 * 7: (7, 1), 1: (1, 1)}.items():
        monkeypatch.setattr(text, "LOGIT_BYTES", budget)
        assert (tokens_at_once(model), windows_at_once(model, 40)) == (tokens, windows)
        torch.testing.assert_close(window_losses(model, IDS), losses, rtol=1e-6, atol=0)
        assert divergence(low, model, IDS) == pytest.approx(apart, rel=1e-4)


def test_a_vocabulary_of_262_144_words_leaves_room_for_256_tokens():
    """And a small one for 4096, not for more."""
    model = tiny_model()
    assert tokens_at_once(model) == 4096
    model.get_input_embeddings().weight = torch.nn.Parameter(torch.empty(262_144, 32, device="meta"))
    assert tokens_at_once(model) == 256
    assert windows_at_once(model, 64) == 4
    assert windows_at_once(model, 2048) == 1


@pytest.mark.parametrize("tokens", [40, 13, 1])
def test_gradients_do_not_depend_on_the_budget(tokens, monkeypatch):
    """The head of the model runs on some windows and positions at a time; the same labels, the same gradients."""
    model = tiny_model()
    H = nsvd.fisher(model, IDS)
    monkeypatch.setattr(text, "LOGIT_BYTES", 4 * 300 * tokens)
    sizes = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: sizes.append(out.shape[:2].numel()))
    for name, again in nsvd.fisher(model, IDS).items():
        torch.testing.assert_close(again, H[name], rtol=1e-4, atol=1e-9)
    assert sizes[-1] <= tokens
    assert sum(size <= tokens for size in sizes) >= -(-IDS.numel() // tokens)


def test_distillation_reads_within_the_budget(monkeypatch):
    """A window at a time where there is room for no more."""
    model, seen = tiny_model(), []
    monkeypatch.setattr(text, "LOGIT_BYTES", 4 * 300 * 40)
    handle = model.register_forward_pre_hook(
        lambda _m, _args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    nsvd.compress_(model, method="svd", ratio=0.3, windows=IDS, distill=2)
    handle.remove()
    assert set(seen) == {1}
