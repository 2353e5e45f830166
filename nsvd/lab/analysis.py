"""How activations of different texts differ, and what that does to a compressed layer; tables a row a layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor, nn

from nsvd.compression.prepared import Prepared, check_step
from nsvd.linalg import Decomposition, from_metric, matrix_method, rank_for_ratio
from nsvd.linalg.errors import calibration_loss, condition_number, effective_rank, principal_cosines
from nsvd.linalg.sola import overlap
from nsvd.walk.hooks import watch_inputs
from nsvd.walk.moments import body_forward
from nsvd.walk.statistics import Statistics
from nsvd.walk.stream import windows_read
from nsvd.walk.targets import targets


def place(layer: str) -> dict[str, str | int]:
    """Where a layer is: its name, block number (the first number in the name, −1 without) and kind (the last part)."""
    number = re.search(r"\.(\d+)\.", layer)
    return {"layer": layer, "block": int(number[1]) if number else -1, "kind": layer.rsplit(".", 1)[-1]}


def input_shape(stats: Statistics) -> pd.DataFrame:
    """For every distinct input: channel outliers and the spectrum of its second moment.

    ``outlier`` is the largest channel's root mean square over the median channel's; ``effective_rank`` the exponential of the
    entropy of √λ, ``condition`` λ_max / λ_min, ``top`` the share of tr G that lies in the largest eigenvalue.
    """
    rows = []
    for name, moments in stats.moments.items():
        rms = moments.G.diagonal().sqrt()
        eigenvalues = torch.linalg.eigvalsh(moments.G).clamp(min=0)
        rows.append(
            place(name)
            | {
                "channels": len(rms),
                "outlier": (rms.max() / rms.median()).item(),
                "effective_rank": effective_rank(eigenvalues.sqrt()),
                "condition": condition_number(moments.G),
                "top": (eigenvalues[-1] / eigenvalues.sum()).item(),
            }
        )
    return pd.DataFrame(rows)


def similarity(calibration: Statistics, other: Statistics, *, k: float | None = 0.25) -> pd.DataFrame:
    """How alike the inputs of every layer are on two texts.

    ``mean_abs`` is the cosine between the vectors of mean absolute channel values (all that ASVD-0 sees), ``moment`` the cosine
    between the second moments as vectors, tr(G G') / (‖G‖‖G'‖) (all that ASVD-I sees), and ``subspace`` the mean squared cosine
    of the principal angles between the leading eigenspaces of k · d_in dimensions (k for two random ones); the only one
    that needs eigenvectors, left out where ``k`` is None.
    """
    rows = []
    for name, ours in calibration.moments.items():
        theirs = other[name]
        row = {
            "mean_abs": torch.cosine_similarity(ours.scale(), theirs.scale(), dim=0).item(),
            "moment": torch.cosine_similarity(ours.G.flatten(), theirs.G.flatten(), dim=0).item(),
        }
        if k is not None:
            size = max(1, round(k * len(ours.G)))
            spaces = [torch.linalg.eigh(m.G).eigenvectors[:, -size:] for m in (ours, theirs)]
            row["subspace"] = principal_cosines(*spaces).square().mean().item()
        rows.append(place(name) | row)
    return pd.DataFrame(rows)


@torch.no_grad()
def transfer(
    model: nn.Module, prepared: Mapping[str, Decomposition], texts: Mapping[str, Statistics], ratio: float
) -> pd.DataFrame:
    """What a compression learnt on one text costs on others: a row a layer and text.

    ``error`` is ‖(W − Ŵ) X‖ / ‖W X‖ with Ŵ from ``prepared`` and X of the text, ``optimum`` the same for the best Ŵ of that rank
    on the text itself.
    """
    rows = []
    for name, layer in targets(model).items():
        W = layer.weight.cpu().double()
        k = rank_for_ratio(W.shape[0], W.shape[1], ratio)
        chosen = prepared[name].truncate(k).dense().cpu()
        for text, stats in texts.items():
            G = stats[name].G
            whole = calibration_loss(W, torch.zeros_like(W), G)
            optimum = from_metric(W, G, 0).s[k:].square().sum().item()
            error = max(calibration_loss(W, chosen, G) / whole, 0.0) ** 0.5
            rows.append(place(name) | {"text": text, "error": error, "optimum": (optimum / whole) ** 0.5})
    return pd.DataFrame(rows)


@torch.no_grad()
def nesting(model: nn.Module, prepared: Prepared, text: Statistics, ratio: float, *, k1: float = 0.95) -> pd.DataFrame:
    """What the inner step of NSVD-I changes on a text, a row a layer; ``prepared`` is that of ``asvd-1``.

    ``change`` is ln ‖(W − Ŵ) X‖² of NSVD-I less that of ASVD-I at the same rank, X of the text: below 0 where nesting helps. On the
    calibration text itself it is never below 0, ASVD-I being the minimiser there.

    Raises:
        ValueError: if ``prepared`` is of another outer step or other weights.
    """
    rows, method = [], matrix_method("nsvd-1")
    check_step(prepared, targets(model), method, {})
    for name, layer in targets(model).items():
        W = layer.weight.cpu().double()
        k, one = rank_for_ratio(W.shape[0], W.shape[1], ratio), prepared[name]
        both = (method.cut(one, k, k1=k1), one.truncate(k))
        ours, theirs = (calibration_loss(W, factors.dense(), text[name].G) for factors in both)
        tiny = 1e-12 * max(ours, theirs, 1e-300)  # both are nothing where the text has fewer tokens than k
        rows.append(place(name) | {"change": math.log(max(ours, tiny) / max(theirs, tiny))})
    return pd.DataFrame(rows)


def prime_overlap(texts: Mapping[str, Statistics], layers: Iterable[str], prime: float) -> pd.DataFrame:
    """Share of the prime neurons of one text that are prime on another, too; a row a layer and pair, ``prime`` by chance.

    ``layers`` are those that read neurons, the last of each feed-forward.
    """
    return pd.DataFrame(
        place(layer) | {"ours": a, "theirs": b, "overlap": overlap(texts[a][layer].scale(), texts[b][layer].scale(), prime)}
        for layer in layers
        for a in texts
        for b in texts
    )  # fmt: skip


def rescored(stats: Statistics, scores: Mapping[str, Tensor]) -> Statistics:
    """The same statistics with other numbers, by layer, in the place of the mean |x| that ranks neurons and scales channels."""
    leaders = {stats.inputs[layer]: score for layer, score in scores.items()}
    changed = {leader: replace(stats.moments[leader], mean_abs=score) for leader, score in leaders.items()}
    return replace(stats, moments={**stats.moments, **changed})


@torch.inference_mode(False)
@torch.no_grad()
def largest(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """The largest |x| of every input channel of every target layer on the windows, (d_in,) in float64.

    The ASVD paper's other scales of channels; ``rescored`` puts them in the place of the mean |x|.
    """
    layers, found = targets(model), {}

    def observe(name: str, x: Tensor) -> None:
        peak = x.reshape(-1, x.shape[-1]).abs().amax(0).cpu().double()
        found[name] = torch.maximum(found[name], peak) if name in found else peak

    with watch_inputs(model, layers, observe):
        for ids in windows.split(windows_read(windows.shape[1])):
            body_forward(model, ids)
    return {name: found[name] for name in layers}
