"""Compressed folders in vLLM: its plugin, which vLLM loads in every process by the entry point ``vllm.general_plugins``.

vLLM joins layers that read the same input (queries, keys and values; gate and up) into one. Each part of such a layer keeps
its own rank here, or stays dense. Under tensor parallelism a layer that is split by outputs has ``down`` whole in every
process and the rows of ``up`` in parts, one that is split by inputs the columns of ``down`` in parts and ``up`` whole.
Pivoted factors have ``up`` whole in both, and of ``order`` the outputs of the process.

Only vLLM imports this module. It was run with vLLM 0.32 on a CPU, and read against the interfaces of 0.33.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper

from nsvd.stored import guard
from nsvd.stored.experts import parameter_of
from nsvd.stored.folder import METHOD
from nsvd.stored.layers import LowRankLinear, PivotedLinear
from nsvd.stored.section import LowRankConfig

PLAIN, PIVOTED = LowRankLinear.kind, PivotedLinear.kind
KEYS = ("weight", "down.weight", "up.weight", "order")
PARTS: dict[object, int] = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of a joined layer; others have numbers


def register() -> None:
    """Teach vLLM our folders; as often as it likes."""
    register_quantization_config(METHOD)(ServedConfig)


class ServedConfig(QuantizationConfig):
    """What vLLM reads out of ``quantization_config`` in config.json.

    Raises:
        ValueError: for what vLLM cannot run: split layers, experts, a latent cache.
    """

    def __init__(self, modules: Mapping[str, dict]) -> None:
        super().__init__()
        self.modules = {name: {"layer": PLAIN} | spec for name, spec in modules.items()}
        self.notes = set(guard.tensors(self.modules))
        self.plain = {name for name, spec in self.modules.items() if spec["layer"] == PLAIN}
        for name, spec in self.modules.items():
            if spec["layer"] not in (PLAIN, PIVOTED):
                raise ValueError(f"vLLM cannot run layer {name}, which is {spec['layer']}: dequantize the model first")
            if "outputs" in spec or "inputs" in spec:
                raise ValueError(
                    f"vLLM cannot run layer {name}, which has lost neurons: compress with neurons=0, or dequantize the model first"
                )
            if parameter_of(name) is not None:
                raise ValueError(f"vLLM cannot run expert {name}, which is compressed: dequantize the model first")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ServedConfig:
        told = LowRankConfig(**config)
        if told.latent_cache:
            raise ValueError("vLLM has a KV cache of its own, not the latent one of this model: dequantize it first")
        return cls(told.modules)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # nothing but torch's own products

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Follow a model whose layers have other names in vLLM than in the files."""
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)
        self.notes |= {*hf_to_vllm_mapper.apply_list(sorted(self.notes))}
        self.plain |= {*hf_to_vllm_mapper.apply_list(sorted(self.plain))}

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Passes over the two tensors of ``guard``; the bias of plain factors becomes that of the layer.

        Some models put a prefix before all names.
        """
        notes = {re.compile(rf"(^|\.){re.escape(key)}$"): None for key in self.notes}
        plain = "|".join(map(re.escape, sorted(self.plain)))
        return WeightsMapper(orig_to_new_regex=notes | {re.compile(rf"(^|\.)({plain})\.up\.bias$"): r"\1\2.bias"})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How the layer of this name computes; None for what is no linear layer, which then stays as it is."""
        before, dot, last = prefix.rpartition(".")
        parts = [last] if prefix in self.modules else self.packed_modules_mapping.get(last, [last])
        specs = {before + dot + part: self.modules.get(before + dot + part) for part in parts}
        if not isinstance(layer, LinearBase):
            if any(specs.values()):
                raise ValueError(f"vLLM cannot run {prefix}, which is compressed, in a {type(layer).__name__}")
            return None
        return FactorsMethod(specs) if any(specs.values()) else UnquantizedLinearMethod()


class FactorsMethod(LinearMethodBase):
    """A linear layer of vLLM, of one part or of several joined ones, some of them low-rank (``specs`` by name, None for dense).

    The numbers of all parts lie one after another in ``down.weight``, ``up.weight`` and ``order``, those of dense parts in
    ``weight``.
    """

    supports_pre_processed_weights = True  # nothing is changed once it is loaded

    def __init__(self, specs: Mapping[str, dict | None]) -> None:
        self.names, self.specs = list(specs), list(specs.values())
        self.ranks = [spec["rank"] if spec else 0 for spec in self.specs]
        self.pivoted = [spec is not None and spec["layer"] == PIVOTED for spec in self.specs]

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Empty parameters of the sizes that this process holds. Raises ``ValueError`` if the parts are not those of the layer."""
        d_in, sizes = input_size_per_partition, output_partition_sizes
        joined = len(self.names) > 1  # else all blocks of outputs may be one layer in the files, too
        self.blocks = [[size] for size in sizes] if joined else [sizes]
        if len(self.blocks) != len(self.names):
            raise ValueError(f"vLLM has {len(sizes)} parts where the model has {', '.join(self.names)}")
        self.inputs, self.outputs = (
            input_size // d_in,
            output_size // sum(sizes),
        )  # over how many processes they are split
        self.shapes: dict[str, list[tuple[int, ...]]] = {key: [] for key in KEYS}
        for blocks, rank, pivoted in zip(self.blocks, self.ranks, self.pivoted, strict=True):
            out = sum(blocks)
            rows = out * self.outputs - rank if pivoted else out
            shapes = (0 if rank else out, d_in), (rank, d_in), (rows, rank), (out if pivoted else 0,)
            for key, shape in zip(KEYS, shapes, strict=True):
                self.shapes[key].append(shape)
        layer.down, layer.up = nn.Module(), nn.Module()
        for key, shapes in self.shapes.items():
            if count := sum(map(prod, shapes)):
                empty, dtype = (-1, torch.int64) if key == "order" else (float("nan"), params_dtype)
                parameter = nn.Parameter(torch.full((count,), empty, dtype=dtype), requires_grad=False)
                parameter.weight_loader = partial(self._load, layer, key)  # pyright: ignore[reportAttributeAccessIssue]
                place, _, name = key.rpartition(".")
                layer.get_submodule(place).register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raise ``ValueError`` naming a tensor that no file has given."""
        for key in self.shapes:
            for name, value in zip(self.names, self._parts(layer, key), strict=True):
                if ((value < 0) if key == "order" else value.isnan()).any():
                    raise ValueError(f"{name}.{key} is not in the files, or holds NaN")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y (…, d_out) of x (…, d_in), in the sizes that this process holds."""
        latents = F.linear(x, layer.down.weight.view(-1, x.shape[-1])).split(self.ranks, dim=-1)
        dense, ups, orders = (self._parts(layer, key) for key in ("weight", "up.weight", "order"))
        outputs = []
        for part, z in enumerate(latents):
            y = F.linear(z, ups[part]) if self.ranks[part] else F.linear(x, dense[part])
            if self.pivoted[part]:
                y = torch.cat([z, y], dim=-1).index_select(-1, orders[part])
            outputs.append(y)
        y = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        return y if bias is None else y + bias

    def _parts(self, layer: Any, key: str) -> list[Tensor]:
        """What each part has of a parameter, as views of it."""
        place, _, name = key.rpartition(".")
        value = getattr(layer.get_submodule(place), name, None)
        if value is None:
            return [layer.down.weight.new_empty(0)] * len(self.names)
        pieces = value.detach().split([prod(shape) for shape in self.shapes[key]])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes[key], strict=True)]

    def _load(
        self, layer: Any, key: str, _parameter: nn.Parameter, stored: Tensor, part: str | int | None = None
    ) -> None:
        """Take out of a tensor of the files what belongs to this process."""
        number = 0 if part is None and len(self.names) == 1 else PARTS.get(part, part)
        if not isinstance(number, int):
            raise ValueError(f"{key} of {', '.join(self.names)} is stored joined")
        place, mine = self._parts(layer, key)[number], stored
        if key == "down.weight" and self.inputs > 1:
            mine = _own(mine, 1, [place.shape[1]], layer.tp_rank, self.inputs)
        if key in ("weight", "order" if self.pivoted[number] else "up.weight") and self.outputs > 1:
            mine = _own(mine, 0, self.blocks[number], layer.tp_rank, self.outputs)
        if mine.shape != place.shape:
            sizes = f"{tuple(stored.shape)}, vLLM takes {tuple(place.shape)} of it"
            raise ValueError(f"{self.names[number]}.{key} has shape {sizes}")
        place.copy_(mine)


def _own(stored: Tensor, dim: int, blocks: list[int], rank: int, of: int) -> Tensor:
    """The share of one process ``rank`` of several; it has so many of each of the blocks along ``dim``."""
    held = stored.shape[dim]
    if sum(blocks) * of == held:
        pieces = stored.split([size * of for size in blocks], dim)
        own = [piece.narrow(dim, rank * size, size) for piece, size in zip(pieces, blocks, strict=True)]
        return torch.cat(own, dim)
    if len(blocks) == 1 and held % blocks[0] == 0 and blocks[0] * of % held == 0:  # fewer heads than processes
        return stored.narrow(dim, rank * held // of // blocks[0] * blocks[0], blocks[0])
    return stored  # its shape will be refused
