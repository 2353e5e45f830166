"""What was measured of every layer's inputs, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsvd.linalg import Moments
from nsvd.markup import bar, block, number, table, text
from nsvd.stored.files import fingerprint, replacing


@dataclass(frozen=True, repr=False)
class Statistics(Mapping[str, Moments]):
    """The moments of every layer's inputs: a mapping from layer name, in forward order.

    Layers that read one and the same input (queries, keys and values, say) share one entry of ``moments``;
    ``inputs`` says which, by the name of the first layer that reads it. ``origin`` tells what was measured. ``gradients``
    holds, for the methods that ask for it, H of every layer, from ``fisher``.
    """

    moments: Mapping[str, Moments]
    inputs: dict[str, str]
    origin: dict = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)

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

    def __repr__(self) -> str:
        known = f", gradients of {len(self.gradients)}" if self.gradients else ""
        return f"Statistics({len(self)} layers{known}, {len(self.moments)} distinct inputs, {self._measured()})"

    def _repr_html_(self) -> str:
        """A row a distinct input, with the layers that read it and how far its largest channel stands out."""
        readers: dict[str, list[str]] = {}
        for layer, leader in self.inputs.items():
            readers.setdefault(leader, []).append(layer.rsplit(".", 1)[-1])
        sizes = {name: (len(m.G), m.n, _outlier(m)) for name, m in self.moments.items()}
        most = max((peak for *_, peak in sizes.values() if peak is not None), default=0.0)
        rows = [
            [text(name), text(", ".join(readers.get(name, []))), number(channels), number(n), bar(peak, most, "{:.1f}")]
            for name, (channels, n, peak) in sizes.items()
        ]
        head = ["input of", "read by", "channels", "tokens", "outlier"]
        return block(
            repr(self), table(head, rows), "outlier: root mean square of the largest channel over the median one's."
        )

    def _measured(self) -> str:
        """Of which model and on how much text, as far as the origin tells."""
        texts = self.origin.get("mixed", [self.origin])
        sizes = [" × ".join(map(str, one["windows"])) + " tokens" for one in texts if "windows" in one]
        model = texts[0].get("model") if texts else None
        return f"of {model or 'an unnamed model'}" + (f" on {' and '.join(sizes)}" if sizes else "")

    def with_gradients(self, gradients: Mapping[str, Tensor]) -> Statistics:
        """The same with H of every layer, as ``fisher`` returns it."""
        return replace(self, gradients=gradients)

    def shares(self, count: int) -> list[float]:
        """Weights, of sum 1, of ``count`` domains of text: those they were mixed with, equal ones where they were not mixed.

        Raises:
            ValueError: if they were mixed of another number of domains, and ``count`` is not 1.
        """
        weights = self.origin.get("weights")
        if weights is None or count == 1:
            return [1 / count] * count
        if len(weights) != count:
            raise ValueError(
                f"the statistics are mixed of {len(weights)} domains of text, but the windows are of {count}"
            )
        return list(weights)

    def fingerprint(self) -> str:
        """Digits that change with any second moment, of inputs or gradients."""
        return fingerprint([*(m.G for m in self.moments.values()), *self.gradients.values()])

    def save(self, file: str | Path) -> None:
        """Write everything to one safetensors file."""
        tensors = _tensors(self.moments, self.gradients)
        about = {"inputs": self.inputs, "n": {name: m.n for name, m in self.moments.items()}, "origin": self.origin}
        about |= {"gradients": list(self.gradients)}
        about |= {"sum": _sum(tensors, about)}
        with replacing(file) as part:
            save_file(tensors, part, metadata={"nsvd_statistics": json.dumps(about)})

    @classmethod
    def load(cls, file: str | Path) -> Statistics:
        """Read what ``save`` wrote.

        Raises:
            ValueError: if the file is anything else, or damaged.
            FloatingPointError: if a moment holds NaN or Inf; the first such layer is named.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"no statistics file {file}")
        try:
            with safe_open(file, "pt") as stored:
                about = json.loads((stored.metadata() or {})["nsvd_statistics"])
                moments = {name: _moments(stored, name, n) for name, n in about["n"].items()}
                gradients = {name: _gradient(stored, name) for name in about.get("gradients", [])}
            inputs, origin = dict(about["inputs"]), dict(about["origin"])
            if not set(inputs.values()) <= moments.keys():
                raise ValueError("it lacks the moments of a layer")
        except (SafetensorError, TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not a statistics file: {error}") from error
        tensors = _tensors(moments, gradients)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                layer, _, letter = name.rpartition(".")
                raise FloatingPointError(f"{file}: {letter} of layer {layer} holds NaN or Inf")
        if "sum" in about and about.pop("sum") != _sum(tensors, about):  # older files have none
            raise ValueError(f"{file} is damaged: it holds something else than was written")
        return cls(moments, inputs, origin, gradients)


def _outlier(moments: Moments) -> float | None:
    """The largest channel's root mean square over the median channel's; None where that is zero."""
    rms = moments.G.diagonal().sqrt()
    median = rms.median().item()
    return rms.max().item() / median if median else None


def _tensors(moments: Mapping[str, Moments], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they are stored, by layer and letter."""
    tensors = {f"{name}.G": m.G.contiguous() for name, m in moments.items()}
    tensors |= {f"{name}.mean_abs": m.scale().contiguous() for name, m in moments.items()}
    return tensors | {f"{name}.H": H.contiguous() for name, H in gradients.items()}


def _sum(tensors: Mapping[str, Tensor], about: dict) -> str:
    """Digits that change with anything in the file: numbers, shapes, and what is told of them."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    text = json.dumps(json.loads(json.dumps([about, shapes])), sort_keys=True).encode()  # as it is read again
    return fingerprint([*tensors.values(), torch.frombuffer(bytearray(text), dtype=torch.uint8)])


def _moments(stored: safe_open, name: str, n: int) -> Moments:
    G, mean_abs = stored.get_tensor(f"{name}.G"), stored.get_tensor(f"{name}.mean_abs")
    square = G.is_floating_point() and G.ndim == 2 and G.shape[0] == G.shape[1]
    if not square or not mean_abs.is_floating_point() or mean_abs.shape != G.shape[:1]:
        raise ValueError(f"layer {name} has G of {tuple(G.shape)} and mean_abs of {tuple(mean_abs.shape)}")
    if type(n) is not int or n < 1:
        raise ValueError(f"layer {name} has moments over {n} tokens")
    return Moments(G, mean_abs, n)


def _gradient(stored: safe_open, name: str) -> Tensor:
    H = stored.get_tensor(f"{name}.H")
    if not H.is_floating_point() or H.ndim not in (1, 2) or H.shape[0] != H.shape[-1]:
        raise ValueError(f"layer {name} has H of {tuple(H.shape)}")
    return H
