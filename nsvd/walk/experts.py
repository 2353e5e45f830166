"""Experts on a walk: apart as linear layers, and what is known of those that few tokens reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import nn

from nsvd.linalg import Moments
from nsvd.stored.experts import WITHIN, ExpertsApart, are_experts, put_together, take_apart
from nsvd.stored.layers import CompressedLayer
from nsvd.stored.transposed import linear_at
from nsvd.walk.sums import Sums
from nsvd.walk.text import TRIED


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """In the context experts that are tensors of three dimensions are linear layers, see ``nsvd.stored.experts``.

    Afterwards those of which no layer is compressed are what they were. Left alone are experts of another form, those that give
    out something else when they are apart (a few random tokens tell), and those in blocks that lie in files.
    """
    found = {}
    try:
        for module in list(model.modules()):
            if are_experts(module) and (whole := _tried(module)) is not None:
                found[module] = whole
        yield
    finally:
        for module, whole in found.items():
            if not any(isinstance(layer, CompressedLayer) for layer in module.layers()):
                put_together(module, whole)
                continue
            for layer in module.layers():
                if isinstance(layer, nn.Linear):  # it is dense, and looks into a parameter that is to go
                    for parameter in layer.parameters():
                        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


@contextmanager
def sent_to_all(model: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """In the context every token runs through the experts that these layers are parts of; other layers are none of its business.

    What the experts give out stays the same, to rounding.
    """
    numbers: dict[str, set[int]] = {}
    for name in of_experts(model, layers):
        path, number, _ = name.rsplit(".", 2)
        numbers.setdefault(path, set()).add(int(number))
    with ExitStack() as stack:
        for path, some in numbers.items():
            send = lambda _m, args, kwargs, some=some: (args, kwargs | {"everyone": some})  # noqa: E731
            handle = model.get_submodule(path).register_forward_pre_hook(send, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def of_experts(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Those of the layers that are parts of experts, of which each sees its own tokens."""
    inside = {name: WITHIN.fullmatch(name) for name in layers}
    return [n for n, found in inside.items() if found and isinstance(model.get_submodule(found[1]), ExpertsApart)]


def scarce(model: nn.Module, sums: Sequence[Mapping[str, Sums]]) -> dict[str, str]:
    """The layers of experts that saw fewer tokens than they have inputs, and of each the layer whose inputs stand for all tokens.

    That is the layer itself, but for the first ones of experts that read the same: one of these stands for all.
    """
    found, first = {}, {}
    for name in of_experts(model, sums[0]):
        if any(one[name].n < linear_at(model, name).in_features for one in sums):
            path, number, part = name.rsplit(".", 2)
            found[name] = first.setdefault((path, number if part == "down" else "", part), name)
    return found


def unreached(model: nn.Module, sums: Sequence[Mapping[str, Sums]]) -> dict[str, int]:
    """How many experts (``count``) these layers are parts of, and how many of them no token of any domain has reached."""
    tokens: dict[str, int] = {}
    for name in of_experts(model, sums[0]):
        expert = name.rpartition(".")[0]
        tokens[expert] = tokens.get(expert, 0) + sum(one[name].n for one in sums)
    return {"count": len(tokens), "unreached": sum(not n for n in tokens.values())}


def filled(own: Sums, every: Moments) -> Moments:
    """Moments of an expert's own tokens, filled up with the mean of all that enter the block until they are as many as the inputs.

    With n tokens of its own and d inputs, G = (n G_own + (d − n) G_every) / d. An expert that no token reaches has G_every, one of
    d tokens or more its own alone.
    """
    d = len(every.G)
    if own.n >= d:
        return own.result()
    if not own.n:
        return Moments(every.G, every.mean_abs, d)
    share, mine = own.n / d, own.result()
    G, mean_abs = (share * a + (1 - share) * b for a, b in ((mine.G, every.G), (mine.scale(), every.scale())))
    return Moments(G, mean_abs, d)


@torch.inference_mode(False)
@torch.no_grad()
def _tried(experts: nn.Module) -> dict[str, nn.Parameter] | None:
    """Take experts apart, unless they have no numbers or give out something else then: their parameters, or None."""
    first = next(experts.parameters())
    if first.is_meta:
        return None
    count, d = len(first), first.shape[1 if experts.is_transposed else 2]
    x = torch.randn(TRIED, d, generator=torch.Generator().manual_seed(0)).to(first)
    index = torch.arange(2 * TRIED, device=first.device).view(TRIED, 2) % count
    weights = torch.tensor([0.7, 0.3]).expand(TRIED, 2).to(first)
    try:
        wanted = experts(x, index, weights)
    except Exception:  # whatever they need, they are of another form
        return None
    whole = take_apart(experts)
    try:
        said = experts(x, index, weights)
        same = (said - wanted).norm() <= torch.finfo(x.dtype).eps ** 0.5 * wanted.norm()
    except Exception:
        same = False
    if not same:
        put_together(cast(ExpertsApart, experts), whole)
    return whole if same else None
