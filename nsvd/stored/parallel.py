"""How transformers splits a compressed model over several devices (tensor parallelism)."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from nsvd.stored.experts import ExpertsApart
from nsvd.stored.layers import CompressedLayer, LowRankLinear

SPLIT = {"colwise": "up", "rowwise": "down"}  # by outputs, by inputs: the factor that has them


def follow_factors(model: PreTrainedModel) -> None:
    """Let the plan of a model split low-rank layers as it does dense ones: by the outputs of ``up``, or the inputs of ``down``.

    A plan is made for all layers of one name. Where some of them are dense, or compressed in another way, there is none, and
    transformers refuses to split the model.
    """
    kinds: dict[str, set[type[nn.Module]]] = {}
    for name, layer in model.named_modules():
        kinds.setdefault(re.sub(r"\d+", "*", name), set()).add(type(layer))
    plan = model.tp_plan or {}
    for name, style in list(plan.items()):
        found = kinds.get(name, set())
        if found == {LowRankLinear} and style in SPLIT:
            plan[f"{name}.{SPLIT[style]}"] = plan.pop(name)
        elif any(issubclass(kind, (CompressedLayer, ExpertsApart)) for kind in found):
            plan.clear()
            return
