"""The benchmark of inference sets every form of a model beside the dense one."""

import argparse

import torch

import nsvd
from benchmarks.infer import compared, factored
from nsvd.linalg.factors import rank_for_ratio
from tests.tiny import float32, tiny_model  # noqa: F401


def test_factors_of_a_benchmark_have_the_size_asked_for():
    """What is not compressed is shared with the dense model; numbers are finite, orders are orders."""
    model = tiny_model()
    for factors, kind in (("plain", nsvd.LowRankLinear), ("pivoted", nsvd.PivotedLinear)):
        made = factored(model, 0.5, factors)
        for name, layer in nsvd.targets(model).items():
            new = made.get_submodule(name)
            assert type(new) is kind
            assert new.rank == rank_for_ratio(*layer.weight.shape, 0.5, factors)
            for order in new.buffers():
                assert sorted(order.tolist()) == list(range(len(order)))
        assert made.get_input_embeddings().weight is model.get_input_embeddings().weight
        assert made(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()


def test_a_line_tells_how_many_times_as_fast_as_dense():
    """Dense itself is as fast as dense; times are positive, parameters fewer."""
    sizes = {"batch": 2, "prompt": 8, "new": 2, "repeat": 1}
    chosen = argparse.Namespace(**sizes, factors=["plain", "pivoted"], compile=False)
    dense, *others = compared(tiny_model(), 0.5, chosen)
    assert (dense["factors"], dense["prefill_times_dense"], dense["decode_times_dense"]) == ("dense", 1.0, 1.0)
    assert [line["factors"] for line in others] == ["plain", "pivoted"]
    for line in others:
        assert line["parameters"] < dense["parameters"]
        assert min(value for name, value in line.items() if name.startswith(("prefill", "decode"))) > 0
