"""The measurements of LEMS: how far the model moves when one layer alone is cut to a small rank. See ``nsvd.linalg.lems``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.compression.measure import is_mine, naming, owners
from nsvd.compression.strs import Text, stand_ins
from nsvd.linalg import Decomposition, matrix_method
from nsvd.linalg.factors import largest_rank
from nsvd.linalg.lems import PROBED
from nsvd.linalg.precision import home
from nsvd.walk.hooks import evaluating, exchanged
from nsvd.walk.loss import check_text, divergence_of
from nsvd.walk.processes import gathered
from nsvd.walk.targets import among, shape_of
from nsvd.walk.text import tokens_at_once

TEMPERATURE = 0.6  # of both models' predictions
FROM = 256  # the first position that counts; of windows that are shorter than twice as long, from half-way on


class Probes(NamedTuple):
    """Of every layer the rank that it was cut to and the divergence, in nats a token; and how many tokens were read for them."""

    measured: dict[str, tuple[int, float]]
    tokens: int


@torch.inference_mode(False)
@torch.no_grad()
def probes(
    model: nn.Module,
    windows: Tensor,
    prepared: Mapping[str, Decomposition],
    *,
    method: str,
    factors: str = "plain",
    kept: float = PROBED,
    progress: bool = False,
    **options: float,
) -> Probes:
    """KL(p_dense ‖ p) of the next token on ``windows`` (count, length), each layer alone cut to a kept fraction of its parameters.

    The blocks before a layer do not run again. Afterwards, also when something raises, the model is what it was. Where a
    method has no rank so small, its smallest one is taken. Several processes deal the layers.

    Raises:
        ValueError: windows that the model cannot read; a model that cannot be run block by block.
        FloatingPointError: a divergence is NaN or Inf; the layer is named.
    """
    chosen, layers = matrix_method(method), among(model, prepared)
    check_text(model, windows)
    text, owner, found = Text(model, windows), owners(model, layers), {}
    for name, layer in tqdm(layers.items(), "divergences", disable=not progress, leave=False):
        if is_mine(owner, name):
            with naming(name):
                k = max(chosen.least_rank(options), largest_rank(*shape_of(layer), 1 - kept, factors))
                value = chosen.cut(prepared[name].to(home(layer.weight)), k, **options)
                with exchanged(model, stand_ins(model, {name: value})):
                    found[name] = k, divergence(text, name)
    found = {name: one for some in gathered(found) for name, one in some.items()}
    return Probes({name: found[name] for name in layers}, text.count * len(layers))


def divergence(text: Text, name: str, temperature: float = TEMPERATURE) -> float:
    """Nats a token between what the dense model said to the text and what the model says where a layer has changed.

    Only positions from ``FROM`` on count, which have read something.
    """
    decoder, length = text.decoder, text.windows.shape[1]
    index, first, total = decoder.index(name), min(FROM, length // 2), 0.0
    with evaluating(text.model):
        for (item, hidden), dense in zip(text.before(index), text.stream.hidden, strict=True):
            hidden = hidden.to(decoder.device)
            for number in range(index, len(decoder)):
                hidden = decoder.run(number, hidden, item.calls[number])
            step = max(1, tokens_at_once(text.model) // (2 * len(item.ids)))
            for start in range(first, length, step):
                part = slice(start, start + step)
                p, q = (decoder.logits(item.ids[:, part], h[:, part].to(decoder.device)) for h in (dense, hidden))
                total += divergence_of(p, q, temperature).item()
    total /= len(text.windows) * (length - first)
    if not total < float("inf"):
        raise FloatingPointError("the divergence from the dense model is NaN or Inf")
    return total
