"""Whether a model still runs once its layers are exchanged, and is the same once it is saved and read again."""

import pytest
import torch
from torch import nn

from nsvd.walk.soundness import _as_cast, check_exchanged, predicted
from tests.tiny import tiny_model

UP, DOWN = (f"model.layers.0.mlp.{part}_proj" for part in ("up", "down"))


def test_layers_that_break_the_model_together_are_told_of():
    """No layer does it alone, so the first one is named, and how many there are besides."""

    class Breaks(nn.Linear):
        def forward(self, x):
            together = all(isinstance(model.get_submodule(name), Breaks) for name in (UP, DOWN))
            return super().forward(x) * (float("nan") if together else 1.0)

    model = tiny_model()
    dense, before = {name: model.get_submodule(name) for name in (UP, DOWN)}, predicted(model)
    for name, layer in dense.items():
        other = Breaks(layer.in_features, layer.out_features, bias=layer.bias is not None)
        other.load_state_dict(layer.state_dict())
        model.set_submodule(name, other)
    with pytest.raises(FloatingPointError, match=rf"layer {UP} and 1 others: once they are exchanged, .*NaN"):
        check_exchanged(model, dense, before)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_buffers_that_were_cast_twice_are_those_of_the_model(dtypes):
    """What float16 makes coarser, and what is rounded twice; back in float32."""
    model, again = tiny_model(), tiny_model()
    for one in (model, again):
        one.register_buffer("beside", torch.linspace(1e-6, 1.0, 999), persistent=False)
    for dtype in (*dtypes, torch.float32):
        model.beside = model.beside.to(dtype)
    _as_cast(again, model)
    assert torch.equal(again.beside, model.beside)
