"""Places inside a block: what arrives there, and the last place where a layer's output arrives unchanged as a summand.

The *landmark* of a layer is the last place in the block that moves by exactly what the layer's output is moved by. For a projection
that is added to the residual stream this is the stream after the addition, for others the layer's own output. Landmarks are
found by trying, not by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from nsvd.walk.decoder import Call, run_block
from nsvd.walk.hooks import as_float32, evaluating, in_float32, watch_calls, watch_inputs


class _Reached(Exception):
    """Ends a forward pass at the layer that was waited for."""


def check_every_token(model: nn.Module, leaders: Mapping[str, str], ids: Tensor) -> None:
    """Raise ``ValueError`` naming a layer that does not see every token: two streams of its inputs could not be compared."""
    seen = dict.fromkeys(leaders.values(), 0)
    with evaluating(model), watch_inputs(model, seen, lambda name, x: seen.__setitem__(name, x.numel() // x.shape[-1])):
        model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    for name, count in seen.items():
        if count != ids.numel():
            raise ValueError(
                f"layer {name} sees {count} of {ids.numel()} tokens, as experts do, so its inputs cannot be followed: "
                "shifted=False compresses it for the inputs of the dense model"
            )


def value_at(place: nn.Module | None, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The input of a module of the block, which is run no further than that; None is the block's output."""
    if place is None:
        return run_block(block, hidden, call)

    seen: list[Tensor] = []

    def reached(_name: str, x: Tensor) -> None:
        seen.append(x)
        raise _Reached

    with watch_inputs(place, [""], reached), suppress(_Reached):
        run_block(block, hidden, call)
    if seen:
        return seen[0]
    raise RuntimeError("a module that ran before did not run again")


def landmark(block: nn.Module, layer: nn.Module, hidden: Tensor, call: Call) -> nn.Module | None:
    """The last module whose input, or None if the block's output, moves by exactly what the layer's output is moved by.

    Where there is none it is the layer itself. Tried in float32, whatever the model's dtype: rounding would hide the equality.
    """
    hidden, moves = as_float32(hidden), []
    call = Call(as_float32(call.args), as_float32(call.kwargs))

    def move(_module: nn.Module, _args: tuple, out: Tensor) -> Tensor:
        moves.append(out.flip(-1) if out.any() else torch.ones_like(out))  # some direction of the output's own size
        return out + moves[0]

    with in_float32(block):
        plain = arrivals(block, hidden, call)
        handle = layer.register_forward_hook(move)
        try:
            moved = arrivals(block, hidden, call)
        finally:
            handle.remove()
    close = 1e-3 * moves[0].norm()
    for place in reversed(plain):
        if place in moved and plain[place].shape[-1] == moves[0].shape[-1] and plain[place].numel() == moves[0].numel():
            step = (moved[place] - plain[place]).reshape(moves[0].shape)  # some blocks lay all tokens in one row
            if (step.to(moves[0].device) - moves[0]).norm() <= close:
                return place
    return layer


def arrivals(
    block: nn.Module, hidden: Tensor, call: Call, places: set[nn.Module | None] | None = None
) -> dict[nn.Module | None, Tensor]:
    """The inputs of modules of the block, by default all, in the order they run; at last, under None, the block's output."""
    inputs: dict[nn.Module | None, Tensor] = {}
    inner = {name: m for name, m in block.named_modules() if m is not block and (places is None or m in places)}

    def observe(name: str, args: tuple, _kwargs: dict) -> None:
        if args and isinstance(args[0], Tensor):
            inputs.setdefault(inner[name], args[0])  # the first, where a module runs again

    with watch_calls(block, inner, observe):
        out = run_block(block, hidden, call)
    return inputs | {None: out}
