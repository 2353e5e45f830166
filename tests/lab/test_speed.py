"""What is measured of speed is told by shape, and decides which layers stay dense only where that is asked for."""

import pandas as pd
import pytest
import torch

import nsvd
from nsvd.cli import main
from nsvd.lab import speed as module
from nsvd.lab.speed import RATIOS, TOKENS, break_even, faster, slower, speed
from tests.tiny import K, Q, compressed, tiny_model, tiny_tokenizer


@pytest.fixture
def timed(monkeypatch):
    """Factors that are as many times as fast as dense as they are smaller than 0.8 of it; every case that was asked for."""
    asked = []

    def against(d_out, d_in, k, factors, tokens, device, dtype):
        asked.append((d_out, d_in, k, factors, tokens, str(device), dtype))
        return 1e-4, 0.8 * d_out * d_in / nsvd.linalg.factors.n_params(d_out, d_in, k, factors)

    monkeypatch.setattr(module, "_against", against)
    return asked


@pytest.mark.parametrize(
    ("times", "rank"),
    [
        ({10: 2.0, 20: 1.5, 30: 1.2}, 30),  # never slower
        ({10: 0.9, 20: 0.5}, 0),  # always
        ({10: 1.17, 20: 0.77}, 15),  # half way
        ({20: 0.77, 10: 1.17, 30: 1.5}, 15),  # what comes after counts no more
        ({}, 0),
    ],
)
def test_the_break_even_rank_lies_between_measured_ones(times, rank):
    """The largest rank up to which factors are no slower."""
    assert break_even(times) == rank


def test_every_shape_is_measured_once(timed):
    """In the model's dtype, for both ways to store factors; the time is told in microseconds."""
    table = speed(tiny_model(dtype=torch.bfloat16))
    shapes = {(32, 32): 4, (16, 32): 4, (48, 32): 4, (32, 48): 2}
    assert {(row.d_out, row.d_in): row.layers for row in table.itertuples()} == shapes
    assert len(table) == len(shapes) * 2 * len(TOKENS)
    assert len(timed) == len(set(timed)) == len(table) * len(RATIOS)
    assert {case[-1] for case in timed} == {torch.bfloat16}
    assert set(table.dense.round(6)) == {100.0}
    assert (table["rank"] > 0).all()
    assert (table[0.5] > table[0.05]).all()


def test_layers_that_would_be_slower_are_left_out_of_the_ranks(timed):
    """They stay dense then; so do those whose factors are no smaller."""
    model = tiny_model()
    ranks = {Q: 12, K: 10, "model.layers.1.self_attn.q_proj": 14, "model.layers.0.self_attn.o_proj": 20}
    kept = faster(model, ranks)
    assert kept == {Q: 12}  # 768 of 1024 numbers; 480 of 512, 896 of 1024, 1280 of 1024
    assert len(timed) == len(TOKENS) + 2  # the first number of tokens decides
    report = nsvd.compress_(model, method="svd", ranks=kept)
    assert list(report.table.layer[~report.table.dense]) == [Q]
    with pytest.raises(ValueError, match="no layer 'q' to compress"):
        faster(tiny_model(), {"q": 3})
    with pytest.raises(ValueError, match="unknown factors 'pifa'"):
        faster(tiny_model(), ranks, factors="pifa")


def test_what_is_measured_are_layers_of_the_model_s_kind():
    """Times are positive, for every way and number of tokens."""
    table = speed(tiny_model(num_hidden_layers=1), ratios=(0.5,), tokens=(1, 40))
    assert (table[["dense", 0.5]] > 0).all(axis=None)
    assert set(table.factors) == {"plain", "pivoted"}


def test_the_slow_layers_of_a_compressed_model_are_named(timed):
    """Each by the break-even of its own shape and way to store factors."""
    model = compressed(tiny_model(), method="svd", ratio=None, ranks={Q: 15, K: 3})
    assert slower(model, speed(model)) == [Q]
    rows = [
        {"d_out": 32, "d_in": 32, "factors": "pivoted", "rank": 1},
        {"d_out": 16, "d_in": 32, "factors": "plain", "rank": 2},
    ]
    assert slower(model, pd.DataFrame(rows)) == [K]


def test_info_tells_it_when_asked(timed, tmp_path, capsys):
    """A line a shape, way and number of tokens; the layers that are slow and those that stay dense, by name."""
    model = compressed(tiny_model(), method="svd", ratio=None, ranks={Q: 15, K: 3})
    nsvd.save(model, tiny_tokenizer(), tmp_path / "m")
    assert main(["info", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert "  model.layers.*.self_attn.q_proj  1 of 32 × 32, low-rank 15, 94% of the parameters kept\n" in out
    assert not timed
    assert main(["info", str(tmp_path / "m"), "--speed"]) == 0
    out = capsys.readouterr().out
    times = "0.85 at 5% removed, 1.07 at 20% removed, 1.60 at 50% removed"
    assert f"  32 × 32 (4), plain, 1 token: {times}; no slower up to rank 13 (19% removed)\n" in out
    dense = ", ".join(
        f"model.layers.0.{part}_proj" for part in ("self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    )
    last = f"compressed and slower here than dense: {Q}\ndense: {dense}, model.layers.1.self_attn.q_proj and 6 others\n"
    assert out.endswith(last)


def test_a_model_without_dense_layers_is_measured(timed):
    """All of its shapes are those of compressed layers; a model that has neither is refused."""
    model = compressed(tiny_model(), method="svd", ratio=0.5)
    assert module.dense(model) == {}
    assert len(speed(model, factors=["plain"], tokens=[1])) == 4
    with pytest.raises(ValueError, match=r"no nn\.Linear layer"):
        speed(torch.nn.Sequential(torch.nn.Embedding(3, 4)))
