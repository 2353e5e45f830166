"""Perplexity is what a plain loop over the windows says, and its uncertainty covers what it should."""

import math

import pytest
import torch

import nsvd
from nsvd.lab.evaluation import average_improvement, divergence, evaluate, excess_closed
from tests.tiny import compressed, poison, tiny_model, tiny_tokenizer, token_ids

IDS = token_ids(9, 16)


def by_hand(model, ids: torch.Tensor) -> torch.Tensor:
    """Nats of every predicted token, (count, length − 1), a token at a time."""
    with torch.no_grad():
        log_p = model(input_ids=ids).logits.double().log_softmax(-1)
    return torch.stack(
        [torch.stack([-log_p[w, t, ids[w, t + 1]] for t in range(ids.shape[1] - 1)]) for w in range(len(ids))]
    )


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_the_loss_is_that_of_a_plain_loop(batch):
    """Mean over the predicted tokens of each window, whatever the batch."""
    model = tiny_model()
    result, expected = evaluate(model, IDS, batch=batch), by_hand(model, IDS)
    torch.testing.assert_close(result.losses, expected.mean(1), rtol=1e-6, atol=0)
    assert result.per_window == 15
    assert result.nll == pytest.approx(expected.mean().item(), rel=1e-6)
    assert result.perplexity == pytest.approx(expected.mean().exp().item(), rel=1e-6)
    assert nsvd.perplexity(model, IDS) == pytest.approx(result.perplexity, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_the_loss_is_transformers_own(family):
    """``model(input_ids, labels=…).loss`` over all windows."""
    model = tiny_model(family)
    with torch.no_grad():
        expected = model(input_ids=IDS, labels=IDS).loss.item()
    assert evaluate(model, IDS).nll == pytest.approx(expected, rel=1e-5)


def test_the_standard_error_is_that_of_independent_windows():
    """Standard deviation over √count; of one window nobody knows."""
    result = evaluate(tiny_model(), IDS)
    deviation = math.sqrt(sum((x - result.nll) ** 2 for x in result.losses.tolist()) / 8)
    assert result.standard_error == pytest.approx(deviation / 3)
    assert math.isnan(evaluate(tiny_model(), IDS[:1]).standard_error)


def test_bits_per_byte_do_not_depend_on_how_text_is_cut_into_tokens():
    """With one token a byte they are bits per token; with tokens of two bytes half of that."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer("plain letters, one byte each; thirty-two of them twice, or four ti", return_tensors="pt").input_ids
    model, ids = tiny_model(), ids[:, :64].view(4, 16)
    result = evaluate(model, ids, tokenizer)
    assert result.bytes_per_token == 1
    assert result.bits_per_byte == pytest.approx(math.log2(result.perplexity))

    class Pairs:
        def decode(self, ids, skip_special_tokens):
            return "é" * len(ids)

    assert evaluate(model, ids, Pairs()).bits_per_byte == pytest.approx(result.bits_per_byte / 2)
    with pytest.raises(ValueError, match="need the tokenizer"):
        _ = evaluate(model, ids).bits_per_byte


def test_bytes_are_those_of_the_predicted_tokens():
    """Not of the first of a window, be it a BOS of none or a letter of three; in the middle of a letter, too."""
    tokenizer = tiny_tokenizer(bos=True)
    ids = torch.tensor([tokenizer("文字 ab")["input_ids"][:8], tokenizer("文字 ab")["input_ids"][1:9]])

    class Pairs:  # every token but <s> is two letters of two bytes
        def decode(self, ids, skip_special_tokens):
            return "éé" * sum(token != 0 for token in ids)

    assert evaluate(tiny_model(), ids, tokenizer).bytes_per_token == 1
    assert evaluate(tiny_model(), ids, Pairs()).bytes_per_token == 4
    assert evaluate(tiny_model(), ids.flip(1), Pairs()).bytes_per_token == 4 * 13 / 14


def test_a_compressed_model_is_evaluated_like_a_dense_one():
    """And says less than the same model at full rank."""
    model = compressed(tiny_model())
    expected = by_hand(model, IDS).mean().item()
    assert evaluate(model, IDS).nll == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("parameter", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_a_nan_is_never_averaged_over(parameter):
    """A model that says NaN has no perplexity; the window is named."""
    model = tiny_model()
    poison(model, parameter)
    with pytest.raises(FloatingPointError, match="loss of window 0 is NaN or Inf"):
        evaluate(model, IDS)


def test_a_perplexity_beyond_all_numbers_is_infinite():
    """exp(nll) does not overflow into an error."""
    assert nsvd.Evaluation(torch.tensor([800.0]), 1).perplexity == math.inf


@pytest.mark.parametrize("shape", [(0, 8), (4, 1), (8,)])
def test_windows_predict_at_least_one_token(shape):
    """Empty windows, single tokens and loose rows are refused with the shape."""
    with pytest.raises(ValueError, match="count, length ≥ 2"):
        evaluate(tiny_model(), torch.zeros(shape, dtype=torch.long))


def test_average_improvement_is_the_paper_s():
    """Mean of 1 − p / p_ref: a half and a quarter less are three eighths."""
    assert average_improvement([5.0, 30.0], [10.0, 40.0]) == pytest.approx(0.375)
    assert average_improvement([7.0], [7.0]) == 0
    assert average_improvement([20.0], [10.0]) == -1
    with pytest.raises(ValueError):
        average_improvement([1.0], [1.0, 2.0])


def test_the_excess_closed_runs_from_the_reference_to_the_dense_model():
    """0 at the reference, 1 at the dense model, a half at the geometric mean."""
    reference, dense = [100.0, 400.0], [1.0, 4.0]
    assert excess_closed(reference, reference, dense) == 0
    assert excess_closed(dense, reference, dense) == 1
    assert excess_closed([10.0, 40.0], reference, dense) == pytest.approx(0.5)


def test_divergence_is_what_a_plain_sum_over_the_vocabulary_says():
    """Σ p_dense (ln p_dense − ln p), of every predicted token; none from itself, and not the same in both directions."""
    dense = tiny_model()
    dense.model.norm.weight.data.mul_(30)  # or a random model predicts all tokens alike
    low = compressed(dense)
    with torch.no_grad():
        p, q = (m(input_ids=IDS).logits[:, :-1].double().log_softmax(-1) for m in (dense, low))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    for batch in (None, 4):
        assert divergence(low, dense, IDS, batch=batch) == pytest.approx(expected, rel=1e-4)
    assert divergence(dense, dense, IDS) == pytest.approx(0, abs=1e-7)
    assert divergence(dense, low, IDS) != pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="length ≥ 2"):
        divergence(low, dense, IDS[:, :1])
    poison(low, "model.norm.weight")
    with pytest.raises(FloatingPointError, match="divergence"):
        divergence(low, dense, IDS)
