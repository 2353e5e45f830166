"""Weights that another library has quantized in place, torchao's for one: tensors that hold others."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_quantized(value: Tensor) -> bool:
    """Whether a tensor is made of others; one that is plain numbers, but in parts on several devices, is not meant."""
    return is_traceable_wrapper_subclass(value) and not hasattr(value, "device_mesh")


def check_plain(model: nn.Module) -> None:
    """Raise ``ValueError`` naming the first weight that is quantized: a safetensors file does not hold it."""
    for name, value in model.named_parameters():
        if is_quantized(value):
            kind = type(value).__name__
            raise ValueError(
                f"{name} is quantized ({kind}) and cannot be saved: save the model first, quantize it when loaded"
            )
