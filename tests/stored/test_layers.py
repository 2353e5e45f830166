"""What stands in the place of a layer computes what its factors say, in less memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nsvd
from nsvd.linalg import LowRank, pivoted
from nsvd.stored.layers import LAYERS, CompressedLayer, LowRankLinear, PivotedLinear, stand_in
from tests.tiny import PIVOTED, Q, compressed, logits, tiny_model


def linear(d_out: int, d_in: int, bias: bool = True, dtype=torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out, bias=bias, dtype=dtype)


def factors(layer: nn.Linear, k: int) -> LowRank:
    return nsvd.decompose(layer.weight.detach(), method="svd", k=k)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("d_out", "d_in", "k"), [(7, 9, 3), (9, 7, 6), (9, 9, 8), (5, 4, 1)])
@pytest.mark.parametrize("leading", [(), (3,), (2, 0, 4), (2, 3, 4)])
def test_a_pivoted_layer_computes_what_the_low_rank_layer_does(bias, d_out, d_in, k, leading):
    """Of the same factors, for inputs of any leading shape, with k² parameters less."""
    layer, x = linear(d_out, d_in, bias), torch.randn(*leading, d_in, dtype=torch.float64)
    low, piv = (stand_in(layer, factors(layer, k), name) for name in ("plain", "pivoted"))
    assert (type(low), type(piv)) == (LowRankLinear, PivotedLinear)
    torch.testing.assert_close(piv(x), low(x), rtol=0, atol=1e-12)
    sizes = [sum(p.numel() for p in made.parameters()) for made in (low, piv)]
    assert sizes[0] - sizes[1] == k**2
    for made in (low, piv):
        dense = made.to_linear()
        torch.testing.assert_close(dense(x), made(x), rtol=0, atol=1e-12)
        torch.testing.assert_close(dense.weight, factors(layer, k).dense(), rtol=0, atol=1e-12)
        assert (dense.bias is None) == (not bias)
        assert (made.in_features, made.out_features, made.rank) == (d_in, d_out, k)


def test_the_order_of_the_outputs_matters():
    """Any other order is another layer."""
    layer = linear(7, 9)
    made, x = stand_in(layer, factors(layer, 3), "pivoted"), torch.randn(4, 9, dtype=torch.float64)
    said = made(x)
    made.order.copy_(made.order.flip(0))
    assert not torch.allclose(made(x), said, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_many_tokens_are_multiplied_by_all_rows_at_once(bias, dtype, monkeypatch):
    """What they give is what one token after the other gives; the products of ``up`` alone are not asked for."""
    layer = linear(40, 24, bias, dtype)
    made, x = stand_in(layer, factors(layer.double(), 6), "pivoted").to(dtype), torch.randn(2, 9, 24, dtype=dtype)
    with torch.no_grad():
        each = torch.stack([torch.cat([made(token[None]) for token in part]) for part in x])
        tolerance = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
        torch.testing.assert_close(made(x), each, **tolerance)
        monkeypatch.setattr(
            nn.Linear, "forward", lambda self, x: F.linear(x, self.weight) if self is made.down else None
        )
        torch.testing.assert_close(made(x), each, **tolerance)


def test_what_is_more_than_a_weight_is_called():
    """An adapter or hook in the place of ``up`` sees its input, and a gradient reaches the weights, for many tokens too."""
    layer = linear(40, 24)
    made, x, seen = stand_in(layer, factors(layer, 6), "pivoted"), torch.randn(18, 24, dtype=torch.float64), []
    with torch.no_grad():
        said = made(x)
        hook = made.up.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        torch.testing.assert_close(made(x), said, rtol=0, atol=1e-12)
        hook.remove()
        made.up = nn.Sequential(made.up)
        made.up.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        torch.testing.assert_close(made(x), said, rtol=0, atol=1e-12)
    assert seen == [(18, 6), (18, 6)]
    made(x).sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_some_outputs_are_computed_as_they_were():
    """The k rows that are kept are those of the factors' matrix, so that these outputs need no second product."""
    layer = linear(7, 9, bias=False)
    made, value = stand_in(layer, factors(layer, 3), "pivoted"), factors(layer, 3).dense()
    kept = made.order < 3
    assert kept.sum() == 3
    torch.testing.assert_close(made.down.weight[made.order[kept]], value[kept], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mode_precision_and_what_is_trained_are_the_layer_s(dtype):
    """Cast once, from the float64 factors; a frozen layer stays frozen, a trained one has gradients."""
    layer = linear(7, 9, dtype=dtype)
    value = factors(layer.double(), 3)
    layer = layer.to(dtype).eval().requires_grad_(False)
    made = PivotedLinear.from_factors(layer, pivoted(value))
    assert torch.equal(made.down.weight, pivoted(value).C.to(dtype))
    assert torch.equal(made.up.weight, pivoted(value).T.to(dtype))
    assert torch.equal(made.bias, layer.bias)
    assert {p.dtype for p in made.parameters()} == {dtype}
    assert not made.training
    assert not any(p.requires_grad for p in made.parameters())
    made = PivotedLinear.from_factors(layer.requires_grad_(True).train(), pivoted(value))
    made(torch.randn(4, 9, dtype=dtype)).sum().backward()
    assert made.training
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize(
    ("kind", "rank"), [(kind, rank) for kind in (LowRankLinear, PivotedLinear) for rank in (0, -1, 10)]
)
def test_a_rank_that_the_layer_cannot_have_is_refused(kind, rank):
    """With the layer's shape."""
    with pytest.raises(ValueError, match=f"rank {rank} of a 7 × 9 matrix"):
        kind.like(linear(7, 9), rank=rank)


def test_a_pivoted_layer_of_full_rank_is_refused():
    """It would keep every row and save nothing; a low-rank layer may be wider still, where it shares one latent with another."""
    assert LowRankLinear.like(linear(7, 9), rank=9).rank == 9
    with pytest.raises(ValueError, match="rank 7 of a 7 × 9 matrix"):
        PivotedLinear.like(linear(7, 9), rank=7)


def test_bfloat16_does_not_tell_the_two_apart():
    """Logits of a bfloat16 model in both forms, at the same ranks, are as close to float32's within a factor of three."""
    ranks = {name: 7 for name in nsvd.targets(tiny_model())}
    errors = {}
    exact = logits(compressed(tiny_model(), method="asvd-1", ratio=None, ranks=ranks))
    for name in ("plain", "pivoted"):
        model = compressed(tiny_model(), method="asvd-1", ratio=None, ranks=ranks, factors=name)
        torch.testing.assert_close(logits(model), exact, rtol=0, atol=1e-5)
        errors[name] = (logits(model.to(torch.bfloat16)).float() - exact).norm().item()
    assert errors["pivoted"] < 3 * errors["plain"]


def test_a_pivoted_model_of_float64_is_dequantised_in_float64():
    """Nothing is rounded to float32 on the way; the layers are plain ones afterwards, and compressed ones again if asked."""
    model = compressed(tiny_model(dtype=torch.float64), **PIVOTED)
    assert isinstance(model.get_submodule(Q), PivotedLinear)
    said = logits(model)
    with pytest.raises(ValueError, match="compressed already"):
        nsvd.compress_(model, method="svd", ratio=0.5)
    plain = model.dequantize()
    torch.testing.assert_close(logits(plain), said, rtol=0, atol=1e-12)
    assert type(plain.get_submodule(Q)) is nn.Linear
    assert nsvd.compress_(plain, method="svd", ratio=0.5, factors="pivoted").ratio_reached >= 0.5


def test_a_kind_of_layer_has_to_say_all_that_is_needed_of_it():
    """What stores no specification or cannot be multiplied out is not built; every kind that is listed can be."""

    class Unfinished(CompressedLayer):
        kind = "unfinished"

    for kind in (CompressedLayer, Unfinished):
        with pytest.raises(TypeError, match="abstract"):
            kind()
    for name, kind in LAYERS.items():
        spec = {"prime": 2, "rank": 3} if name.startswith("split") else {} if name == "narrow" else {"rank": 3}
        assert kind.like(linear(7, 9), **spec).spec() == spec
