"""What a model says to a text: the negative log-likelihood of its tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from tqdm.auto import tqdm

from nsvd.linalg.precision import double
from nsvd.walk.text import check_readable, check_token_ids, predictions, windows_at_once


@torch.no_grad()
def window_losses(
    model: nn.Module, windows: Int[Tensor, "count length"], *, batch: int | None = None, progress: bool = False
) -> Float[Tensor, " count"]:
    """Mean nats per token of each window, every token but the first predicted from those before it; float64, on the CPU.

    ``batch`` windows are read at a time, by default as many as ``nsvd.walk.text`` allows logits for.

    Raises:
        ValueError: if there is no window, windows of fewer than two tokens, or such as the model cannot read.
        FloatingPointError: if a loss is NaN or Inf.
    """
    check_text(model, windows)
    batches = windows.split(batch or windows_at_once(model, windows.shape[1]))
    losses = [token_losses(model, ids).mean(1) for ids in tqdm(batches, "evaluate", disable=not progress, leave=False)]
    losses = torch.cat(losses).cpu()
    if not losses.isfinite().all():
        raise FloatingPointError(f"the loss of window {int((~losses.isfinite()).nonzero()[0])} is NaN or Inf")
    return losses


@torch.no_grad()
def token_losses(model: nn.Module, ids: Int[Tensor, "n length"]) -> Float[Tensor, "n rest"]:
    """Nats of every token but the first of windows that are read together; float64, on the device of the model."""
    ids, parts, done = ids.to(next(model.parameters()).device), [], 1
    for logits in predictions(model, ids):
        wanted = ids[:, done : done + logits.shape[1]]
        # a window at a time: what is made of logits is as large as they are
        each = zip(logits, wanted, strict=True)
        parts.append(torch.stack([double(cross_entropy(row.float(), w, reduction="none")) for row, w in each]))
        done += logits.shape[1]
    return torch.cat(parts, 1)


def divergence_of(
    dense: Float[Tensor, "n length vocabulary"], ours: Float[Tensor, "n length vocabulary"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Σ KL(p_dense ‖ p_ours) over all positions, in nats, of logits that are divided by the temperature; float64.

    Every term is computed in float32 at least.
    """
    parts, dtype = [], torch.promote_types(ours.dtype, torch.float32)
    for pair in zip(dense, ours, strict=True):  # a window at a time: what is made of logits is as large as they are
        theirs, mine = ((logits.to(dtype) / temperature).log_softmax(-1) for logits in pair)
        parts.append(double(kl_div(mine, theirs, reduction="sum", log_target=True)))
    return torch.stack(parts).sum()


def check_text(model: nn.Module, windows: Tensor) -> None:
    """Raise ``ValueError`` unless there is a token to predict in every window, and the model can read them."""
    check_token_ids(windows)
    if windows.ndim != 2 or len(windows) == 0 or windows.shape[1] < 2:
        raise ValueError(f"windows must be a (count, length ≥ 2) tensor of token ids, not {tuple(windows.shape)}")
    check_readable(model, windows)
