"""The last step fits the factors of each block to the dense block's output, and touches nothing else."""

import copy

import pytest
import torch

import nsvd
from nsvd.linalg import METHODS
from nsvd.model import compress
from nsvd.model.refine import _error, refine_block_
from nsvd.model.shifted import replace_in_order_
from tests.tiny import assert_refused, float32, tiny_model, token_ids  # noqa: F401

IDS = token_ids(12, 16)


def blocks_before_and_after(model, H, steps=40):
    """The error of every block before and after it is refined, and all that is not a factor."""
    errors, metric = [], None if H is None else H.float()

    def finish(index, block, batches):
        before = sum(_error(block, index, item, metric).item() for item in batches)
        others = {n: p.clone() for n, p in block.named_parameters() if ".down." not in n and ".up." not in n}
        flags = {n: p.requires_grad for n, p in block.named_parameters()}
        refine_block_(block, index, batches, metric, steps=steps)
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

    for name in ("targets", "check_weights", "own_text", "take_statistics", "check_statistics"):
        monkeypatch.setattr(compress, name, costly)
    windows = None if message == "pass windows=" else IDS
    assert_refused(tiny_model(), None, {"ratio": 0.3, "windows": windows} | arguments, message)
    with pytest.raises(AssertionError, match="something was computed"):
        nsvd.compress_(tiny_model(), windows=IDS, method="ridge", ratio=0.3, shifted=True, refine=5)
