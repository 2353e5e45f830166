"""The little of vLLM 0.33 that the plugin meets, for where vLLM is not installed: names, signatures, and how weights reach it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

REGISTERED: dict[str, type] = {}


def register_quantization_config(quantization: str):
    return lambda kind: REGISTERED.setdefault(quantization, kind)


@dataclass
class WeightsMapper:
    orig_to_new_regex: dict[re.Pattern, str | None] = field(default_factory=dict)
    orig_to_new_prefix: dict[str, str] = field(default_factory=dict)

    def map_name(self, key: str) -> str | None:
        for pattern, new in self.orig_to_new_regex.items():
            if pattern.search(key):
                if new is None:
                    return None
                key = pattern.sub(new, key)
        for prefix, new in self.orig_to_new_prefix.items():
            if key.startswith(prefix):
                key = key.replace(prefix, new, 1)
        return key

    def apply_list(self, values: list[str]) -> list[str]:
        return [name for value in values if (name := self.map_name(value)) is not None]

    def apply_dict(self, values: dict) -> dict:
        return {name: value for key, value in values.items() if (name := self.map_name(key)) is not None}


class QuantizeMethodBase:
    pass


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class LinearBase(nn.Module):
    """A layer of one or several parts, shared by ``of`` processes: by its outputs, by its inputs, or not at all."""

    def __init__(self, config, prefix: str, d_in: int, sizes: list[int], *, by: str, rank: int = 0, of: int = 1):
        super().__init__()
        self.tp_rank, self.tp_size = rank, of
        self.quant_method = config.get_quant_method(self, prefix)
        mine = [size // of for size in sizes] if by == "outputs" else sizes
        self.inputs = slice(rank * d_in // of, (rank + 1) * d_in // of) if by == "inputs" else slice(None)
        self.quant_method.create_weights(
            layer=self, input_size_per_partition=d_in // of if by == "inputs" else d_in, output_partition_sizes=mine,
            input_size=d_in, output_size=sum(sizes), params_dtype=torch.float32, weight_loader=None,
        )  # fmt: skip

    def take(self, tensors: dict[str, Tensor], part: str | int | None = None) -> None:
        """Load all tensors of a part, by their names within it; a bias goes elsewhere."""
        for name, tensor in tensors.items():
            if not name.endswith("bias"):
                parameter = self.get_parameter(name)
                arguments = () if part is None else (part,)
                parameter.weight_loader(parameter, tensor, *arguments)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.quant_method.apply(self, x[..., self.inputs], bias)


def modules() -> dict[str, ModuleType]:
    """To be put into ``sys.modules``."""
    layers = "vllm.model_executor.layers"
    names = ["vllm", "vllm.model_executor", layers, f"{layers}.linear", f"{layers}.quantization"]
    names += [f"{layers}.quantization.base_config", "vllm.model_executor.models", "vllm.model_executor.models.utils"]
    made = {name: ModuleType(name) for name in names}
    for module in made.values():
        vars(module).update({key: value for key, value in globals().items() if not key.startswith("_")})
    return made


def install(monkeypatch) -> None:
    """For the length of a test."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
