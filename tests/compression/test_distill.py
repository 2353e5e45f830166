"""Distillation brings what the compressed model predicts nearer to what the dense one does, and touches factors only."""

import copy

import pytest
import torch

import nsvd
from nsvd.compression import descent, distill, exchange
from nsvd.compression.descent import descend_, fit_, shuffled
from nsvd.compression.distill import distill_
from nsvd.walk.hooks import exchanged
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
    losses = distill_(model, layers, [IDS, OTHER], [0.5, 0.5], steps=30)
    assert all(module.training for module in model.modules())
    model.eval()
    now = [divergence(model, dense, ids) for ids in (IDS, OTHER)]
    assert sum(now) < 0.8 * sum(known)
    assert len(losses) == 30
    assert losses[0] == pytest.approx(sum(known) / 2, rel=1e-3)
    assert losses[-1] == pytest.approx(sum(now) / 2, rel=0.02)
    after = model.state_dict()
    factors = {name for name in before if name.endswith((".down.weight", ".up.weight"))}
    assert factors == {name for name in before if not torch.equal(before[name], after[name])}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_the_loss_is_the_weighted_divergence_from_the_dense_model(monkeypatch):
    """One batch of each domain holds all its windows here, so that the order does not matter."""
    dense, model, layers = low_rank(dtype=torch.float64)
    seen = []
    monkeypatch.setattr(distill, "fit_", lambda _model, loss, **_how: seen.append(sum(loss(0))))
    distill_(model, layers, [IDS, OTHER], [0.3, 0.7], steps=1)
    expected = 0.3 * divergence(model, dense, IDS) + 0.7 * divergence(model, dense, OTHER)
    assert seen[0].item() == pytest.approx(expected, rel=1e-9)
    assert divergence(dense, dense, IDS) == 0


def test_it_generalizes():
    """On windows that no step has seen the divergence falls as well."""
    dense, model, layers = low_rank()
    unseen = token_ids(20, 16, seed=9)
    before = divergence(model, dense, unseen)
    distill_(model, layers, [token_ids(200, 16, seed=8)], [1.0], steps=60)
    assert divergence(model, dense, unseen) < 0.9 * before


def test_a_domain_of_weight_0_is_no_matter():
    """Not even where the model has no prediction for it."""
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


@pytest.mark.parametrize(
    ("how", "ratio"),
    [({"method": "asvd-1"}, 0.4), ({"method": "best"}, 0.8), ({"method": "ridge", "factors": "pivoted"}, 0.4)],
)
def test_compress_ends_with_it(how, ratio):
    """By its own seed reproducible; reported, the errors those of what comes out. ``best`` at 0.4 has nothing left to win here."""
    made, dense = [], tiny_model()
    for steps in (10, 10, 0):
        made.append(tiny_model())
        report = nsvd.compress_(made[-1], ratio=ratio, windows=IDS, distill=steps, **how)
        assert (report.distill, report.as_dict()["distill"], "distill" in report.seconds) == (steps, steps, steps > 0)
        row = report.table[~report.table.dense].iloc[0]
        W = dense.get_submodule(row.layer).weight.detach().double()
        error = ((W - made[-1].get_submodule(row.layer).dense().double()).norm() / W.norm()).item()
        assert row.weight_error == pytest.approx(error, rel=1e-4)
    assert same_weights(made[0], made[1])
    assert divergence(made[0], dense, IDS) < divergence(made[2], dense, IDS)


def test_steps_too_small_for_the_dtype_of_the_model_add_up():
    """Each is a hundredth of what bfloat16 can tell apart; a hundred of them move the factors, which stay bfloat16."""
    moved = {}
    for steps in (1, 100):
        one, other = (tiny_model(dtype=torch.bfloat16) for _ in range(2))
        nsvd.compress_(other, method="svd", ratio=0.4)
        nsvd.compress_(one, method="svd", ratio=0.4)
        descent.descend_(one, lambda _step, one=one: [sum_of(one)], steps=steps, rate=1e-4, name="test")
        assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
        start = dict(other.named_parameters())
        factors = [(p, start[n]) for n, p in one.named_parameters() if n.endswith(".down.weight")]
        moved[steps] = sum((p != q).sum().item() for p, q in factors) / sum(p.numel() for p, _ in factors)
    assert moved[1] < 0.05 < 0.3 < moved[100]


def sum_of(model):
    """A loss of which every factor has a gradient of one sign."""
    return sum(p.sum() for n, p in model.named_parameters() if n.endswith((".down.weight", ".up.weight")))


def test_weights_and_seed_reach_it(monkeypatch):
    """Those the statistics were mixed with; the seed of the call, for both last steps."""
    seen = []
    monkeypatch.setattr(exchange, "distill_", lambda *args, **how: seen.append((args[3], how["seed"])) or [])
    monkeypatch.setattr(exchange, "refine_block_", lambda *_args, **how: seen.append(how["seed"]))
    how = {"windows": [IDS, OTHER], "weights": [1, 4], "ratio": 0.4, "shifted": True, "refine": 2, "distill": 2}
    nsvd.compress_(tiny_model(), method="asvd-1", seed=7, **how)
    assert seen == [7, 7, ([0.2, 0.8], 7)]


def test_best_distils_on_the_text_it_samples():
    report = nsvd.compress_(tiny_model(), method="best", ratio=0.4, distill=2)
    assert report.distill == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "svd", "distill": -1}, "distill is -1"),
        ({"method": "svd", "distill": 2.5, "windows": IDS}, "distill is 2.5"),
        ({"method": "svd", "distill": 2, "windows": IDS[:0]}, r"not \(0, 16\)"),
        ({"method": "svd", "distill": 3}, "distill goes over a text"),
        ({"method": "sola", "distill": 3, "windows": IDS}, "SoLA has no distillation"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    assert_refused(tiny_model(), None, {"ratio": 0.3} | arguments, message)


@pytest.mark.parametrize(("call", "step"), [(2, 1), (16, 2), (20, 4)])
def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was(call, step, monkeypatch):
    """At the beginning, in a step on the way, or in the last one; one rate is tried before, with twelve calls."""
    model = tiny_model()
    monkeypatch.setattr(descent, "SMALLEST", descent.RATE / 2)
    before, calls = state(model), []

    def predicted(model, ids, known=distill._predicted):
        calls.append(len(ids))
        return known(model, ids) * (float("nan") if len(calls) == call else 1.0)

    monkeypatch.setattr(distill, "_predicted", predicted)
    with pytest.raises(FloatingPointError, match=f"distillation: NaN or Inf at step {step} of 4"):
        nsvd.compress_(model, method="svd", ratio=0.5, windows=IDS, distill=4)
    assert_same(before, model)


def test_so_does_a_gradient_that_is_not_finite():
    """The loss itself is fine: the square root of 0."""
    _, model, _ = low_rank()
    with pytest.raises(FloatingPointError, match="test: NaN or Inf at step 1 of 1, at a loss of 0"):
        descend_(model, lambda _step: [(0 * sum_of(model)).abs().sqrt()], steps=1, name="test")


def distance(model, wanted, factor=1.0):
    """A loss with its minimum at the wanted factors; the first layer's counts ``factor`` times."""
    losses = [(p - wanted[n]).square().mean() for n, p in model.named_parameters() if n in wanted]
    return sum(losses) + (factor - 1) * losses[0]


def test_the_rate_is_one_that_the_model_bears():
    """Factors that are nearly right already: large steps lead away from them, small ones towards them."""
    ends = {}
    for way in (descend_, fit_):
        _, model, _ = low_rank()
        near = {n: 1.001 * p.detach() for n, p in model.named_parameters() if n.endswith(".down.weight")}
        begin = distance(model, near).item()
        way(model, lambda step, m=model, w=near: [distance(m, w, factor=1 + step % 2)], steps=6, rate=0.3, name="test")
        ends[way] = distance(model, near).item() / begin
    assert ends[fit_] < 0.5 < 10 < ends[descend_]


def test_factors_that_are_best_already_stay(monkeypatch):
    """No rate lowers the loss; a rate that is not borne is no error."""
    _, model, _ = low_rank()
    here, before = (
        {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(".down.weight")},
        state(model),
    )
    assert fit_(model, lambda _step: [distance(model, here)], steps=3, name="test") == []
    assert_same(before, model)

    def broken_once_moved(_step):
        moved = distance(model, here)
        return [moved / (moved == 0)]

    assert fit_(model, broken_once_moved, steps=3, name="test") == []
    assert_same(before, model)


def test_what_ends_higher_than_it_began_is_put_back(monkeypatch):
    """The trial of a rate was promising, the descent itself was not."""
    _, model, _ = low_rank()
    before, known = state(model), descent.descend_

    def descend_too_far(part, loss, *, steps, **how):
        losses = known(part, loss, steps=steps, **how)
        if steps > descent.TRIED:
            for factor in descent._factors(part):
                factor.detach().mul_(3)
        return losses

    monkeypatch.setattr(descent, "descend_", descend_too_far)
    dense, layers = tiny_model(), nsvd.targets(tiny_model())
    assert distill_(model, layers, [IDS], [1.0], steps=20) == []
    assert_same(before, model)
    assert divergence(model, dense, IDS) > 0


def test_and_an_error_after_it(monkeypatch):
    """When what came out is measured, say for want of memory."""
    model = tiny_model()
    before = state(model)

    def fails(*_args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(exchange.Exchange, "_measure", fails)
    with pytest.raises(torch.OutOfMemoryError):
        nsvd.compress_(model, method="svd", ratio=0.5, windows=IDS, distill=2)
    assert_same(before, model)


def test_modules_are_put_back_whatever_happens():
    model = tiny_model()
    name, layer = next(iter(nsvd.targets(model).items()))
    other = copy.deepcopy(layer)
    seen = []

    def use_and_fail():
        with exchanged(model, {name: other}):
            seen.append(model.get_submodule(name))
            raise KeyError

    with pytest.raises(KeyError):
        use_and_fail()
    assert seen == [other]
    assert model.get_submodule(name) is layer


def test_without_factors_there_is_nothing_to_descend_on():
    def loss(_step):
        raise AssertionError("the loss was asked for")

    assert descend_(tiny_model(), loss, steps=3, name="test") == []


def test_every_window_comes_up_before_any_comes_again():
    order = shuffled(5, 12, seed=1)
    assert len(order) == 12
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order[:5] != order[5:10]
    assert order == shuffled(5, 12, seed=1) != shuffled(5, 12, seed=2)
