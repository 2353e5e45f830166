"""Which models of transformers continue a text, alone or beside images and sounds, and how they are read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import cast

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)


def auto_class(config: PretrainedConfig) -> type:
    """The class that reads a folder of this configuration: for a text alone, unless the model in it is of the other kind."""
    beside = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    alone = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    name = getattr(beside, "__name__", None)
    told = config.architectures
    stored = isinstance(told, list) and name in told  # a damaged file may hold anything there
    return AutoModelForMultimodalLM if stored or (beside is not None and alone is None) else AutoModelForCausalLM


def check_continues(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` for a model that is an encoder, has one before its decoder, or is of a kind that continues no text.

    A decoder without the head that continues a text, or with another one, is of such a kind: its folder would be read as the model
    with that head.
    """
    kind, mappings = type(model), (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    alone, beside = (cast("type | None", mapping.get(type(model.config), None)) for mapping in mappings)
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{kind.__name__} is an encoder with a decoder; only models that are a decoder alone are compressed"
        )
    if issubclass(kind, tuple(one for one in (alone, beside) if one is not None)):
        return
    if kind in MODEL_FOR_MASKED_LM_MAPPING.values():
        raise ValueError(f"{kind.__name__} fills gaps in a text; only models that continue a text are compressed")
    fills = (
        type(model.config) in MODEL_FOR_MASKED_LM_MAPPING
    )  # its model that continues a text is an encoder, too, by default
    known = None if fills else alone or beside
    there = f"; {known.__name__} is one" if known else ""
    raise ValueError(
        f"transformers does not know {kind.__name__} as a model that continues a text{there}; only such models are compressed"
    )


def copy_processors(config: PretrainedConfig, folder: Path) -> None:
    """Copy how images and sounds are read, unless it was written with the tokenizer."""
    for file in sorted(Path(config.name_or_path).glob("*processor_config.json")) if config.name_or_path else ():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
