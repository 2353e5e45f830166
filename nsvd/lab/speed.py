"""How fast factors are beside the dense layer that they replace: measured on the device at hand, in the model's dtype."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nsvd.linalg.factors import FACTORS, check_factors, rank_for_ratio, saves_parameters
from nsvd.stored.layers import CompressedLayer, LowRankLinear, PivotedLinear
from nsvd.walk.targets import targets

if TYPE_CHECKING:
    import pandas as pd

TOKENS = (1, 512)  # decoding and reading a prompt
RATIOS = (0.05, 0.2, 0.5)
COLD = (
    2**24
)  # bytes of weights that are used in turn where there are few tokens: no core's own cache holds them, as in a model
ROUNDS = 5
COPIES = 64  # of a layer at most: those of a small model are many
KEPT = 0.97  # of the dense layer's speed counts as no slower: a measurement is no better than that
_KIND = {"plain": LowRankLinear, "pivoted": PivotedLinear}


def seconds(function: Callable[[], object], device: str | torch.device) -> float:
    """How long one call takes, the work it leaves to a GPU included."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def speed(
    model: nn.Module,
    *,
    factors: Iterable[str] = FACTORS,
    tokens: Iterable[int] = TOKENS,
    ratios: Iterable[float] = RATIOS,
) -> pd.DataFrame:
    """How fast factors are beside the dense layer, for every shape of layer that can be compressed or is.

    There is a row for each shape, way to store factors and number of tokens. ``dense`` is the dense layer's time in microseconds.
    The column of a ratio tells how many times as fast the factors are that remove that ratio. ``rank`` is the largest rank at which
    factors are no slower; 0 where no rank that saves parameters is. The factors hold random numbers: their values do not matter.
    """
    import pandas as pd

    shapes, device, dtype = _shapes(model)
    rows = []
    for (d_out, d_in), names in shapes.items():
        for way in factors:
            ranks = {}
            for ratio in ratios:
                with suppress(ValueError):  # not even rank 1 is left
                    ranks[ratio] = rank_for_ratio(d_out, d_in, ratio, way)
            for count in tokens:
                found = {k: _against(d_out, d_in, k, way, count, device, dtype) for k in ranks.values()}
                row = {"d_out": d_out, "d_in": d_in, "layers": len(names), "factors": way, "tokens": count}
                row |= {"dense": 1e6 * min((dense for dense, _ in found.values()), default=0.0)}
                row |= {ratio: found[k][1] for ratio, k in ranks.items()}
                rows.append(row | {"rank": break_even({k: times for k, (_, times) in found.items()})})
    return pd.DataFrame(rows)


def faster(
    model: nn.Module, ranks: Mapping[str, int], *, factors: str = "plain", tokens: Iterable[int] = TOKENS
) -> dict[str, int]:
    """Those of the ranks at which factors are no slower than the dense layer here, for every number of tokens.

    Give the result to ``compress_`` as ``ranks``: layers that it does not name stay dense, so fewer parameters are removed. Which
    these are is measured: another machine may keep others.

    Raises:
        ValueError: unknown factors, or a layer that the model does not have.
    """
    check_factors(factors)
    layers, (_, device, dtype) = targets(model), _shapes(model)
    known: dict[tuple[int, ...], bool] = {}
    for name, k in ranks.items():
        if name not in layers:
            raise ValueError(f"no layer {name!r} to compress")
        d_out, d_in = layers[name].weight.shape
        case = (d_out, d_in, k)
        if case not in known:
            times = (_against(d_out, d_in, k, factors, count, device, dtype)[1] for count in tokens)
            known[case] = saves_parameters(d_out, d_in, k, factors) and all(one >= KEPT for one in times)
    return {name: k for name, k in ranks.items() if known[*layers[name].weight.shape, k]}


def compressed(model: nn.Module) -> dict[str, CompressedLayer]:
    """The layers that are compressed, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, CompressedLayer)}


def dense(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that could be compressed and are not, by name; none where all are."""
    try:
        return targets(model)
    except ValueError:
        if compressed(model):
            return {}
        raise


def slower(model: nn.Module, table: pd.DataFrame) -> list[str]:
    """The compressed layers of the model that are slower than dense ones by a table of ``speed``, for any number of tokens."""
    least: Any = table.groupby(["d_out", "d_in", "factors"])["rank"].min()
    ranks = least.to_dict()
    found = []
    for name, layer in compressed(model).items():
        for way, kind in _KIND.items():
            case = (layer.out_features, layer.in_features, way)
            if isinstance(layer, kind) and case in ranks and layer.rank > ranks[case]:
                found.append(name)
    return found


def break_even(times: Mapping[int, float]) -> int:
    """The rank up to which factors are no slower, from how many times as fast they are at some ranks; 0 where they never are.

    Between two ranks a straight line is drawn.
    """
    rank = 0
    for k, now in sorted(times.items()):
        if now < KEPT:
            before = times.get(rank)
            return rank if before is None else int(rank + (k - rank) * (before - KEPT) / (before - now))
        rank = k
    return rank


def _shapes(model: nn.Module) -> tuple[dict[tuple[int, int], list[str]], torch.device, torch.dtype]:
    """The names of the layers of each shape (d_out, d_in), and where and in what dtype the model computes."""
    layers = dense(model) | compressed(model)
    shapes: dict[tuple[int, int], list[str]] = {}
    for name, layer in layers.items():
        shapes.setdefault((layer.out_features, layer.in_features), []).append(name)
    first = next(model.parameters())
    return shapes, first.device, first.dtype


@torch.inference_mode()
def _against(
    d_out: int, d_in: int, k: int, factors: str, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds of the dense layer, and how many times as fast the factors are: medians over rounds in which they take turns."""
    empty = nn.Linear(d_in, d_out, bias=False, device="meta", dtype=dtype)
    copies = min(max(1, COLD // (empty.weight.nbytes * tokens)), COPIES)
    layers = [[_filled(one, device) for _ in range(copies)] for one in (empty, _KIND[factors].like(empty, rank=k))]
    x = torch.full((1, tokens, d_in), 0.01, device=device, dtype=dtype)
    rounds = []
    for _ in range(ROUNDS + 1):
        rounds.append([seconds(lambda some=some: [layer(x) for layer in some], device) for some in layers])
    dense, times = zip(*((one, one / other) for one, other in rounds[1:]), strict=True)  # the first only warms up
    return statistics.median(dense) / copies, statistics.median(times)


def _filled(layer: nn.Module, device: torch.device) -> nn.Module:
    """A copy of an empty layer with numbers, the outputs in random order where it has one."""
    made = copy.deepcopy(layer).to_empty(device=device)
    for parameter in made.parameters():
        parameter.fill_(0.01)
    for order in made.buffers():
        order.copy_(torch.randperm(len(order)))
    return made
