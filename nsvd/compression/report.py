"""What reports are made of: time, memory, versions, errors."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor, nn

from nsvd.linalg import Moments
from nsvd.linalg.errors import output_energy
from nsvd.linalg.precision import double
from nsvd.markup import bar, block, number, size, table, text
from nsvd.stored.files import fingerprint
from nsvd.stored.groups import place
from nsvd.version import __version__
from nsvd.walk.decoder import longest_list

if TYPE_CHECKING:
    import pandas as pd

NEARLY_ALL = 0.9  # of the parameters of the blocks; where the layers taken hold less, a report says so


def versions() -> dict[str, str]:
    """Versions of what computed a number."""
    return {
        "nsvd": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def relative_errors(
    layer: nn.Linear, dense: Tensor, stats: Mapping[str, Moments] | None, name: str
) -> dict[str, float]:
    """Relative errors ‖W − Ŵ‖ / ‖W‖ and ‖(W − Ŵ) X‖ / ‖W X‖ of ``dense``, Ŵ."""
    W = double(layer.weight)
    G = stats[name].G.to(W.device) if stats is not None and name in stats else None
    size, whole = W.square().sum().item(), 0.0 if G is None else output_energy(W, G)
    E = W - double(dense).to(W.device)
    del W  # where a weight is no float64 already, this is a copy of it
    row = {"weight_error": (E.square().sum().item() / size) ** 0.5 if size else 0.0}  # a layer of zeros is met exactly
    if G is not None:
        row["calibration_error"] = (max(output_energy(E, G), 0.0) / whole) ** 0.5 if whole else 0.0
    return row


class Tabled:
    """Has ``rows``, and the same as a DataFrame where one is asked for: pandas is loaded only then."""

    rows: list[dict]

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row a layer. Made once; a change of it changes nothing else."""
        import pandas as pd

        table = pd.DataFrame(self.rows)
        return table.astype({"rank": "Int64"}) if "rank" in table else table


@dataclass(frozen=True, repr=False)
class Report(Tabled):
    """What ``compress_`` did.

    Parameters and bytes count the target layers' weights, biases left out; those of the ``model`` count everything.
    """

    method: str
    options: dict
    allocation: str  # of ALLOCATIONS, or "given"
    factors: str  # of FACTORS
    shifted: bool
    neurons: float  # the share of what is removed that neurons were to remove; the rows tell how many are left
    refine: int  # steps a block
    distill: int  # steps
    losses: list[float]  # at every one of them, nats a token
    seed: int
    calibration: dict | None  # where the statistics come from, and the weights of several domains
    texts: dict[
        str, dict
    ]  # the text of the gradients, of the targets of shifted inputs, of the search and the distillation
    search_tokens: int  # that went through the model to find the ranks
    ratio: float | None  # asked
    ratio_reached: float
    params_before: int
    params_after: int
    model_ratio_reached: float  # the share of the whole model
    model_params_before: int
    model_params_after: int
    blocks_covered: (
        float  # the share of the blocks' parameters that the target layers hold; of a mixture of experts far from 1
    )
    left_alone: dict[str, int]  # parameters outside the target layers, by name with * for numbers
    bytes_before: int
    bytes_after: int
    seconds: dict[str, float]  # by stage
    peak_memory: int | None  # bytes: of the GPU where there is one, else of the process so far; None: not known
    versions: dict[str, str]
    rows: list[
        dict
    ]  # one a layer; errors of the float64 factors, or of refined and distilled ones in the model's dtype
    moves: list = field(default_factory=list)  # of SoLA's search, see ``nsvd.linalg.sola_ranks``

    def as_dict(self) -> dict:
        """Everything but the rows and the moves, ready for JSON."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("rows", "moves")}

    @property
    def reservations(self) -> list[str]:
        """What part of the blocks was left out, and which experts no text has reached, a sentence each; mostly none."""
        held = f"the layers taken hold {self.blocks_covered:.0%} of the blocks' parameters, the rest of these is dense"
        return ([held] if self.blocks_covered < NEARLY_ALL else []) + ([self.unreached] if self.unreached else [])

    @property
    def unreached(self) -> str:
        """How many experts no token of the calibration has reached, as a sentence; empty where there are none."""
        experts = (self.calibration or {}).get("experts", {})
        if not experts.get("unreached"):
            return ""
        return f"{experts['unreached']} of {experts['count']} experts saw no token; they use the shared moment"

    def __repr__(self) -> str:
        factored = sum(not row["dense"] for row in self.rows)
        said = [
            f"{self.method}, {self.ratio_reached:.1%} of the layers' {self.params_before:,} parameters removed",
            f"{self.model_ratio_reached:.1%} of the whole model's",
            *self.reservations,
            f"{factored} of {len(self.rows)} layers factored, {sum(self.seconds.values()):.1f} s",
        ]
        return f"Report({', '.join(said)})"

    def _repr_html_(self) -> str:
        """What was removed in one line, then a row a layer; bars show what is left of it and its relative errors."""
        errors = [name for name in ("weight_error", "calibration_error") if any(name in row for row in self.rows)]
        most = {name: max(row.get(name) or 0.0 for row in self.rows) for name in errors}
        lines = [
            [
                text(row["layer"]), text(f"{row['d_out']} × {row['d_in']}"), number(row["rank"] and int(row["rank"])),
                bar(row["params"] / (row["d_out"] * row["d_in"]), 1.0),
                *(bar(row.get(name), most[name]) for name in errors),
            ]
            for row in self.rows
        ]  # fmt: skip
        head = ["layer", "d_out × d_in", "rank", "parameters left", *(name.replace("_", " ") for name in errors)]
        title = (
            f"{self.method}: {self.ratio_reached:.1%} of the layers' parameters removed, {self.model_ratio_reached:.1%} of the "
            f"whole model's ({size(self.bytes_before)} → {size(self.bytes_after)})"
        )
        spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        how = [f"{name} {value}" for name, value in self.options.items()]
        how += [f"allocation {self.allocation}", f"factors {self.factors}"]
        foot = [", ".join(how), *self.reservations, f"Time: {spent or 'none'}"]
        return block(title, table(head, lines), f"{'. '.join(foot)}.")


def covered(model: nn.Module, held: int, gone: int = 0) -> float:
    """The share of the parameters of all blocks that target layers of ``held`` dense parameters have, ``gone`` of them removed."""
    _, blocks = longest_list(model) or ("", model)
    return held / (sum(parameter.numel() for parameter in blocks.parameters()) + gone)


def left_alone(model: nn.Module, layers: Iterable[str]) -> dict[str, int]:
    """Parameters outside the named layers by name, numbers in it replaced by *; the largest first."""
    inside = {id(p) for name in layers for p in model.get_submodule(name).parameters()}
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside:
            sizes[place(name)] = sizes.get(place(name), 0) + parameter.numel()
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def text_of(domains: Sequence[Tensor], sampled: bool) -> dict:
    """What is told of a text: whether ``compress_`` sampled it, and of every domain the windows' shape and a fingerprint."""
    return ({"source": "sampled from the model"} if sampled else {}) | {
        "windows": [list(d.shape) for d in domains],
        "fingerprints": [fingerprint([d]) for d in domains],
    }


class Clock:
    """Seconds by stage."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def peak_memory() -> int | None:
    """Bytes at the highest: of the GPU where there is one, else of the process so far; None where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
