"""Distillation brings what the compressed model predicts nearer to what the dense one does, and touches factors only."""

import copy

import pytest
import torch

import nsvd
from nsvd.model import distill
from nsvd.model.descent import descend_, shuffled
from nsvd.model.distill import distill_, instead
from tests.tiny import assert_refused, assert_same, float32, state, tiny_model, token_ids  # noqa: F401

IDS, OTHER = token_ids(12, 16), token_ids(8, 10)


def divergence(model, dense, ids) -> float:
    """E KL(dense ‖ model), nats a token, by the definition."""
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().softmax(-1) for m in (dense, model))
    return (p * (p / q).log()).sum(-1).mean().item()


def same_weights(one, other) -> bool:
    values = other.state_dict()
    return all(torch.equal(value, values[name]) for name, value in one.state_dict().items())


def low_rank(family="llama", **how):
    """A dense model, the same compressed at once, and the layers that were exchanged."""
    dense = tiny_model(family, **how)
    model = copy.deepcopy(dense)
    nsvd.compress_(model, method="svd", ratio=0.5)
    return dense, model, nsvd.targets(copy.deepcopy(dense))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_predictions_come_nearer_to_those_of_the_dense_model(family):
    """Those of the mixture of both texts; nothing but factors changes, flags and mode stay."""
    dense, model, layers = low_rank(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    known = [divergence(model, dense, ids) for ids in (IDS, OTHER)]
    model.train()
    distill_(model, layers, [IDS, OTHER], [0.5, 0.5], steps=30)
    assert all(module.training for module in model.modules())
    model.eval()
    now = [divergence(model, dense, ids) for ids in (IDS, OTHER)]
    assert sum(now) < 0.8 * sum(known)
    after = model.state_dict()
    factors = {name for name in before if name.endswith((".down.weight", ".up.weight"))}
    assert factors == {name for name in before if not torch.equal(before[name], after[name])}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_the_loss_is_the_weighted_divergence_from_the_dense_model(monkeypatch):
    """One batch of each domain holds all its windows here, so that the order does not matter."""
    dense, model, layers = low_rank(dtype=torch.float64)
    seen = []
    monkeypatch.setattr(distill, "descend_", lambda _model, loss, steps: seen.append(loss(0)))
    distill_(model, layers, [IDS, OTHER], [0.3, 0.7], steps=1)
    expected = 0.3 * divergence(model, dense, IDS) + 0.7 * divergence(model, dense, OTHER)
    assert seen[0].item() == pytest.approx(expected, rel=1e-9)
    assert divergence(dense, dense, IDS) == 0


def test_a_domain_of_weight_0_is_no_matter():
    results = []
    for other in (OTHER, token_ids(8, 10, seed=5)):
        _, model, layers = low_rank()
        distill_(model, layers, [IDS, other], [1.0, 0.0], steps=3)
        results.append(model)
    assert same_weights(*results)


def test_the_dense_model_itself_has_nothing_to_learn():
    """Factors of full rank predict what the dense layers predict: the divergence is 0 and stays there."""
    dense = tiny_model(dtype=torch.float64)
    model, layers = copy.deepcopy(dense), nsvd.targets(copy.deepcopy(dense))
    for name, layer in nsvd.targets(model).items():
        k = min(layer.weight.shape)
        full = nsvd.LowRankLinear.from_factors(layer, nsvd.METHODS["svd"](layer.weight.detach().double(), None, k))
        model.set_submodule(name, full)
    distill_(model, layers, [IDS], [1.0], steps=2)
    assert divergence(model, dense, IDS) < 1e-3 * divergence(low_rank(dtype=torch.float64)[1], dense, IDS)


@pytest.mark.parametrize("how", [{"method": "asvd-1"}, {"method": "best"}, {"method": "ridge", "factors": "pivoted"}])
def test_compress_ends_with_it(how):
    """By its own seed reproducible; reported, the errors those of what comes out."""
    made, dense = [], tiny_model()
    for steps in (10, 10, 0):
        made.append(tiny_model())
        report = nsvd.compress_(made[-1], ratio=0.4, windows=IDS, distill=steps, **how)
        assert (report.distill, report.as_dict()["distill"], "distill" in report.seconds) == (steps, steps, steps > 0)
        row = report.table[~report.table.dense].iloc[0]
        W = dense.get_submodule(row.layer).weight.detach().double()
        error = ((W - made[-1].get_submodule(row.layer).dense().double()).norm() / W.norm()).item()
        assert row.weight_error == pytest.approx(error, rel=1e-4)
    assert same_weights(made[0], made[1])
    assert divergence(made[0], dense, IDS) < divergence(made[2], dense, IDS)


def test_factors_keep_the_dtype_of_the_model():
    """Steps too small for it add up in float32."""
    one, other = (tiny_model(dtype=torch.bfloat16) for _ in range(2))
    nsvd.compress_(one, method="svd", ratio=0.4, windows=IDS, distill=10)
    nsvd.compress_(other, method="svd", ratio=0.4)
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    assert not same_weights(one, other)


def test_best_distils_on_the_text_it_samples():
    report = nsvd.compress_(tiny_model(), method="best", ratio=0.4, distill=2)
    assert report.distill == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "svd", "distill": -1}, "distill is -1"),
        ({"method": "svd", "distill": 3}, "distill goes over a text"),
        ({"method": "sola", "distill": 3, "windows": IDS}, "SoLA has no distillation"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    assert_refused(tiny_model(), None, {"ratio": 0.3} | arguments, message)


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model()
    before, calls = state(model), []

    def predicted(model, ids, known=distill._predicted):
        calls.append(len(ids))
        return known(model, ids) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(distill, "_predicted", predicted)
    with pytest.raises(FloatingPointError, match="loss is nan at step 2 of the last 5"):
        nsvd.compress_(model, method="svd", ratio=0.5, windows=IDS, distill=5)
    assert_same(before, model)


def test_modules_are_put_back_whatever_happens():
    model = tiny_model()
    name, layer = next(iter(nsvd.targets(model).items()))
    other = copy.deepcopy(layer)
    seen = []

    def use_and_fail():
        with instead(model, {name: other}):
            seen.append(model.get_submodule(name))
            raise KeyError

    with pytest.raises(KeyError):
        use_and_fail()
    assert seen == [other]
    assert model.get_submodule(name) is layer


def test_without_factors_there_is_nothing_to_descend_on():
    def loss(_step):
        raise AssertionError("the loss was asked for")

    descend_(tiny_model(), loss, steps=3)


def test_every_window_comes_up_before_any_comes_again():
    order = shuffled(5, 12, seed=1)
    assert len(order) == 12
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order[:5] != order[5:10]
    assert order == shuffled(5, 12, seed=1) != shuffled(5, 12, seed=2)
