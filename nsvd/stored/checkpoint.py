"""Low-rank checkpoints: safetensors and a config.json, read by transformers itself once ``nsvd`` is imported.

transformers' quantizer extension point is used: ``quantization_config`` in config.json names the compressed layers and
their ranks, ``from_pretrained`` builds them before any weight is read. No pickle and no remote code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from nsvd.stored import guard, manifest, model_card
from nsvd.stored.changes import note_changes
from nsvd.stored.experts import parameter_of, put_together_all, take_apart_for
from nsvd.stored.files import check_writable, reached, replacing
from nsvd.stored.folder import CONFIG, METHOD, CheckpointError, Stored, headers, read_json
from nsvd.stored.foreign import quiet
from nsvd.stored.kinds import copy_processors
from nsvd.stored.layers import LAYERS, CompressedLayer, LowRankLinear
from nsvd.stored.parallel import follow_factors
from nsvd.stored.quantized import check_plain, make_plain, make_room, put_together, taken_apart
from nsvd.stored.section import LowRankConfig, section_of
from nsvd.stored.skeleton import check_dtypes, check_finite, check_fits, matched
from nsvd.stored.transposed import as_linear

MODEL_FILES = (  # what ``save`` may find in the place of a model: names that transformers and we give, no others
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "nsvd_report.json",
    manifest.NAME,
)  # fmt: skip


# How attention layers, by name and with what config.json says of each, begin to cache latents ("attach") and end it ("detach"):
# put here by ``nsvd.cache``, which knows layers and is not known by them.
LATENT_CACHE: dict[str, Callable[[PreTrainedModel, Mapping[str, dict]], None]] = {}


class LowRankQuantizer(HfQuantizer):
    """Builds the low-rank layers before the weights are read, and takes them out again on ``dequantize``."""

    quantization_config: LowRankConfig
    requires_calibration = True  # from_pretrained(dense, quantization_config=LowRankConfig()) is refused

    loading = False
    quantized: Mapping[str, dict] = {}

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **_):
        self.loading = True
        self._follow_prefix(model)
        modules = self.quantization_config.modules
        take_apart_for(model, modules)
        layers = dict(model.named_modules())
        for name, spec in modules.items():
            layer = as_linear(layers[name]) if name in layers else None
            if not isinstance(layer, nn.Linear):
                raise CheckpointError(
                    f"config.json names a compressed layer {name}, but the model has no such linear layer"
                )
            model.set_submodule(name, empty_layer(name, layer, spec))
        follow_factors(model)
        _check_latent(model, self.latent_layers)
        if self.latent_layers:
            LATENT_CACHE["attach"](model, self.latent_layers)
        if checkpoint_files:
            folder = Path(checkpoint_files[0]).parent
            manifest.check_files([folder / CONFIG, *checkpoint_files])
            stored = headers(checkpoint_files)
            prefix = f"{model.base_model_prefix}." if model.base_model is model else ""
            self.quantized = make_room(model, checkpoint_files, stored, prefix)
            guard.expect(model, modules, stored)
            _check_factors(model, modules, stored)
            check_dtypes(read_json(folder / CONFIG), stored)
            check_fits(model, stored)

    def _process_model_after_weight_loading(self, model, **_):
        model.is_quantized = False  # the factors are plain numbers of the model's dtype: .half() and .float() cast them
        if self.loading:
            put_together(model, self.quantized)
            check_finite(model)
            for name, layer in model.named_modules():
                if isinstance(layer, CompressedLayer):
                    _check_values(name, layer)
        return model

    def _follow_prefix(self, model) -> None:
        """Where a model is read without its head, the names of its layers lack the prefix."""
        if model.base_model is model:
            config, prefix = self.quantization_config, f"{model.base_model_prefix}."
            config.modules = {name.removeprefix(prefix): spec for name, spec in config.modules.items()}
            if config.latent_cache:
                layers = {name.removeprefix(prefix): spec for name, spec in self.latent_layers.items()}
                config.latent_cache = config.latent_cache | {"layers": layers}

    @property
    def latent_layers(self) -> dict:
        """The attention layers that cache latents."""
        return (self.quantization_config.latent_cache or {}).get("layers", {})

    def _dequantize(self, model, dtype=None):  # the factors keep their dtype, as all other parameters do
        for name in self.quantization_config.modules:
            if any(tensor.is_meta for tensor in compressed_layer(model, name).state_dict().values()):
                raise ValueError(
                    f"layer {name} is offloaded, so its numbers are not at hand: load the model in memory first"
                )
        LATENT_CACHE["detach"](model, self.latent_layers)
        make_plain(model)
        for name in self.quantization_config.modules:
            model.set_submodule(name, compressed_layer(model, name).to_linear())
        put_together_all(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        config = self.quantization_config
        check_plain(model, stored=True)
        note_changes(model, config)
        state, about = taken_apart(model.state_dict())
        return {**state, **guard.tensors(config.modules)}, guard.metadata(config) | about

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        # The stand-in for the cache, and experts apart, are Python that dynamo does not follow.
        return not self.latent_layers and not any(map(parameter_of, self.quantization_config.modules))


if METHOD not in AUTO_QUANTIZER_MAPPING:  # a reload of this module would register twice
    register_quantization_config(METHOD)(LowRankConfig)
    register_quantizer(METHOD)(LowRankQuantizer)


def empty_layer(name: str, layer: nn.Linear, spec: dict) -> CompressedLayer:
    try:
        sizes = dict(spec)
        kind = LAYERS[sizes.pop("layer", LowRankLinear.kind)]
        if not all(type(size) is int for size in sizes.values()):
            raise TypeError("a size is a whole number")
        return kind.like(layer, **sizes)
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"config.json gives layer {name} {spec}: {error}") from error


def compressed_layer(model: nn.Module, name: str) -> CompressedLayer:
    """The layer of this name, which is compressed."""
    return cast(CompressedLayer, model.get_submodule(name))


def describe(layer: CompressedLayer) -> dict:
    """What config.json says of a layer."""
    kind = {} if layer.kind == LowRankLinear.kind else {"layer": layer.kind}
    return kind | layer.spec() | layer.left()


def _check_factors(model: PreTrainedModel, modules: Iterable[str], stored: Mapping[str, Stored]) -> None:
    """Without this an absent factor would be initialised at random, with a warning."""
    found = matched(model, stored)
    for name in modules:
        layer = model.get_submodule(name)
        for key, parameter in (*layer.named_parameters(prefix=name), *layer.named_buffers(prefix=name)):
            entry = found[key][1] if key in found else None
            if key in found and (entry is None or entry.shape != tuple(parameter.shape)):
                what = f"has shape {entry.shape}" if entry else "is missing"
                raise CheckpointError(f"checkpoint: factor {key} {what}, expected {tuple(parameter.shape)}")


def _check_values(name: str, layer: CompressedLayer) -> None:
    """Whole numbers are not checked by being finite: an order is a permutation."""
    order: Tensor | None = getattr(layer, "order", None)
    if order is not None and not order.is_meta and order.sort().values.tolist() != list(range(len(order))):
        raise CheckpointError(f"checkpoint: {name}.order is no order of {len(order)} outputs")


def _check_latent(model: nn.Module, layers: dict) -> None:
    modules = dict(model.named_modules())
    for name, spec in layers.items():
        keys, values = (modules.get(f"{name}.{part}") for part in ("k_proj", "v_proj"))
        if not (isinstance(keys, LowRankLinear) and isinstance(values, LowRankLinear)):
            raise CheckpointError(f"config.json gives {name} a latent cache, but not its k_proj and v_proj a rank")
        kinds = {key: type(value) for key, value in spec.items()}
        told = {"absorb": bool} | kinds == {"rotated": int, "joint": bool, "absorb": bool}
        if not told or not 0 <= spec["rotated"] <= getattr(modules[name], "head_dim", -1):
            raise CheckpointError(f"config.json gives {name} the latent cache {spec}")
        if spec["joint"] and keys.rank != values.rank:
            raise CheckpointError(f"config.json gives {name} one latent of two ranks, {keys.rank} and {values.rank}")


def is_compressed(model: nn.Module) -> bool:
    """Whether the model holds layers of ours."""
    return any(isinstance(module, CompressedLayer) for module in model.modules())


def mark_compressed(model: nn.Module, names: Iterable[str], **details) -> None:
    """Let transformers know, so that ``save_pretrained`` writes and ``dequantize`` finds the compressed layers.

    ``names`` are those of the layers exchanged; added to what an earlier compression has told.
    """
    if not isinstance(model, PreTrainedModel):
        return
    known = before.to_dict() if (before := section_of(model)) else {}
    modules = {name: describe(compressed_layer(model, name)) for name in names}
    if base := known.get("base_model") or model_card.base_of(model):
        details |= {"base_model": base}
    config = LowRankConfig(**known | details | {"modules": known.get("modules", {}) | modules})
    quantizer = LowRankQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer  # pyright: ignore[reportArgumentType]  # an attribute like any other
    quantizer.postprocess_model(model)
    model.quantization_method = METHOD  # pyright: ignore[reportArgumentType]


def check_unwrapped(model: nn.Module) -> None:
    """Raise ``ValueError`` for a module that only holds a model of transformers, and is none."""
    if not isinstance(model, PreTrainedModel):
        held = ((name, type(m).__name__) for name, m in model.named_modules() if isinstance(m, PreTrainedModel))
        for name, inner in held:
            kind = type(model).__name__
            raise ValueError(f"{kind} is a wrapper of a model: give the model itself, its {name} ({inner})")


def check_target(folder: str | Path) -> None:
    """Raise ``OSError`` unless ``save`` can put a checkpoint there, over nothing, an empty folder, or an older model.

    A folder is an older model's if it has a config.json and nothing but files of ``MODEL_FILES``: what is replaced is then
    no more than ``save`` writes. A README.md is no loss: one that is not ours is kept. Symbolic links are followed.
    """
    place = reached(folder)
    if place.resolve() == Path.cwd().resolve():
        raise FileExistsError(f"cannot write {folder}: it is the folder this runs in")
    if place.is_file():
        raise FileExistsError(f"cannot write {folder}: it is a file, a checkpoint is a folder")
    held = sorted(place.iterdir()) if place.is_dir() else []
    if held and not (place / "config.json").is_file():
        raise FileExistsError(f"cannot write {folder}: it holds something that is not a model")
    for entry in held:
        if entry.name == model_card.NAME and entry.is_file():
            continue
        if not entry.is_file() or not any(fnmatchcase(entry.name, name) for name in MODEL_FILES):
            raise FileExistsError(f"cannot write {folder}: beside a model it holds {entry.name}, which would be lost")
    check_writable(folder, folder=True)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    report: dict | None = None,
    max_shard_size: int | str | None = None,
    write: Callable[[PreTrainedModel, Path], None] | None = None,
) -> None:
    """Write model and tokenizer as a folder that ``load`` and, after ``import nsvd``, ``from_pretrained`` read.

    The folder appears when everything is written; an older model there is replaced whole, anything else is refused.
    ``report`` is put beside the weights as ``nsvd_report.json``, the sums of all files as ``nsvd_manifest.json``, and a card of
    a compressed model as README.md, unless there is one that was not written here. ``write`` puts the weights and the
    configuration of the model into a folder; by default it is ``save_pretrained``, which makes files of ``max_shard_size`` at
    most (bytes, or such as ``"2GB"``). Files on how to read images and sounds are copied from the folder that the model came from.

    Raises:
        OSError: if the folder cannot be written, or something else than a model would be lost.
        ValueError: if the model is wrapped or quantized, or a parameter is on ``meta`` or holds NaN or Inf.
    """
    check_target(folder)
    check_unwrapped(model)
    check_plain(model, stored=is_compressed(model))
    place = reached(folder)
    kept = place / model_card.NAME if (place / model_card.NAME).is_file() else None
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if write is None and empty is not None:
        raise ValueError(f"cannot write {folder}: the parameter {empty} is on the device meta, so it has no values")
    if write is None:
        check_finite(model)
    with replacing(folder) as part, quiet():
        size: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        model.save_pretrained(part, **size) if write is None else write(model, part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        copy_processors(model.config, part)
        if report is not None:
            (part / "nsvd_report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if kept is not None and not model_card.is_ours(kept):
            (part / model_card.NAME).write_bytes(kept.read_bytes())
        elif (section := section_of(model)) is not None:
            card = model_card.text(model, section.to_dict(), report)
            (part / model_card.NAME).write_text(card, encoding="utf-8")
        for file in part.glob("*.safetensors"):
            guard.sort_metadata(file)
        manifest.write(part)
