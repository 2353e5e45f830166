"""Measurements of the latent cache: recorded once, of the tensors, on models that stay as they were."""

import pytest
import torch

import nsvd
from nsvd.cache.latent import bytes_per_token
from nsvd.lab import cache, sweep
from nsvd.lab.records import Records
from tests.tiny import tiny_model, token_ids


def test_a_sweep_measures_every_cell_once(tmp_path, monkeypatch):
    """Dense and compressed, separate and joint, on each corpus; a second sweep only reads."""
    model, texts = tiny_model(), {"one": token_ids(2), "two": token_ids(2, seed=5)}
    stats = nsvd.calibrate(model, token_ids())
    cells = [("svd", 0.5, False, {}), ("asvd-1", 0.5, True, {})]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frame = cache.cache_sweep(model, stats, texts, cells, Records(tmp_path / "r.jsonl"), name="tiny")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(frame.method) == ["dense"] * 2 + ["svd"] * 2 + ["asvd-1"] * 2
    assert set(frame.bytes) == {bytes_per_token(model)[0], bytes_per_token(model)[0] // 2}
    assert frame.perplexity[0] == pytest.approx(nsvd.perplexity(model, texts["one"]))
    changed = tiny_model()
    nsvd.compress_kv_(changed, stats, cache_ratio=0.5, joint=True)
    assert frame.perplexity[5] == pytest.approx(nsvd.perplexity(changed, texts["two"]))

    monkeypatch.setattr(sweep, "evaluate", None)
    again = cache.cache_sweep(model, stats, texts, cells, Records(tmp_path / "r.jsonl"), name="tiny")
    assert again.equals(frame)


def test_a_sweep_knows_the_best_recipe(tmp_path):
    """Its latents, from the statistics given; other gradients are another measurement."""
    model, texts, records = tiny_model(), {"one": token_ids(2)}, Records(tmp_path / "r.jsonl")
    stats = nsvd.calibrate(model, token_ids())
    stats = stats.with_gradients(nsvd.fisher(model, token_ids()))
    frame = cache.cache_sweep(model, stats, texts, [("best", 0.5, True, {})], records, name="tiny")
    changed = tiny_model()
    nsvd.compress_kv_(changed, stats, cache_ratio=0.5, method="best")
    assert frame.perplexity[1] == pytest.approx(nsvd.perplexity(changed, texts["one"]))
    assert frame.bytes[1] == bytes_per_token(changed)[1]
    other = stats.with_gradients(nsvd.fisher(model, token_ids(seed=7)))
    again = cache.cache_sweep(model, other, texts, [("best", 0.5, True, {})], records, name="tiny")
    assert again.perplexity[1] != frame.perplexity[1]


def test_bytes_grow_with_the_text():
    """By the same number for every token."""
    model = tiny_model()
    per_token = bytes_per_token(model)[0]
    assert cache.bytes_by_length(model, token_ids(2, 20), [5, 20]) == {5: 2 * 5 * per_token, 20: 2 * 20 * per_token}
    with pytest.raises(ValueError, match="21 tokens wanted, 20 given"):
        cache.bytes_by_length(model, token_ids(2, 20), [21])


def test_speed_is_of_all_models():
    """A positive number each."""
    speed = cache.decoding_speed({"a": tiny_model(), "b": tiny_model("opt")}, token_ids(2, 4), new=3, repeats=1)
    assert list(speed.index) == ["a", "b"]
    assert (speed["tokens per second"] > 0).all()


def test_the_gain_of_absorption_is_counted_and_timed():
    """V is rebuilt with held · kv_heads · d · r multiplications; absorbed, only sums over the latents are left."""
    table = cache.absorption_gain({"tiny": (4, 2, 8)}, held=50, repeats=1)
    (row,) = table.itertuples(index=False)
    r, *counted = row[:3]
    assert r == 11  # of 2 · 16 numbers half, of these two thirds
    assert counted == pytest.approx([(50 * 2 * 8 * r + 4 * 50 * 8) / 1e6, (4 * 50 * r + 4 * 8 * r) / 1e6])
    assert all(number > 0 for number in row)
