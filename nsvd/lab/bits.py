"""Weights in few bits, by torchao, beside low rank: rounding alone, factors rounded, and what either takes on disk."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nsvd.stored.experts import are_experts, take_apart
from nsvd.stored.transposed import as_linear

HAS_TORCHAO = find_spec("torchao") is not None
BITS = range(1, 9)
GROUPS = range(24, 65)  # how many weights of a row may share a scale; the whole row where none of these divides it
ONE_SCALE = 8  # bits from which a scale a row is enough
SCALE = 2  # bytes


def quantize_(model: PreTrainedModel, bits: int) -> None:
    """Round the weights of all linear layers but the head to whole numbers of 1 to 8 ``bits``, by torchao, in place.

    Those inside compressed layers are the factors. Experts of one tensor are taken apart, a ``Conv1D`` becomes an ``nn.Linear``.
    Rounding is to nearest, symmetric; 8 bits have a scale a row, fewer a scale for each group of a row. torchao keeps a number
    in a byte where its kernels need it so; ``stored_bytes`` counts bits.

    Raises:
        ValueError: if there are no such bits.
        ModuleNotFoundError: if torchao is not installed.
    """
    if bits not in BITS:
        raise ValueError(f"weights are rounded to 1 to 8 bits, not to {bits}")
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup  # pyright: ignore[reportMissingImports]
    from torchao.quantization import quantize_ as round_  # pyright: ignore[reportMissingImports]

    _only_linear(model)
    for layer in _linear(model):
        width = layer.weight.shape[1]
        groups = [size for size in GROUPS if width % size == 0] if bits < ONE_SCALE else []
        how = PerGroup(max(groups)) if groups else PerAxis(0)
        round_(layer, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=how))


def stored_bytes(model: PreTrainedModel) -> int:
    """What the tensors of a model take in a safetensors folder in bfloat16, rounded weights in their bits with their scales."""
    tied = model.all_tied_weights_keys
    return sum(_bytes(value) for name, value in model.state_dict().items() if name not in tied)


def _only_linear(model: PreTrainedModel) -> None:
    """Make linear layers of all that multiplies by a weight otherwise."""
    for module in [module for module in model.modules() if are_experts(module)]:
        take_apart(module)
    for name, layer in list(model.named_modules()):
        if type(layer) is Conv1D:
            linear = nn.Linear(layer.nx, layer.nf, device="meta")
            linear.weight = nn.Parameter(as_linear(layer).weight.detach().contiguous())
            linear.bias = layer.bias
            model.set_submodule(name, linear.train(layer.training))


def _linear(model: PreTrainedModel) -> list[nn.Linear]:
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]


def _bytes(value: Tensor) -> int:
    if is_traceable_wrapper_subclass(value):  # symmetric: no zero points
        rounded = cast(Any, value)  # by torchao, which says what it holds
        bits = int(str(rounded.target_dtype).removeprefix("torch.int"))
        return -(-value.numel() * bits // 8) + rounded.scale.numel() * SCALE
    return value.numel() * (2 if value.is_floating_point() else value.element_size())
