"""Fine-tuning after a compression: what is trained, what stays, and what is kept on the way."""

import random
import re

import numpy as np
import pytest
import torch

import nsvd
from nsvd.lab.recovery import HAS_PEFT, fine_tuned
from nsvd.stored.layers import CompressedLayer
from tests.tiny import compressed, tiny_model, token_ids

HOW = {"batch": 2, "rate": 1e-2}
WAYS = [0, pytest.param(2, marks=pytest.mark.skipif(not HAS_PEFT, reason="needs PEFT: pip install peft"))]


def moved(before, after) -> set[str]:
    """The parameters that differ."""
    now = dict(after.named_parameters())
    return {name for name, value in before.named_parameters() if not torch.equal(value, now[name])}


@pytest.mark.parametrize("adapters", WAYS)
def test_factors_alone_are_trained_and_text_gets_likelier(adapters, capfd):
    """The model itself stays, biases too; nothing is said; the same seed gives the same copies."""
    model, ids = compressed(tiny_model(), method="asvd-1"), token_ids(4, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = fine_tuned(model, ids, steps=[2, 12], adapters=adapters, **HOW)
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == set()
    layers = [name for name, module in model.named_modules() if isinstance(module, CompressedLayer)]
    factors = {f"{name}.{part}.weight" for name in layers for part in ("up", "down")}
    assert list(made) == [2, 12]
    assert moved(model, made[2]) == moved(model, made[12]) == factors
    assert made[12].state_dict().keys() == model.state_dict().keys()
    losses = [nsvd.evaluate(one, ids).nll for one in (model, made[2], made[12])]
    assert losses == sorted(losses, reverse=True)
    assert capfd.readouterr().out == ""
    again = fine_tuned(model, ids, steps=[12], adapters=adapters, **HOW)[12]
    assert moved(again, made[12]) == set()


@pytest.mark.parametrize("adapters", WAYS)
def test_random_numbers_of_others_are_left_alone(adapters):
    """Trainer sets seeds of its own."""
    model, ids = compressed(tiny_model(), method="asvd-1"), token_ids(4, 16)

    def drawn():
        return random.random(), np.random.random(), torch.rand(1).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before = drawn()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    fine_tuned(model, ids, steps=[1], adapters=adapters, **HOW)
    assert drawn() == before


@pytest.mark.parametrize("steps", [[], [0], [3, -1]])
def test_there_is_a_step_to_copy_after(steps):
    with pytest.raises(ValueError, match=rf"steps are whole numbers from 1, not {re.escape(str(steps))}"):
        fine_tuned(compressed(tiny_model()), token_ids(4, 16), steps=steps, **HOW)


def test_of_a_dense_model_the_target_layers_are_trained():
    model = tiny_model()
    made = fine_tuned(model, token_ids(4, 16), steps=[1], **HOW)[1]
    assert moved(model, made) == {f"{name}.weight" for name in nsvd.targets(model)}


@pytest.mark.skipif(HAS_PEFT, reason="PEFT is here")
def test_adapters_without_peft_are_refused():
    with pytest.raises(ModuleNotFoundError, match="peft"):
        fine_tuned(compressed(tiny_model()), token_ids(4, 16), steps=[1], adapters=2, **HOW)
