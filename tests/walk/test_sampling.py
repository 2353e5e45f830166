"""Text from the model itself: its own distribution, token by token, and repeatable."""

import pytest
import torch

import nsvd
from nsvd.cache.latent import bytes_per_token
from nsvd.walk import sampling
from nsvd.walk.caches import Reserved
from nsvd.walk.loss import window_losses
from nsvd.walk.sampling import OPENING_TOKENS, index_at
from tests.tiny import FAMILIES, assert_same, poison, state, tiny_model


def loud(family: str = "llama", **changes):
    """A model whose predictions are far from uniform."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8 if model.config.model_type == "gemma2" else 30)
    return model


def continued(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits for every token but the first, from one pass without a cache."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, :-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_at_low_temperature_sampling_is_greedy(family):
    """Every token is the likeliest after those before it, as one pass without a cache sees them."""
    model = loud(family, tie_word_embeddings=False)
    ids = nsvd.sample(model, 3, 12, temperature=1e-6, start=17)
    assert ids.shape == (3, 12)
    assert (ids[:, 0] == 17).all()
    said = continued(model, ids)
    taken = said.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(taken, said.max(-1).values, rtol=1e-4, atol=1e-4)
    assert not torch.equal(ids, nsvd.sample(model, 3, 12, start=17))


def test_an_opening_cools_down_to_the_temperature():
    """Tokens are all but uniform at first and greedy from the tenth on; an opening at the temperature is none."""
    model = loud(tie_word_embeddings=False)
    ids = nsvd.sample(model, 400, 14, temperature=1e-6, opening=1e6)
    said = continued(model, ids).max(-1).indices
    greedy = (said == ids[:, 1:]).double().mean(0)
    assert (greedy[:OPENING_TOKENS] < 0.05).all()
    assert (greedy[OPENING_TOKENS:] > 0.99).all()
    assert len(ids[:, 1].unique()) > 150
    plain = nsvd.sample(model, 3, 14, temperature=0.7)
    assert torch.equal(nsvd.sample(model, 3, 14, temperature=0.7, opening=0.7), plain)
    assert not torch.equal(nsvd.sample(model, 3, 14, temperature=0.7, opening=2.0), plain)


def test_the_second_token_is_distributed_as_the_model_says():
    """Frequencies of 20 000 draws after the start token: χ² within five deviations of its mean, and not for another token."""
    model = loud(tie_word_embeddings=False)
    with torch.no_grad():
        said = [model(input_ids=torch.tensor([[token]])).logits[0, -1].double().softmax(-1) for token in (0, 1)]
    counts = nsvd.sample(model, 20_000, 2, batch=20_000)[:, 1].bincount(minlength=300)

    def deviations(p: torch.Tensor) -> float:
        likely = p > 5 / 20_000
        expected = torch.cat([20_000 * p[likely], 20_000 * p[~likely].sum()[None]])
        seen = torch.cat([counts[likely], counts[~likely].sum()[None]]).double()
        degrees = len(expected) - 1
        return (((seen - expected).square() / expected).sum().item() - degrees) / (2 * degrees) ** 0.5

    assert abs(deviations(said[0])) < 5
    assert deviations(said[1]) > 50


def test_the_likelihood_of_a_sample_is_the_entropy_of_the_model():
    """E[−log p] over the model's own text is the mean entropy of its predictions; of random tokens it is far higher."""
    model = loud(tie_word_embeddings=False)
    ids = nsvd.sample(model, 64, 24)
    entropy = torch.distributions.Categorical(logits=continued(model, ids).double()).entropy()
    spread = (entropy.std() / entropy.numel() ** 0.5).item()
    assert abs(window_losses(model, ids).mean().item() - entropy.mean().item()) < 8 * spread + 0.1
    assert window_losses(model, nsvd.random_tokens(300, 64, 24)).mean() > entropy.mean() + 1


def test_a_sample_is_repeatable_by_its_seed():
    """The same ids for the same seed, others for another; every window is drawn anew, also in a later batch."""
    model = tiny_model()
    first, again, other = (nsvd.sample(model, 5, 8, seed=seed, batch=2) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 5
    assert first.dtype == torch.long


def test_sampling_leaves_the_model_and_the_global_seed_alone():
    """Mode and tensors are kept, also after an error, and nobody else's random numbers are used up."""
    model = tiny_model().train()
    before, seed = state(model), torch.random.get_rng_state()
    nsvd.sample(model, 2, 4)
    nsvd.random_tokens(300, 2, 4)
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert_same(before, model)
    poison(model, "model.norm.weight")
    before = state(model)
    with pytest.raises(FloatingPointError, match="no text can be sampled"):
        nsvd.sample(model, 2, 4)
    assert_same(before, model)


@pytest.mark.parametrize(
    "sizes",
    [
        {"count": 0},
        {"count": -1},
        {"length": 1},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"opening": -1.0},
    ],
)
def test_a_sample_of_nothing_is_refused(sizes):
    """With the sizes that were asked for."""
    with pytest.raises(ValueError, match=r"cannot sample .* windows of .* tokens at temperature"):
        nsvd.sample(tiny_model(), **({"count": 2, "length": 4} | sizes))


def test_a_model_that_names_no_first_token_needs_one():
    """None is made up."""
    model = tiny_model(bos_token_id=None)
    with pytest.raises(ValueError, match=r"pass start= to sample, or calibrate on a text .*windows=, --calibration"):
        nsvd.sample(model, 2, 4)
    assert (nsvd.sample(model, 2, 4, start=9)[:, 0] == 9).all()


def test_a_first_token_that_the_vocabulary_has_not_is_refused():
    with pytest.raises(ValueError, match=r"bos_token_id.* is 300, the vocabulary has 300 tokens"):
        nsvd.sample(tiny_model(bos_token_id=300), 1, 4)


def test_a_window_is_no_longer_than_learned_positions():
    """OPT has 64 and no more; rotations go on for ever."""
    assert nsvd.sample(tiny_model("opt"), 1, 64).shape == (1, 64)
    with pytest.raises(ValueError, match="windows of 65 tokens: the model has learned 64 positions"):
        nsvd.sample(tiny_model("opt"), 1, 65)
    assert nsvd.sample(tiny_model(), 1, 66).shape == (1, 66)


def test_the_windows_do_not_depend_on_the_batch(monkeypatch):
    """One at a time, some, all, or as many as there is room for; that is as many as keys and values of a batch may take."""
    model, calls = tiny_model(), []
    whole = nsvd.sample(model, 7, 8, seed=3)
    for batch in (1, 3, 7, 100):
        assert torch.equal(nsvd.sample(model, 7, 8, seed=3, batch=batch), whole)
    each = 8 * bytes_per_token(model)[0]
    monkeypatch.setattr(sampling, "CACHE_BYTES", 3 * each)
    model.register_forward_pre_hook(lambda _m, _a, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    assert torch.equal(nsvd.sample(model, 7, 8, seed=3), whole)
    assert calls == 7 * [3] + 7 * [3] + 7 * [1]
    monkeypatch.setattr(sampling, "CACHE_BYTES", each - 1)
    assert torch.equal(nsvd.sample(model, 2, 8), nsvd.sample(model, 2, 8, batch=1))


def test_draws_follow_the_probabilities_and_never_a_zero():
    """Frequencies within five deviations; rows need not sum to one; no index of probability 0, in front, between or behind."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0, 0.0])
    for row in (p, 7 * p):
        ids = index_at(
            row.expand(40_000, 7), torch.rand(40_000, 1, generator=torch.Generator().manual_seed(0)).double()
        )[:, 0]
        frequencies = ids.bincount(minlength=7) / 40_000
        assert ((frequencies - p).abs() <= 5 * (p * (1 - p) / 40_000).sqrt()).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_hit_no_zero(u):
    """Not even the smallest and the largest number that can come."""
    p = torch.tensor([[0, 0.1, 0.9, 0], [0, 0.3, 1e-9, 0], [0, 3, 4, 0]], dtype=torch.float32)
    ids = index_at(p, torch.full((3, 1), u, dtype=torch.float64))
    assert (p.gather(1, ids) > 0).all()
    assert set(ids[:, 0].tolist()) == ({1} if u == 0 else {2})


def test_random_tokens_are_of_no_domain():
    """Uniform ids below the vocabulary's size, repeatable by seed."""
    ids = nsvd.random_tokens(50, 40, 500, seed=1)
    assert ids.shape == (40, 500)
    counts = ids.flatten().bincount(minlength=50)
    assert len(counts) == 50
    assert ((counts - 400).abs() <= 5 * 20).all()
    assert torch.equal(ids, nsvd.random_tokens(50, 40, 500, seed=1))
    assert not torch.equal(ids, nsvd.random_tokens(50, 40, 500, seed=2))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt"])
def test_keys_and_values_stay_where_they_are(family, monkeypatch):
    """Room for the whole window is taken once; layers that forget keep their own way; the same text."""
    model, seen = tiny_model(family), []
    ids = nsvd.sample(model, 3, 20, seed=2)
    model.register_forward_hook(lambda _m, _a, out: seen.append(list(out.past_key_values.layers)))
    assert torch.equal(nsvd.sample(model, 3, 20, seed=2), ids)
    rooms = [layer for layer in seen[-1] if type(layer) is Reserved]
    assert len(rooms) == (1 if family == "gemma2" else 2)  # every second one of Gemma 2 looks back over a window
    for layer in rooms:
        assert layer.keys.shape[-2] == layer.get_seq_length() == 19
        assert layer.keys.data_ptr() == layer._rooms[0].data_ptr()
    monkeypatch.setattr(sampling, "reserve", lambda _caches, _room: None)
    assert torch.equal(nsvd.sample(model, 3, 20, seed=2), ids)
