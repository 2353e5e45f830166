"""Whether the factors of a compressed model are still those that the compression gave it: what tells a fine-tuned one.

``quantization_config`` holds sums of the factors as they were then. Whoever saves the model compares them with its factors as
they are now, and writes ``changed_after_compression`` where they differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nsvd.stored.layers import CompressedLayer
from nsvd.stored.section import LowRankConfig, section_of

PIECE = 2**22  # numbers that are cast at a time
# A model may be cast to one of these after the other and be none other. More casts give the same again.
CASTS = ((), (torch.bfloat16,), (torch.float16,), (torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16))


class FactorSums:
    """Sums over the parameters of compressed layers: as they are, and as casts would make them."""

    def __init__(self, casts: tuple = CASTS) -> None:
        self._casts, self._digests, self._known = casts, [hashlib.sha256() for _ in casts], True
        self._threads = ThreadPoolExecutor(len(casts))  # sums are taken without Python's lock

    def add(self, module: nn.Module) -> None:
        """Take in a module, in the order of the model; one that is no compressed layer is passed over."""
        for value in module.parameters() if isinstance(module, CompressedLayer) else ():
            if value.is_meta or is_traceable_wrapper_subclass(value):
                self._known = False
                return
            list(self._threads.map(partial(_take, value.detach().cpu()), self._casts, self._digests))

    def told(self) -> list[str]:
        """The sums; none where a parameter had no values, as on the device ``meta``, or was in parts or quantized."""
        return list(dict.fromkeys(digest.hexdigest()[:16] for digest in self._digests)) if self._known else []


def _take(value: Tensor, dtypes: Iterable[torch.dtype], digest: hashlib._Hash) -> None:
    """Add a tensor, cast and then in float32, to a sum."""
    for part in value.reshape(-1).split(PIECE):
        digest.update(cast_through(part, dtypes).to(torch.float32).view(torch.uint8).numpy().data)


def cast_through(value: Tensor, dtypes: Iterable[torch.dtype]) -> Tensor:
    """A tensor cast to one dtype after the other."""
    for dtype in dtypes:
        value = value.to(dtype)
    return value


def factor_sums(model: nn.Module, *, casts: bool = True) -> list[str]:
    """The sums of a model in memory; without ``casts`` only that of the factors as they are."""
    sums = FactorSums(CASTS if casts else CASTS[:1])
    for module in model.modules():
        sums.add(module)
    return sums.told()


def is_changed(model: nn.Module) -> bool | None:
    """Whether the factors are others than those of the compression; None where that is not known."""
    known: list[str] | None = getattr(section_of(model), "factor_sums", None)
    now = factor_sums(model, casts=False) if known else []
    return now[0] not in known if known and now else None


def note_changes(model: nn.Module, config: LowRankConfig) -> None:
    """Let the configuration tell whether the factors have changed, if that is known."""
    changed = is_changed(model)
    if changed:
        config.changed_after_compression = True
    elif changed is not None:
        vars(config).pop("changed_after_compression", None)
