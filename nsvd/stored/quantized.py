"""Weights that another library has quantized in place, torchao's for one: tensors that hold others.

Those of torchao are stored, in a compressed model, as the tensors that they hold, under torchao's names for them; the rest that
makes one of them is an entry ``torchao`` in the header of every weight file. No pickle is written or read.
"""

# pyright: reportMissingImports=false
# torchao is no dependency: it is imported where it is met.
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from nsvd.stored.folder import CheckpointError, Stored

TORCHAO = "torchao"
DTYPES = {
    "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64, "F32": torch.float32, "F16": torch.float16,
    "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def is_quantized(value: Tensor) -> bool:
    """Whether a tensor is made of others; one that is plain numbers, but in parts on several devices, is not meant."""
    return is_traceable_wrapper_subclass(value) and not hasattr(value, "device_mesh")


def check_plain(model: nn.Module, *, stored: bool = False) -> None:
    """Raise ``ValueError`` naming the first weight that is quantized; with ``stored``, that torchao cannot take apart."""
    for name, value in model.named_parameters():
        if is_quantized(value) and not (stored and type(value).__name__ in _known()):
            kind = type(value).__name__
            raise ValueError(
                f"{name} is quantized ({kind}) and cannot be saved: save the model first, quantize it when loaded"
            )


def taken_apart(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to be stored for these, and what goes into the header."""
    quantized = {name: value for name, value in state.items() if is_quantized(value)}
    plain = {name: value for name, value in state.items() if name not in quantized}
    if not quantized:
        return plain, {}
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    parts, about = flatten_tensor_state_dict(quantized)
    return plain | parts, {TORCHAO: json.dumps({name: json.loads(about[name]) for name in quantized}, sort_keys=True)}


def make_room(
    model: PreTrainedModel, files: Iterable[str | Path], stored: Mapping[str, Stored], prefix: str
) -> dict[str, dict]:
    """Let linear layers load what their quantized weights hold; returns what the header tells of each of these, by name.

    The model has those that begin with ``prefix``, and without it. Raises ``CheckpointError`` if the header tells of others than
    linear layers, or torchao is not installed.
    """
    with safe_open(next(iter(files)), "pt") as file:
        text = (file.metadata() or {}).get(TORCHAO)
    try:
        about = {name: dict(entry) for name, entry in json.loads(text or "{}").items() if name.startswith(prefix)}
        for name, entry in about.items():
            layer = model.get_submodule(name.removeprefix(prefix).removesuffix(".weight"))
            if not isinstance(layer, nn.Linear) or entry["_type"] not in _known():
                raise TypeError(f"{name} is {entry['_type']}")
            if name.removeprefix(prefix) not in model.all_tied_weights_keys:  # these transformers sets
                layer.register_parameter("weight", None)
            for part in entry["_tensor_data_names"]:
                told = stored[_part(name, part)]
                layer.register_buffer(
                    f"_weight_{part}", torch.empty(told.shape, dtype=DTYPES[told.dtype], device="meta")
                )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        hint = "" if _known() else " (torchao is not installed: pip install torchao)"
        raise CheckpointError(f"the weights that torchao has quantized cannot be read: {error}{hint}") from error
    return {name.removeprefix(prefix): entry for name, entry in about.items()}


def put_together(model: PreTrainedModel, about: Mapping[str, dict]) -> None:
    """Make the quantized weights of what ``make_room`` has let them load. Raises ``CheckpointError`` naming one that is none."""
    for name, entry in about.items():
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        layer = model.get_submodule(name.removesuffix(".weight"))
        parts = {part: cast(Tensor, layer._buffers.pop(f"_weight_{part}")) for part in entry["_tensor_data_names"]}
        for part, value in parts.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise CheckpointError(f"{_part(name, part)} holds NaN or Inf")
        try:
            header = {"tensor_names": json.dumps([name]), name: json.dumps(entry)}
            weight = unflatten_tensor_state_dict({_part(name, part): v for part, v in parts.items()}, header)[0][name]
            if tuple(weight.shape) != (layer.out_features, layer.in_features):
                raise ValueError(f"it has shape {tuple(weight.shape)}")
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the quantized weight {name} cannot be read: {error}") from error
        if weight.dtype != model.dtype:
            kinds = (str(dtype).removeprefix("torch.") for dtype in (weight.dtype, model.dtype))
            raise CheckpointError("{} is quantized from {}, and cannot be loaded in {}".format(name, *kinds))
        layer.weight = nn.Parameter(weight, requires_grad=False)


def make_plain(model: nn.Module) -> None:
    """Multiply quantized weights out, in place."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if is_quantized(value):
                setattr(module, name, nn.Parameter(value.dequantize(), requires_grad=False))


def _part(name: str, part: str) -> str:
    """What torchao calls a tensor that a weight holds."""
    return f"{name.removesuffix('weight')}_weight_{part}"


def _known() -> list[str]:
    """The kinds of tensor that torchao takes apart and puts together; none where it is not installed."""
    try:
        from torchao.prototype.safetensors.safetensors_utils import ALLOWED_TENSORS_SUBCLASSES
    except ModuleNotFoundError:
        return []
    return ALLOWED_TENSORS_SUBCLASSES
