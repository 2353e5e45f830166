"""Low-rank checkpoints: safetensors and a config.json, read by transformers itself once ``nsvd`` is imported.

transformers' quantizer extension point is used: ``quantization_config`` in config.json names the compressed layers and
their ranks, ``from_pretrained`` builds them before any weight is read. No pickle and no remote code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from nsvd.model.files import check_writable, replacing
from nsvd.model.latent import attach, detach
from nsvd.model.layers import LAYERS, CompressedLayer, LowRankLinear

FORMAT = 1
METHOD = "nsvd"
MODEL_FILES = (  # what ``save`` may find in the place of a model: names that transformers and we give, no others
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "nsvd_report.json",
)  # fmt: skip


class CheckpointError(ValueError):
    """A model folder that cannot be read as what it says it is."""


class LowRankConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model.

    ``modules`` maps layer names to {"layer": kind, "rank": k, …}, the kind (of ``layers.LAYERS``) left out where it is
    low-rank. ``latent_cache``, where there is one, tells how the KV cache was compressed; its ``layers`` map the names of
    attention layers to {"rotated": int, "joint": bool, "absorb": bool}, the last left out for False, see ``latent.attach``.
    """

    def __init__(
        self, modules: dict | None = None, format_version: int = FORMAT, latent_cache: dict | None = None, **details
    ):
        details.pop("quant_method", None)
        self.quant_method = METHOD
        self.format_version = format_version
        self.modules = dict(modules or {})
        self.latent_cache = latent_cache
        for name, value in details.items():  # method, ratio, options, …: kept, also when a later version adds some
            setattr(self, name, value)


class LowRankQuantizer(HfQuantizer):
    """Builds the low-rank layers before the weights are read, and takes them out again on ``dequantize``."""

    requires_calibration = True  # from_pretrained(dense, quantization_config=LowRankConfig()) is refused

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **_):
        modules, version = self.quantization_config.modules, self.quantization_config.format_version
        if not isinstance(version, int) or version > FORMAT:
            raise CheckpointError(f"checkpoint format {version} is newer than this nsvd reads ({FORMAT})")
        layers = dict(model.named_modules())
        for name, spec in modules.items():
            if not isinstance(layers.get(name), nn.Linear):
                raise CheckpointError(f"config.json names a compressed layer {name}, which the model has not")
            model.set_submodule(name, _empty(name, layers[name], spec))
        _check_latent(model, self.latent_layers)
        attach(model, self.latent_layers)
        if checkpoint_files:
            _check_shapes(model, modules, checkpoint_files)

    def _process_model_after_weight_loading(self, model, **_):
        return model

    @property
    def latent_layers(self) -> dict:
        """The attention layers that cache latents."""
        return (self.quantization_config.latent_cache or {}).get("layers", {})

    def _dequantize(self, model, dtype=None):  # the factors keep their dtype, as all other parameters do
        detach(model, self.latent_layers)
        for name in self.quantization_config.modules:
            model.set_submodule(name, model.get_submodule(name).to_linear())
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True

    @property
    def is_qat_trainable(self):
        return True

    @property
    def is_compileable(self):  # the stand-in for the cache is Python that dynamo does not follow
        return not self.latent_layers


if METHOD not in AUTO_QUANTIZER_MAPPING:  # a reload of this module would register twice
    register_quantization_config(METHOD)(LowRankConfig)
    register_quantizer(METHOD)(LowRankQuantizer)


def _empty(name: str, layer: nn.Linear, spec: dict) -> CompressedLayer:
    try:
        sizes = dict(spec)
        return LAYERS[sizes.pop("layer", LowRankLinear.kind)].like(layer, **sizes)
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"config.json gives layer {name} {spec}: {error}") from error


def describe(layer: CompressedLayer) -> dict:
    """What config.json says of a layer."""
    kind = {} if layer.kind == LowRankLinear.kind else {"layer": layer.kind}
    return kind | layer.spec()


def _check_shapes(model: nn.Module, modules: dict, files: list[str]) -> None:
    """Without this an absent factor would be initialised at random, with a warning."""
    stored = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            keys = tensors.keys()  # safe_open itself cannot be iterated
            stored |= {key: tuple(tensors.get_slice(key).get_shape()) for key in keys}
    for name in modules:
        layer = model.get_submodule(name)
        for key, parameter in (*layer.named_parameters(prefix=name), *layer.named_buffers(prefix=name)):
            if key in model.all_tied_weights_keys:
                continue
            if stored.get(key) != tuple(parameter.shape):
                found = f"has shape {stored[key]}" if key in stored else "is missing"
                raise CheckpointError(f"checkpoint: factor {key} {found}, expected {tuple(parameter.shape)}")


def _check_latent(model: nn.Module, layers: dict) -> None:
    modules = dict(model.named_modules())
    for name, spec in layers.items():
        pair = [modules.get(f"{name}.{part}") for part in ("k_proj", "v_proj")]
        if not all(isinstance(layer, LowRankLinear) for layer in pair):
            raise CheckpointError(f"config.json gives {name} a latent cache, but not its k_proj and v_proj a rank")
        kinds = {key: type(value) for key, value in spec.items()}
        if {"absorb": bool} | kinds != {"rotated": int, "joint": bool, "absorb": bool}:
            raise CheckpointError(f"config.json gives {name} the latent cache {spec}")
        if spec["joint"] and pair[0].rank != pair[1].rank:
            raise CheckpointError(
                f"config.json gives {name} one latent of two ranks, {pair[0].rank} and {pair[1].rank}"
            )


def is_compressed(model: nn.Module) -> bool:
    """Whether the model holds layers of ours."""
    return any(isinstance(module, CompressedLayer) for module in model.modules())


def mark_compressed(model: nn.Module, names: Iterable[str], **details) -> None:
    """Let transformers know, so that ``save_pretrained`` writes and ``dequantize`` finds the compressed layers.

    ``names`` are those of the layers exchanged; added to what an earlier compression has told.
    """
    if not isinstance(model, PreTrainedModel):
        return
    known = model.hf_quantizer.quantization_config.to_dict() if getattr(model, "hf_quantizer", None) else {}
    modules = {name: describe(model.get_submodule(name)) for name in names}
    config = LowRankConfig(**known | details | {"modules": known.get("modules", {}) | modules})
    quantizer = LowRankQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    model.is_quantized, model.quantization_method = True, METHOD


def check_target(folder: str | Path) -> None:
    """Raise ``OSError`` unless ``save`` can put a checkpoint there, over nothing, an empty folder, or an older model.

    A folder is an older model's if it has a config.json and nothing but files of ``MODEL_FILES``: what is replaced is then
    no more than ``save`` writes. Symbolic links are followed.
    """
    folder = Path(folder)
    if folder.resolve() == Path.cwd().resolve():
        raise FileExistsError(f"cannot write {folder}: it is the folder this runs in")
    if folder.is_file():
        raise FileExistsError(f"cannot write {folder}: it is a file, a checkpoint is a folder")
    held = sorted(folder.iterdir()) if folder.is_dir() else []
    if held and not (folder / "config.json").is_file():
        raise FileExistsError(f"cannot write {folder}: it holds something that is not a model")
    for entry in held:
        if not entry.is_file() or not any(fnmatchcase(entry.name, name) for name in MODEL_FILES):
            raise FileExistsError(f"cannot write {folder}: beside a model it holds {entry.name}, which would be lost")
    check_writable(folder, folder=True)


def save(model: PreTrainedModel, tokenizer, folder: str | Path, *, report: dict | None = None) -> None:
    """Write model and tokenizer as a folder that ``load`` and, after ``import nsvd``, ``from_pretrained`` read.

    The folder appears when everything is written; an older model there is replaced whole, anything else is refused.
    ``report`` is put beside the weights as ``nsvd_report.json``.
    """
    check_target(folder)
    with replacing(folder) as part, _quiet():
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        if report is not None:
            (part / "nsvd_report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def default_device() -> str:
    """The GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_folder(folder: str | Path, *, dtype="auto", device: str = "auto"):
    """(model, tokenizer) from a local folder or hub name, in evaluation mode.

    ``dtype="auto"`` keeps the stored one; ``device="auto"`` takes the GPU where there is one.

    Raises:
        CheckpointError: if a tensor is missing, misshaped or unreadable.
        ValueError: if there is no such dtype or device.
    """
    device = default_device() if device == "auto" else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from error
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}; use auto, float32, bfloat16, …")
    try:
        with _quiet():  # a misshaped tensor is reported in ``info``, and raised below
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: a weight file is damaged ({error})") from error
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors missing or misshaped, first {missing[0]}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds a model but no tokenizer that can be read") from error
    return model.to(device).eval(), tokenizer


class _quiet:
    """transformers' loading report and progress bar off; what matters is raised."""

    def __enter__(self):
        from transformers.utils import logging as hf

        self.hub = logging.getLogger("huggingface_hub")
        self.level, self.bar, self.hub_level = hf.get_verbosity(), hf.is_progress_bar_enabled(), self.hub.level
        self.hub.setLevel(logging.ERROR)  # a hub that cannot be reached is told of once, by what is raised
        hf.set_verbosity(logging.ERROR)
        hf.disable_progress_bar()

    def __exit__(self, *_):
        from transformers.utils import logging as hf

        hf.set_verbosity(self.level)
        self.hub.setLevel(self.hub_level)
        if self.bar:
            hf.enable_progress_bar()
