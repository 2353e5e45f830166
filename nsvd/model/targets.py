"""Which layers of a model are compressed."""

from __future__ import annotations

from torch import Tensor, nn

from nsvd.model.layers import CompressedLayer


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are compressed, by dotted name: every ``nn.Linear`` but the output embedding.

    Raises:
        ValueError: if there is none; the message names what the model has instead.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = {id(part) for m in model.modules() if isinstance(m, CompressedLayer) for part in m.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and id(module) not in inside
    }
    if not found:
        kinds = {type(m).__name__ for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor)}
        if "Conv1D" in kinds:
            raise ValueError(
                f"{type(model).__name__} keeps its weights in Conv1D layers (as GPT-2 does), which are not supported; "
                "only nn.Linear layers are compressed"
            )
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear layer left to compress (it has {', '.join(sorted(kinds))})"
        )
    return found
