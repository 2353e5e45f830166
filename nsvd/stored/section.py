"""What config.json tells of a compressed model, read strictly."""

from __future__ import annotations

import json

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from nsvd.stored.folder import CONFIG, METHOD, CheckpointError

FORMAT = 1
NUMBER = int | float | None
KINDS = {"method": str, "options": dict, "sums": list, "ratio": NUMBER, "reached": NUMBER}  # by the last word


class LowRankConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model.

    ``modules`` maps layer names to {"layer": kind, "rank": k, …}, the kind (of ``layers.LAYERS``) left out where it is
    low-rank. ``latent_cache``, where there is one, tells how the KV cache was compressed; its ``layers`` map the names of
    attention layers to {"rotated": int, "joint": bool, "absorb": bool}, the last left out for False, see ``latent.attach``.

    Raises:
        CheckpointError: naming a field that holds something else.
    """

    changed_after_compression: bool  # there where it is so, see ``changes``

    def __init__(
        self, modules: dict | None = None, format_version: int = FORMAT, latent_cache: dict | None = None, **details
    ):
        details.pop("quant_method", None)
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]  # none of transformers' own
        self.format_version = _version(format_version)
        self.modules = dict(_objects("modules", {} if modules is None else modules))
        self.latent_cache = latent_cache
        if latent_cache is not None:
            _objects(
                "latent_cache.layers", latent_cache.get("layers") if isinstance(latent_cache, dict) else latent_cache
            )
        for name, value in details.items():  # method, ratio, options, …: kept, also when a later version adds some
            kind = KINDS.get(name.rpartition("_")[2], object)
            told = isinstance(value, kind) and not (kind is not object and isinstance(value, bool))
            if not told or hasattr(type(self), name):
                raise CheckpointError(f"{CONFIG}: quantization_config.{name} is {json.dumps(value)[:40]}")
            setattr(self, name, value)


def section_of(model: nn.Module) -> LowRankConfig | None:
    """What a compressed model of transformers carries of its compression; None for another model."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return config if isinstance(config, LowRankConfig) else None


def _version(value: object) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{CONFIG}: format_version is {json.dumps(value)[:40]}, not a whole number from 1")
    if value > FORMAT:
        raise CheckpointError(f"checkpoint format {value} is newer than this nsvd reads ({FORMAT})")
    return value


def _objects(field: str, value: object) -> dict:
    """An object of objects."""
    if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
        raise CheckpointError(f"{CONFIG}: quantization_config.{field} is {json.dumps(value)[:40]}, not layers by name")
    return value
