"""Second moments and mean absolute values of every layer's inputs, in one pass over the calibration text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nsvd.linalg import Moments, rank_for_ratio
from nsvd.linalg.moments import mixing
from nsvd.linalg.worst_case import worst_case_weights
from nsvd.stored.files import short_name
from nsvd.walk.experts import experts_apart, sent_to_all
from nsvd.walk.hooks import evaluating, watch_inputs
from nsvd.walk.lazy import weight_of
from nsvd.walk.processes import same
from nsvd.walk.soundness import first_broken
from nsvd.walk.statistics import Statistics
from nsvd.walk.sums import Sums
from nsvd.walk.targets import targets
from nsvd.walk.text import check_readable, check_token_ids

WEIGHTS = ("uniform", "worst-case")  # of several domains, by name


def mix(
    domains: Sequence[Statistics],
    weights: Sequence[float] | str = "uniform",
    *,
    model: nn.Module | None = None,
    ratio: float | None = None,
) -> Statistics:
    """Statistics of several domains as one metric: G = c Σ_d w_d G_d / mean(diag G_d), Σ_d w_d = 1.

    c = Σ_d w_d mean(diag G_d) gives the metric the average scale back; mean absolute values are mixed alike, and gradients,
    where all domains have them, averaged with these weights.

    Args:
        domains: statistics of the same layers, from any texts, the model's own among them.
        weights: ``uniform``; a number for each domain; or ``worst-case``, for which the largest of the domains' losses is smallest
            once ``ratio`` of the ``model``'s parameters are removed, see ``nsvd.linalg.worst_case``.
        model: what the statistics were taken from; for ``worst-case`` only.
        ratio: fraction of the parameters removed, the same from every layer; for ``worst-case`` only.

    Raises:
        ValueError: statistics alone in place of a list; not one weight for each domain, a negative one or all 0; an unknown
            name; ``worst-case`` without model and ratio; different layers.
    """
    if isinstance(domains, Statistics):
        raise ValueError("mix takes a list of statistics, one for each text; this is one alone")
    check_mixture(weights, len(domains))
    first = domains[0]
    if any(other.inputs != first.inputs for other in domains):
        raise ValueError("the statistics to mix are not of the same layers")
    shares = _worst_case(domains, model, ratio) if weights == "worst-case" else shares_of(weights, len(domains))
    moments = {name: mixed([d.moments[name] for d in domains], shares) for name in first.moments}
    gradients = {}
    if all(d.gradients for d in domains):
        gradients = {
            name: cast(Tensor, sum(w * d.gradients[name] for w, d in zip(shares, domains, strict=True)))
            for name in first.gradients
        }
    return Statistics(moments, first.inputs, {"mixed": [d.origin for d in domains], "weights": shares}, gradients)


def shares_of(weights: Sequence[float] | str, count: int) -> list[float]:
    """Weights of sum 1 for so many domains, from ``uniform`` or numbers."""
    numbers = [1.0] * count if weights == "uniform" else cast(Sequence[float], weights)
    return [w / sum(numbers) for w in numbers]


def check_mixture(weights: Sequence[float] | str, count: int) -> None:
    """Raise ``ValueError`` unless these can be the weights of so many domains."""
    if isinstance(weights, str):
        if weights not in WEIGHTS:
            raise ValueError(
                f"unknown weights {weights!r}; there are {', '.join(WEIGHTS)}, or a number for each domain"
            )
        weights = [1.0] * count
    if len(weights) != count or not count or not all(0 <= w < float("inf") for w in weights) or not any(weights):
        raise ValueError(f"{count} domains and the weights {list(weights)}: give one weight, not negative, for each")


def mixed(parts: Sequence[Moments], shares: Sequence[float]) -> Moments:
    """The moments of several domains as one, with weights of sum 1; see ``mix``."""
    scales = mixing([m.G.diagonal().mean() for m in parts], shares)
    G = cast(Tensor, sum(a * m.G for a, m in zip(scales, parts, strict=True)))
    mean_abs = cast(Tensor, sum((w * a).sqrt() * m.scale() for w, a, m in zip(shares, scales, parts, strict=True)))
    return Moments(G, mean_abs, sum(cast(int, m.n) for m in parts))


def _worst_case(domains: Sequence[Statistics], model: nn.Module | None, ratio: float | None) -> list[float]:
    if model is None or ratio is None:
        raise ValueError(
            "worst-case weights are those of a model with some of its parameters removed: give model and ratio"
        )
    layers = []
    with experts_apart(model):
        for name, layer in targets(model).items():
            if name in domains[0]:
                d_out, d_in = layer.weight.shape
                layers.append((name, [d[name].G for d in domains], rank_for_ratio(d_out, d_in, ratio)))
        return same(worst_case_weights(_Weighed(model, layers)).weights)


class _Weighed(Sequence):
    """(W, one G for each domain, rank) of layers known by name; a weight is read when its layer is asked for."""

    def __init__(self, model: nn.Module, layers: list[tuple[str, list[Tensor], int]]):
        self.model, self.layers = model, layers

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> tuple[Tensor, list[Tensor], int]:
        name, grams, rank = self.layers[index]
        return weight_of(self.model, name), grams, rank


@torch.inference_mode(False)
@torch.no_grad()
def shared_inputs(model: nn.Module, names: Iterable[str], ids: Tensor) -> dict[str, str]:
    """For each layer the first layer, in forward order, that reads the same input tensor.

    Found by watching which tensor arrives during one short pass; no architecture is known by name.
    """
    seen: list[tuple[str, Tensor, int]] = []
    first: dict[str, str] = {}

    def observe(name: str, x: Tensor) -> None:
        for leader, other, version in seen:
            if x.data_ptr() == other.data_ptr() and x.shape == other.shape and x._version == version == other._version:
                first.setdefault(name, leader)
                return
        seen.append((name, x, x._version))  # held until the pass is over, so that no address is used twice
        first.setdefault(name, name)

    with watch_inputs(model, names, observe):
        body_forward(model, ids)
    return first


def readers(model: nn.Module, names: Iterable[str], texts: Iterable[Tensor]) -> dict[str, str]:
    """``shared_inputs`` on as many of the texts as it takes to reach every layer: an expert may see few of the tokens."""
    names, first = list(names), {}
    with sent_to_all(model, names):
        for ids in texts:
            missing = [name for name in names if name not in first]
            if not missing:
                break
            first |= shared_inputs(model, missing, ids)
    return first


def check_names(model: nn.Module, layers: Iterable[str]) -> None:
    """Raise ``ValueError`` for the first name that no module of the model has."""
    known = {name for name, _ in model.named_modules()}
    for name in layers:
        if name not in known:
            raise ValueError(f"the model has no layer {name!r}")


def inputs_of(model: nn.Module, names: Sequence[str], windows: Tensor, batch: int) -> dict[str, str]:
    """As ``readers``, on the windows; raises ``ValueError`` if none of them reaches a layer."""
    inputs = readers(model, names, (windows[:1, :8], *windows.split(batch)))
    silent = [name for name in names if name not in inputs]
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(names)} layers saw no input, first {silent[0]}: take a text that reaches them, "
            "or leave them out: exclude=, --exclude on the command line, layers= of calibrate"
        )
    return inputs


def check_sums(model: nn.Module, running: Mapping[str, Sums]) -> None:
    """Raise ``FloatingPointError`` naming the first layer whose input held NaN or Inf, ``ValueError`` for one without input."""
    for name, sums in running.items():
        if not sums.n:
            raise ValueError(f"layer {name} saw no input: take a text that reaches it")
        if not sums.squares.isfinite().all():
            broken = [key for key, value in model.named_parameters() if not (value.is_meta or value.isfinite().all())]
            cause = f"; so does the parameter {broken[0]}" if broken else ""
            raise FloatingPointError(f"the input of layer {name} holds NaN or Inf on the calibration text{cause}")


def overflow(model: nn.Module, ids: Tensor) -> FloatingPointError:
    """What to raise where hidden states of these windows are NaN or Inf: it names the module where that begins."""
    return FloatingPointError(
        f"what the model gives out holds NaN or Inf on the calibration text{first_broken(model, ids)}"
    )


def origin_of(model: nn.Module, windows: Tensor) -> dict:
    """What statistics of these windows were taken from."""
    return {
        "model": short_name(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__),
        "windows": list(windows.shape),
        "sha256": hashlib.sha256(windows.cpu().contiguous().numpy().tobytes()).hexdigest()[:16],
    }


def check_windows(windows: Tensor, model: nn.Module | None = None) -> None:
    """Raise ``ValueError`` for anything but a table of token ids, one at least, that the model, if given, can read."""
    check_token_ids(windows)
    if windows.ndim != 2 or windows.numel() == 0:
        raise ValueError(
            f"calibration windows must be a (count, length) tensor of token ids, not {tuple(windows.shape)}"
        )
    if model is not None:
        check_readable(model, windows)


def body_forward(model: nn.Module, ids: Tensor) -> Tensor:
    """Hidden states that the model's body gives out; the output head does not run."""
    body = getattr(model, "base_model", model)
    with evaluating(model):
        out = body(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    return out if isinstance(out, Tensor) else out[0]
