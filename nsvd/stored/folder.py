"""A model folder looked at before anything of it is built: what it asks for, and what its weight files hold.

Nothing here trusts the folder. What would run code, or reach for files elsewhere, is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
METHOD = "nsvd"  # ``quant_method`` of our own checkpoints
DEEPEST = 64  # levels of lists and objects in a JSON file
MOST_LAYERS = 10_000  # unless the files hold more tensors than that
QUANTIZED = ("F8_", "F6_", "F4")  # how the dtypes begin that no layer here computes with


class CheckpointError(ValueError):
    """A model folder that cannot be read as what it says it is."""


@dataclass(frozen=True)
class Stored:
    """What the header of a weight file says of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


def read_json(file: Path) -> dict:
    """The object in a JSON file.

    Raises:
        CheckpointError: if the file holds anything else, or is nested too deeply.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        deepest = max((path.count(".") for path, _, _ in each_field(value)), default=0)
    except RecursionError:
        deepest = DEEPEST
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if deepest >= DEEPEST:
        raise CheckpointError(f"{file} is nested more than {DEEPEST} levels deep")
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds {json.dumps(value)[:40]} where an object is expected")
    return value


def each_field(value: object, path: str = "") -> Iterator[tuple[str, str, object]]:
    """(path, key, value) of everything below."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in pairs:
        yield f"{path}{key}", str(key), below
        yield from each_field(below, f"{path}{key}.")


def read_config(folder: Path) -> dict:
    """config.json of a folder that may be read: a known model that needs no code of its own, dense or compressed by us.

    Raises:
        CheckpointError: naming the field that is in the way.
    """
    file = folder / CONFIG
    config = read_json(file)
    _check_architecture(file, config)
    for path, key, value in each_field(config):
        if "implementation" in path and isinstance(value, str) and "/" in value:
            raise CheckpointError(f"{file}: {path} is {value!r}, code from a hub, which is not run")
        if key in ("quantization_config", "compression_config") and value is not None:
            _check_quantization(file, path, value)
    if config.get("transformers_weights") is not None:
        raise CheckpointError(f"{file}: transformers_weights is not supported; name the weights {SINGLE}")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if (folder / name).exists():
            raise CheckpointError(f"{folder}: an adapter ({name}) lies beside the model; merge it first")
    return config


def _check_architecture(file: Path, config: dict) -> None:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{file}: model_type is {json.dumps(kind)[:40]}, not the name of an architecture")
    if kind not in CONFIG_MAPPING:
        code = ", and its own code (auto_map) is not run" if "auto_map" in config else ""
        raise CheckpointError(f"{file}: model_type {kind[:40]!r} is none that this transformers knows{code}")


def _check_quantization(file: Path, path: str, section: object) -> None:
    if not isinstance(section, dict):
        raise CheckpointError(f"{file}: {path} is {json.dumps(section)[:40]}, not an object")
    method = section.get("quant_method")
    if method != METHOD:
        named = f"by {method[:40]}" if isinstance(method, str) else "by a method it does not name"
        raise CheckpointError(f"{file}: {path} tells of weights quantized {named}; dequantize the model first")
    if path != "quantization_config":
        raise CheckpointError(f"{file}: {path} is not where a compressed model tells of its layers")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights: one, or all that the index names.

    Raises:
        CheckpointError: if there are none, only pickled ones, or the index names a file that is not in the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        pickled = sorted(file.name for suffix in ("bin", "pt", "pth") for file in folder.glob(f"*.{suffix}"))
        found = f", and {pickled[0]} is a pickle, which is not read; convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{folder} holds no {SINGLE}{found}")
    index = read_json(folder / INDEX)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map tensor names to file names")
    if not isinstance(index.get("metadata", {}), dict):
        raise CheckpointError(f"{folder / INDEX}: metadata is not an object")
    return [_inside(folder, name) for name in sorted(set(names.values()))]


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder itself. In the cache of the hub a folder's files are links to ``blobs`` beside it."""
    if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
        raise CheckpointError(f"{folder / INDEX}: {name[:80]!r} is not the name of a safetensors file in the folder")
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / INDEX}: {name} is missing")
    whole = folder.resolve()
    target, cache = (folder / name).resolve(), whole.parent.parent / "blobs"
    if target.parent != whole and not (whole.parent.name == "snapshots" and target.parent == cache):
        raise CheckpointError(f"{folder / INDEX}: {name} is a link that leaves the folder")
    return folder / name


def headers(files: list[Path]) -> dict[str, Stored]:
    """What the weight files say they hold, by tensor; nothing but their headers is read.

    Raises:
        CheckpointError: if a file is damaged, or two files hold tensors of one name.
    """
    stored: dict[str, Stored] = {}
    for file in map(Path, files):
        try:
            with safe_open(file, "pt") as tensors:
                keys = tensors.keys()  # safe_open itself cannot be iterated
                slices = {key: tensors.get_slice(key) for key in keys}
                found = {key: Stored(tuple(s.get_shape()), s.get_dtype(), file) for key, s in slices.items()}
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file}: a weight file is damaged ({error})") from error
        if double := sorted(stored.keys() & found.keys()):
            raise CheckpointError(f"{file}: tensor {double[0]} is also in {stored[double[0]].file.name}")
        stored |= found
    for key, tensor in stored.items():
        if tensor.dtype.startswith(QUANTIZED):
            raise CheckpointError(f"{tensor.file}: {key} is stored as {tensor.dtype}; dequantize the model first")
    return stored


def check_counts(folder: Path, config: dict, stored: dict[str, Stored]) -> None:
    """Raise ``CheckpointError`` if config.json counts more layers than there can be weights for, or fewer than none.

    Lists of that length are made when the configuration is read, before any layer is built.
    """
    most = max(MOST_LAYERS, len(stored))
    for path, key, value in each_field(config):
        counts = ("layer" in key and "size" not in key) or key == "num_labels"  # not such as vocab_size_per_layer_input
        least = 0 if key.startswith(("num_", "n_")) else -most  # others tell of a layer from the end
        if counts and isinstance(value, int | float) and not least <= value <= most:
            raise CheckpointError(f"{folder / CONFIG}: {path} is {value}, but the files hold {len(stored)} tensors")
