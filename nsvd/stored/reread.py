"""A model as it will be once it is saved and read again, made in memory: no file is written, and no number is copied."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from nsvd.stored.checkpoint import compressed_layer, describe
from nsvd.stored.folder import CheckpointError
from nsvd.stored.foreign import Loaded, quiet
from nsvd.stored.section import LowRankConfig


@torch.no_grad()
def reread(model: PreTrainedModel, names: Iterable[str]) -> PreTrainedModel:
    """What ``from_pretrained`` makes of the tensors and the configuration of a model with these compressed layers.

    Names and shapes are changed as on the way to a file and back. The tensors are those of the model itself, but for the
    few that transformers joins or splits on that way. None has numbers unless ``with_numbers``.

    Raises:
        CheckpointError: if transformers cannot read it, or a tensor is lost on the way or comes from nowhere; it is named.
    """
    config = copy.deepcopy(model.config)
    config.quantization_config = LowRankConfig(
        {name: describe(compressed_layer(model, name)) for name in names}
    ).to_dict()
    state = {key: value for key, value in model.state_dict().items() if key not in model.all_tied_weights_keys}
    with quiet():
        again, info = cast(Loaded, type(model).from_pretrained(
            None, config=config, state_dict=revert_weight_conversion(model, state), dtype=model.dtype,
            device_map={"": "cpu" if with_numbers(model) else "meta"}, output_loading_info=True, ignore_mismatched_sizes=True,
        ))  # fmt: skip
    misshaped = [key for key, *_ in info["mismatched_keys"]] + _other_sizes(again)
    wrong = {"missing": info["missing_keys"], "misshaped": misshaped}
    for what, keys in (wrong | {"unexpected": info["unexpected_keys"]}).items():
        if keys:
            raise CheckpointError(f"tensor {min(keys)} is {what}")
    return again.eval()


def _other_sizes(model: PreTrainedModel) -> list[str]:
    """Weights of another size than their layer was made with: older transformers put these in without a word."""
    linear = ((name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear))
    return [f"{name}.weight" for name, part in linear if part.weight.shape != (part.out_features, part.in_features)]


def with_numbers(model: PreTrainedModel) -> bool:
    """Whether all lies in the memory of the CPU: elsewhere loading would take room for a second model."""
    return all(value.device.type == "cpu" for value in model.state_dict().values())
