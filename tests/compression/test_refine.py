"""The last step fits the factors of each block to the dense block's output, and touches nothing else."""

import copy

import pytest
import torch

import nsvd
from nsvd.compression import compress
from nsvd.compression.refine import _error, refine_block_
from nsvd.linalg import METHODS
from tests.compression.test_ordered import replace_in_order_
from tests.tiny import LATE_WINDOW, assert_refused, float32, tiny_model, token_ids  # noqa: F401

IDS = token_ids(12, 16)


def blocks_before_and_after(model, H, steps=40):
    """The error of every block before and after it is refined, and all that is not a factor."""
    errors, metric = [], None if H is None else H.float()

    def finish(followed):
        index, block, batches = followed.index, followed.block, followed.batches
        before = sum(_error(block, index, item, metric).item() for item in batches)
        others = {n: p.clone() for n, p in block.named_parameters() if ".down." not in n and ".up." not in n}
        flags = {n: p.requires_grad for n, p in block.named_parameters()}
        refine_block_(followed, metric, steps=steps)
        assert all(torch.equal(dict(block.named_parameters())[n], p) for n, p in others.items())
        assert {n: p.requires_grad for n, p in block.named_parameters()} == flags
        errors.append((before, sum(_error(block, index, item, metric).item() for item in batches)))

    def low(name, target, moments):
        layer = model.get_submodule(name)
        return nsvd.LowRankLinear.from_factors(layer, METHODS["ridge"](target, moments, 8))

    replace_in_order_(model, [IDS], list(nsvd.targets(model)), low, mu=0.03, finish=finish, batch=4)
    return errors


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    "weigh", [None, lambda d: torch.diag(torch.linspace(0.1, 2, d)), lambda d: torch.linspace(0.1, 2, d)]
)
def test_every_block_comes_nearer_to_what_the_dense_one_gave_out(family, weigh):
    """In the metric asked for; norms, biases and flags stay."""
    model = tiny_model(family)
    errors = blocks_before_and_after(model, weigh and weigh(model.config.hidden_size))
    assert len(errors) == 2
    assert all(after < 0.95 * before for before, after in errors)


def test_every_block_is_called_with_its_own_arguments():
    """Where nothing has changed nothing is missing, also in blocks that look less far back than the first."""
    model, errors = tiny_model("qwen2", **LATE_WINDOW), []

    def finish(followed):
        errors.extend(_error(followed.block, followed.index, item, None).item() for item in followed.batches)

    same_layer = lambda name, _target, _moments: model.get_submodule(name)  # noqa: E731
    replace_in_order_(model, [IDS], list(nsvd.targets(model)), same_layer, mu=0.03, finish=finish)
    assert len(errors) == 3
    assert max(errors) < 1e-10


def test_a_matrix_and_its_diagonal_are_one_metric():
    model = tiny_model()
    d = torch.linspace(0.1, 2, model.config.hidden_size)
    whole, vector = (blocks_before_and_after(copy.deepcopy(model), H, steps=3) for H in (torch.diag(d), d))
    torch.testing.assert_close(torch.tensor(whole), torch.tensor(vector), rtol=1e-3, atol=0)


@pytest.mark.parametrize("factors", ["plain", "pivoted"])
def test_the_recipe_can_end_with_it(factors):
    """In the model's own precision, reported and stored, and by its own seed reproducible."""
    made = []
    for _ in range(2):
        model = tiny_model(dtype=torch.bfloat16)
        report = nsvd.compress_(model, method="best", ratio=0.3, windows=IDS, factors=factors, refine=3)
        assert (report.refine, report.ratio_reached >= 0.3) == (3, True)
        assert model.dtype == torch.bfloat16
        made.append(model.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ridge", "refine": 5}, "refine goes with shifted"),
        ({"method": "ridge", "refine": -1}, "refine is -1"),
        ({"method": "ridge", "refine": -1, "shifted": True}, "refine is -1"),
        ({"method": "ridge", "shifted": True}, "pass windows="),
        ({"method": "sola", "refine": 5}, "SoLA has no refinement"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_computed(arguments, message, monkeypatch):
    """No statistics are taken, no text is sampled, no weight is even looked at; the model is left alone."""

    def costly(*_args, **_how):
        raise AssertionError("something was computed")

    for name in ("chosen_layers", "check_values", "predicted", "own_text", "take_statistics", "check_statistics"):
        monkeypatch.setattr(compress, name, costly)
    windows = None if message == "pass windows=" else IDS
    assert_refused(tiny_model(), None, {"ratio": 0.3, "windows": windows} | arguments, message)
    with pytest.raises(AssertionError, match="something was computed"):
        nsvd.compress_(tiny_model(), windows=IDS, method="ridge", ratio=0.3, shifted=True, refine=5)


def test_the_reported_errors_are_those_of_what_was_refined():
    """Relative to the layer's own weight, measured on the model that comes out; without refinement they are others."""
    tables = []
    for steps in (0, 20):
        model, dense = tiny_model(), nsvd.targets(tiny_model())
        stats = nsvd.calibrate(model, IDS)
        report = nsvd.compress_(model, stats, method="ridge", ratio=0.3, windows=IDS, shifted=True, refine=steps)
        tables.append(report.table.set_index("layer"))
        for name, layer in dense.items():
            W, G = layer.weight.detach().double(), stats[name].G
            D = W - model.get_submodule(name).dense().detach().double()
            row = tables[-1].loc[name]
            assert row.weight_error == pytest.approx((D.norm() / W.norm()).item(), rel=1e-4)
            error = (torch.trace(D @ G @ D.mT) / torch.trace(W @ G @ W.mT)).sqrt().item()
            assert row.calibration_error == pytest.approx(error, rel=1e-4)
    assert ((tables[0].weight_error - tables[1].weight_error).abs() > 1e-4).all()


def test_statistics_of_some_layers_are_enough_to_refine_these():
    """Where the last layer of a block is not among them, errors are weighed all alike; other blocks are left alone."""
    ranks = {"model.layers.0.self_attn.q_proj": 8}
    few = nsvd.calibrate(tiny_model(), IDS, layers=list(ranks))
    few = few.with_gradients(nsvd.fisher(tiny_model(), IDS, layers=list(ranks)))
    all_alike = nsvd.calibrate(tiny_model(), IDS).with_gradients(few.gradients)
    made = []
    for stats in (few, all_alike):
        made.append(tiny_model())
        nsvd.compress_(made[-1], stats, method="kfac", ranks=ranks, windows=IDS, shifted=True, refine=3)
    first, second = (model.state_dict() for model in made)
    assert all(torch.equal(first[name], second[name]) for name in first)
    untouched = tiny_model().state_dict()
    assert {name for name in untouched if name not in first or not torch.equal(first[name], untouched[name])} == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
    }
