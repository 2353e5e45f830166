"""Second moments and mean absolute values of every layer's inputs, in one pass over the calibration text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.linalg import Moments
from nsvd.model.files import fingerprint, replacing
from nsvd.model.hooks import evaluating, watch_inputs
from nsvd.model.targets import targets


class RunningMoments:
    """Sums of x xᵀ and |x| over tokens, in float64 on the device where the inputs are."""

    def __init__(self) -> None:
        self.n, self.outer, self.absolute = 0, None, None

    def add(self, x: Tensor) -> None:
        """Take in inputs x (…, d_in)."""
        x = x.reshape(-1, x.shape[-1]).double()
        if self.outer is None:
            self.outer, self.absolute = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1])
        self.outer.addmm_(x.mT, x)
        self.absolute += x.abs().sum(0)
        self.n += len(x)

    def result(self) -> Moments:
        """Averages per token, on the CPU."""
        return Moments((self.outer / self.n).cpu(), (self.absolute / self.n).cpu(), self.n)


@dataclass(frozen=True)
class Statistics(Mapping[str, Moments]):
    """The moments of every layer's inputs: a mapping from layer name, in forward order.

    Layers that read one and the same input (queries, keys and values, say) share one entry of ``moments``;
    ``inputs`` says which, by the name of the first layer that reads it. ``origin`` tells what was measured. ``gradients``
    holds, for the methods that ask for it, H of every layer, from ``fisher``.
    """

    moments: dict[str, Moments]
    inputs: dict[str, str]
    origin: dict = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> Moments:
        if layer not in self.inputs:
            raise KeyError(
                f"the statistics hold no layer {layer!r}; they were taken from {self.origin.get('model', '?')}"
            )
        moments = self.moments[self.inputs[layer]]
        return replace(moments, H=self.gradients[layer]) if layer in self.gradients else moments

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def with_gradients(self, gradients: Mapping[str, Tensor]) -> Statistics:
        """The same with H of every layer, as ``fisher`` returns it."""
        return replace(self, gradients=dict(gradients))

    def fingerprint(self) -> str:
        """Digits that change with any second moment, of inputs or gradients."""
        return fingerprint([*(m.G for m in self.moments.values()), *self.gradients.values()])

    def save(self, file: str | Path) -> None:
        """Write everything to one safetensors file."""
        tensors = {f"{name}.G": m.G.contiguous() for name, m in self.moments.items()}
        tensors |= {f"{name}.mean_abs": m.mean_abs.contiguous() for name, m in self.moments.items()}
        tensors |= {f"{name}.H": H.contiguous() for name, H in self.gradients.items()}
        about = {"inputs": self.inputs, "n": {name: m.n for name, m in self.moments.items()}, "origin": self.origin}
        about["gradients"] = list(self.gradients)
        with replacing(file) as part:
            save_file(tensors, part, metadata={"nsvd_statistics": json.dumps(about)})

    @classmethod
    def load(cls, file: str | Path) -> Statistics:
        """Read what ``save`` wrote; raises ``ValueError`` for anything else."""
        if not Path(file).is_file():
            raise FileNotFoundError(f"no statistics file {file}")
        try:
            with safe_open(file, "pt") as stored:
                about = json.loads(stored.metadata()["nsvd_statistics"])
                moments = {
                    name: Moments(stored.get_tensor(f"{name}.G"), stored.get_tensor(f"{name}.mean_abs"), n)
                    for name, n in about["n"].items()
                }
                gradients = {name: stored.get_tensor(f"{name}.H") for name in about.get("gradients", [])}
        except (SafetensorError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is not a statistics file: {error}") from error
        return cls(moments, about["inputs"], about["origin"], gradients)


def mix(domains: Sequence[Statistics], weights: Sequence[float] | None = None) -> Statistics:
    """Statistics of several domains as one metric: G = c Σ_d w_d G_d / mean(diag G_d), of equal or given weights w.

    c = Σ_d w_d mean(diag G_d) gives the metric the average scale back; mean absolute values are mixed alike, and gradients,
    where all domains have them, averaged. All must be of the same layers, weights at least 0 and not all 0.
    """
    weights = [1.0] * len(domains) if weights is None else list(weights)
    if len(weights) != len(domains) or not domains or min(weights) < 0 or sum(weights) == 0:
        raise ValueError(f"{len(domains)} domains and the weights {weights}: give one weight, not negative, for each")
    shares = [w / sum(weights) for w in weights]
    first = domains[0]
    if any(other.inputs != first.inputs for other in domains):
        raise ValueError("the statistics to mix are not of the same layers")
    moments = {name: _mixed([d.moments[name] for d in domains], shares) for name in first.moments}
    gradients = {}
    if all(d.gradients for d in domains):
        gradients = {n: sum(w * d.gradients[n] for w, d in zip(shares, domains, strict=True)) for n in first.gradients}
    return Statistics(moments, first.inputs, {"mixed": [d.origin for d in domains], "weights": shares}, gradients)


def _mixed(parts: Sequence[Moments], shares: Sequence[float]) -> Moments:
    scales = [m.G.diagonal().mean().clamp(min=torch.finfo(m.G.dtype).tiny) for m in parts]
    scale = sum(w * s for w, s in zip(shares, scales, strict=True))
    G = sum(w * scale / s * m.G for w, s, m in zip(shares, scales, parts, strict=True))
    mean_abs = sum(w * (scale / s).sqrt() * m.mean_abs for w, s, m in zip(shares, scales, parts, strict=True))
    return Moments(G, mean_abs, sum(m.n for m in parts))


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
        _forward(model, ids)
    return first


@torch.no_grad()
def calibrate(
    model: nn.Module, windows: Tensor, *, layers: Iterable[str] | None = None, batch: int = 8, progress: bool = False
) -> Statistics:
    """Moments of the inputs of every target layer over the token ids ``windows`` (count, length).

    One pass without the output head, float64 sums, one matrix for each distinct input.

    Raises:
        ValueError: if ``windows`` is empty, or a layer never runs.
        FloatingPointError: if an input holds NaN or Inf; the first such layer is named.
    """
    check_windows(windows)
    names = list(targets(model) if layers is None else layers)
    inputs = shared_inputs(model, names, windows[:1, :8])
    silent = [name for name in names if name not in inputs]
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(names)} layers saw no input, first {silent[0]}; leave them out of `layers`"
        )
    running = {name: RunningMoments() for name in dict.fromkeys(inputs.values())}
    with watch_inputs(model, running, lambda name, x: running[name].add(x)):
        for ids in tqdm(windows.split(batch), "calibrate", disable=not progress, leave=False):
            _forward(model, ids)
    for name, sums in running.items():
        if not sums.outer.isfinite().all():
            broken = [key for key, value in model.named_parameters() if not value.isfinite().all()]
            cause = f"; so does the parameter {broken[0]}" if broken else ""
            raise FloatingPointError(f"the input of layer {name} holds NaN or Inf on the calibration text{cause}")
    origin = {
        "model": getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "windows": list(windows.shape),
        "sha256": hashlib.sha256(windows.cpu().contiguous().numpy().tobytes()).hexdigest()[:16],
    }
    return Statistics({name: sums.result() for name, sums in running.items()}, inputs, origin)


def check_windows(windows: Tensor) -> None:
    """Raise ``ValueError`` for anything but a table of token ids with at least one."""
    if windows.ndim != 2 or windows.numel() == 0:
        raise ValueError(
            f"calibration windows must be a (count, length) tensor of token ids, not {tuple(windows.shape)}"
        )


def _forward(model: nn.Module, ids: Tensor) -> None:
    """Run the model's body, without the output head."""
    body = getattr(model, "base_model", model)
    with evaluating(model):
        body(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
