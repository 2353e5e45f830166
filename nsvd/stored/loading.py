"""Models out of folders: looked at first, built under limits, checked afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nsvd.stored import guard, manifest
from nsvd.stored.checkpoint import is_compressed
from nsvd.stored.folder import CONFIG, CheckpointError, Stored, check_counts, headers, read_config, weight_files
from nsvd.stored.foreign import quiet, reading
from nsvd.stored.kinds import auto_class
from nsvd.stored.skeleton import check_blocks, check_finite, check_fits, limited

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}  # that every layer computes with
HUB_FILES = ["README.md", "*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]


def default_device() -> str:
    """The GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_folder(
    folder: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "auto", verify: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) from a local folder, in evaluation mode.

    ``dtype="auto"`` keeps the stored one; ``device="auto"`` takes the GPU where there is one. Where the folder has a manifest,
    every file is compared with it, unless ``verify`` is False. No code from the folder is run, no pickle is read.

    Raises:
        CheckpointError: if a file is not that of the manifest, a tensor is missing, misshaped, unreadable or not finite, or
            a configuration asks for what the weights do not hold.
        ValueError: if there is no such dtype or device.
    """
    folder = Path(folder)
    device, dtype = usable_device(device), usable_dtype(dtype)
    config, stored = looked_at(folder, verify=verify)
    with manifest.settled():
        model = _read_model(folder, dtype, stored, config)
    model.to(device)  # pyright: ignore[reportArgumentType]  # transformers' wrapper hides the signature
    return model.eval(), read_tokenizer(folder)


def looked_at(folder: Path, *, verify: bool) -> tuple[dict, dict[str, Stored]]:
    """What config.json says, and what the weight files hold, by tensor. Raises ``CheckpointError`` as ``load_folder``."""
    if verify:
        manifest.check(folder)
    config = read_config(folder)
    stored = headers(files := weight_files(folder))
    if config.get("quantization_config") is None and (section := guard.told(files)) is not None:
        config["quantization_config"] = section  # another program has taken it out of config.json
    check_counts(folder, config, stored)
    return config, stored


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; raises ``CheckpointError`` if there is none that can be read."""
    try:
        with reading(folder, "tokenizer"):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} holds a model but no tokenizer that can be read: {error.__cause__}") from error


def download(name: str) -> Path:
    """The folder of a model of the hub in the local cache: configuration, tokenizer and safetensors, no code and no pickle.

    Raises:
        OSError: if the hub cannot be reached, or has no such model.
    """
    with quiet():
        try:
            return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
        except (HfHubHTTPError, HFValidationError) as error:
            raise OSError(str(error)) from error


def skeleton(folder: Path, dtype: str | torch.dtype, stored: Mapping[str, Stored], told: dict) -> PreTrainedModel:
    """A dense model on ``meta``, in the dtype that it is loaded in.

    Raises ``CheckpointError`` unless the files hold what it asks for.
    """
    config = _config(folder)
    config.name_or_path = str(folder)
    if dtype == "auto":
        floats = (DTYPES[entry.dtype] for entry in stored.values() if entry.dtype in DTYPES)
        dtype = config.dtype or next(floats, "float32")
    dtype = str(dtype).removeprefix("torch.")
    with reading(folder, f"model of {CONFIG}", told), limited(stored), torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    with reading(folder):
        check_fits(model, stored)
    return model


def _config(folder: Path) -> PretrainedConfig:
    with reading(folder, CONFIG):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _read_model(folder: Path, dtype: str | torch.dtype, stored: dict[str, Stored], told: dict) -> PreTrainedModel:
    config = _config(folder)
    if told.get("quantization_config") is None:
        skeleton(folder, dtype, stored, told)
    else:  # the same is checked when the factors are in place
        config.quantization_config = told["quantization_config"]
    with reading(folder, config=told), limited(stored):
        model, info = auto_class(config).from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip  # a misshaped tensor is reported in ``info``, and raised below
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors missing or misshaped, first {missing[0]}")
    if is_compressed(model):
        if info["unexpected_keys"]:
            raise CheckpointError(f"{folder}: the model has no tensor {min(info['unexpected_keys'])}, which is stored")
    else:
        with reading(folder):
            check_blocks(model, info["unexpected_keys"])
            check_finite(model)
    return model


def usable_device(device: str) -> str:
    """The device, or the default one for ``auto``; raises ``ValueError`` for one that does not compute."""
    device = default_device() if device == "auto" else device
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # of which kind depends on the device
        raise ValueError(f"device {str(device)!r} cannot be used: {error}") from error
    return device


def usable_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """The dtype as given; raises ``ValueError`` for one that layers do not compute with."""
    if dtype is None or str(dtype).removeprefix("torch.") not in ("auto", *DTYPES.values()):
        raise ValueError(f"unknown dtype {str(dtype)!r}; use auto, {', '.join(DTYPES.values())}")
    return dtype
