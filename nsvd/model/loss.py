"""What a model says to a text: the negative log-likelihood of its tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from nsvd.linalg.precision import double
from nsvd.model.hooks import evaluating


@torch.no_grad()
def window_losses(
    model: nn.Module, windows: Int[Tensor, "count length"], *, batch: int | None = None, progress: bool = False
) -> Float[Tensor, " count"]:
    """Mean nats per token of each window, every token but the first predicted from those before it; float64, on the CPU.

    Raises:
        ValueError: if there is no window, or windows of fewer than two tokens.
        FloatingPointError: if a loss is NaN or Inf.
    """
    check_text(windows)
    device = next(model.parameters()).device
    batch = batch or max(1, 4096 // windows.shape[1])
    losses = []
    for ids in tqdm(windows.split(batch), "evaluate", disable=not progress, leave=False):
        ids = ids.to(device)
        with evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        token_losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses.append(double(token_losses.view(len(ids), -1)).mean(1).cpu())
    losses = torch.cat(losses)
    if not losses.isfinite().all():
        raise FloatingPointError(f"the loss of window {int((~losses.isfinite()).nonzero()[0])} is NaN or Inf")
    return losses


def check_text(windows: Tensor) -> None:
    """Raise ``ValueError`` unless there is a token to predict in every window."""
    if windows.ndim != 2 or len(windows) == 0 or windows.shape[1] < 2:
        raise ValueError(f"windows must be a (count, length ≥ 2) tensor of token ids, not {tuple(windows.shape)}")
