"""Perplexity and bits per byte, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from nsvd.lab.tokens import bytes_per_token
from nsvd.walk.loss import check_text, divergence_of, window_losses
from nsvd.walk.text import predictions, windows_at_once


@dataclass(frozen=True)
class Evaluation:
    """Mean negative log-likelihood of each window, in nats per predicted token.

    All windows predict equally many tokens (``per_window``), so the plain mean is the token-weighted one.
    """

    losses: Tensor  # (count,), float64
    per_window: int
    bytes_per_token: float | None = None

    @property
    def nll(self) -> float:
        """Nats per token."""
        return self.losses.mean().item()

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def standard_error(self) -> float:
        """Of ``nll``, windows taken as independent; so it is the relative standard error of the perplexity."""
        return (self.losses.std() / len(self.losses) ** 0.5).item() if len(self.losses) > 1 else math.nan

    @property
    def bits_per_byte(self) -> float:
        """nll in bits, over the mean number of UTF-8 bytes of a predicted token."""
        if self.bytes_per_token is None:
            raise ValueError("bits per byte need the tokenizer: evaluate(model, windows, tokenizer)")
        return self.nll / math.log(2) / self.bytes_per_token


def evaluate(
    model: nn.Module,
    windows: Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """The loss of a model on windows (count, length). Every token but the first of a window is predicted from those before it.

    Raises:
        ValueError: if there is no window, a window has fewer than two tokens, or the model cannot read them.
        FloatingPointError: if a loss is NaN or Inf.
    """
    losses = window_losses(model, windows, batch=batch, progress=progress)
    size = None if tokenizer is None else bytes_per_token(tokenizer, windows[:, 1:])
    return Evaluation(losses, windows.shape[1] - 1, size)


@torch.no_grad()
def divergence(model: nn.Module, dense: nn.Module, windows: Tensor, *, batch: int | None = None) -> float:
    """Mean KL(p_dense ‖ p_model) of the next token, in nats a token: what the model has forgotten of the dense one.

    Every position but the last of each window (count, length), as in ``evaluate``.

    Raises:
        ValueError: if there is no window, a window has fewer than two tokens, or the model cannot read them.
        FloatingPointError: if it is NaN or Inf.
    """
    for one in (model, dense):
        check_text(one, windows)
    device, found = next(model.parameters()).device, []
    for ids in windows.split(batch or windows_at_once(model, windows.shape[1])):
        both = (predictions(one, ids.to(next(one.parameters()).device)) for one in (model, dense))
        for ours, theirs in zip(*both, strict=True):
            found.append(divergence_of(theirs.to(device), ours))
    total = torch.stack(found).sum().item()
    if not math.isfinite(total):
        raise FloatingPointError("the divergence from the dense model is NaN or Inf")
    return total / (len(windows) * (windows.shape[1] - 1))


def perplexity(model: nn.Module, windows: Tensor, **options) -> float:
    """Token-weighted perplexity over ``windows`` (count, length); see ``evaluate``."""
    return evaluate(model, windows, **options).perplexity


def average_improvement(perplexities: Sequence[float], reference: Sequence[float]) -> float:
    """Mean relative reduction of perplexity against a reference, the NSVD paper's "Avg. impro.": mean of 1 − p / p_ref.

    NaN where there is nothing to average.
    """
    return _mean([1 - p / r for p, r in zip(perplexities, reference, strict=True)])


def excess_closed(perplexities: Sequence[float], reference: Sequence[float], dense: Sequence[float]) -> float:
    """Mean share of the reference's excess log-perplexity over the dense model that is closed: 1 − ln(p/d) / ln(p_ref/d).

    NaN where there is nothing to average.
    """
    rows = zip(perplexities, reference, dense, strict=True)
    return _mean([1 - math.log(p / d) / math.log(r / d) for p, r, d in rows])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
