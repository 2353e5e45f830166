"""What makes a compressed folder loud where ``nsvd`` is not imported, and lets it know its ranks where config.json has lost them.

Beside the factors lie two tensors of one number. One has the name of a dense weight that the model no longer has: whoever
builds the dense model, as transformers does alone, finds it misshaped and raises. The name of the other says what to do. The
metadata of every weight file hold what config.json tells of the compression.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from nsvd.stored.experts import parameter_of
from nsvd.stored.folder import METHOD, CheckpointError, Stored
from nsvd.stored.section import LowRankConfig

ADVICE = "compressed by nsvd: import nsvd before loading, and keep quantization_config in config json"


def tensors(layers: Iterable[str]) -> dict[str, Tensor]:
    """The two tensors for a model with these compressed layers; none where there is no layer.

    The dense weight is that of a layer by itself where there is one: that of experts may be split where it is saved.
    """
    names = sorted(layers, key=lambda name: (parameter_of(name) is not None, name))
    if not names:
        return {}
    whole = parameter_of(names[0])
    dense = {f"{names[0]}.weight": torch.zeros(1)} if whole is None else {whole: torch.zeros(1, 2, 1)}
    return dense | {ADVICE: torch.zeros(1)}


def metadata(config: LowRankConfig) -> dict[str, str]:
    """What goes into the header of a weight file."""
    return {METHOD: json.dumps(config.to_dict(), sort_keys=True)}


def sort_metadata(file: Path) -> None:
    """Sort the metadata in the header of a weight file, in their place: safetensors writes several in any order."""
    scan = json.JSONDecoder().raw_decode
    with file.open("r+b") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little")).decode()
        begin = header.find('"__metadata__":{')
        if begin < 0 or '"__metadata__":{}' in header:
            return
        at, pairs = begin + len('"__metadata__":'), []
        first = at
        while header[at] != "}":
            start = at + 1
            value = scan(header, start)[1] + 1  # behind the name and its colon
            at = scan(header, value)[1]
            pairs.append(header[start:at])
        stream.seek(8)
        stream.write(f"{header[:first]}{{{','.join(sorted(pairs))}}}{header[at + 1 :]}".encode())


def told(files: Iterable[str | Path]) -> dict | None:
    """What the header of the first weight file tells of a compression, None if nothing; ``CheckpointError`` if damaged."""
    file = next(iter(files))
    with safe_open(file, "pt") as stored:
        text = (stored.metadata() or {}).get(METHOD)
    try:
        section = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the metadata {METHOD} is not JSON: {error}") from error
    if text is not None and (not isinstance(section, dict) or section.get("quant_method") != METHOD):
        raise CheckpointError(f"{file}: the metadata {METHOD} do not tell of a compressed model")
    return section


def expect(model: PreTrainedModel, layers: Iterable[str], stored: Mapping[str, Stored]) -> None:
    """Let transformers pass over the two tensors; raises ``CheckpointError`` if one is more than that."""
    keys = tensors(layers)
    for key, tensor in keys.items():
        if key in stored and stored[key].shape != tuple(tensor.shape):
            raise CheckpointError(f"{stored[key].file}: {key} is stored beside the factors of this layer")
    ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), *(re.escape(key) + "$" for key in keys)}
    model._keys_to_ignore_on_load_unexpected = ignored
