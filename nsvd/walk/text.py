"""What a model can read: which tokens, and how many in a row; and what it says to them, within a budget of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from nsvd.stored.checkpoint import check_unwrapped
from nsvd.walk.hooks import evaluating

LOGIT_BYTES = 2**28  # of logits in float32 that are made at a time; what is done with them takes a few times as much
TRIED = 8  # tokens that something is tried on
TOKENS = 4096  # read at a time at most, however small the vocabulary


def check_token_ids(windows: object) -> None:
    """Raise ``ValueError`` for anything but a tensor of whole numbers."""
    if (
        not isinstance(windows, Tensor)
        or windows.is_floating_point()
        or windows.is_complex()
        or windows.dtype == torch.bool
    ):
        kind = windows.dtype if isinstance(windows, Tensor) else type(windows).__name__
        raise ValueError(f"windows must be a tensor of token ids, whole numbers, not {kind}")


def check_readable(model: nn.Module, windows: Int[Tensor, "count length"]) -> None:
    """Raise ``ValueError`` if a token id is not in the model's vocabulary, windows are longer than its learned positions, or
    this is a wrapper of a model.

    A module that holds no ``PreTrainedModel`` does not tell of vocabulary and positions.
    """
    check_unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        return
    known = vocabulary(model)
    for token in (int(windows.min()), int(windows.max())):
        if not 0 <= token < known:
            raise ValueError(
                f"the text holds token {token}, but the model's vocabulary has {known} tokens: "
                "does the tokenizer belong to the model?"
            )
    check_length(model, windows.shape[1])


def vocabulary(model: nn.Module) -> int:
    """How many tokens a model of transformers knows."""
    return cast(nn.Embedding, cast(PreTrainedModel, model).get_input_embeddings()).weight.shape[0]


def check_length(model: nn.Module, length: int) -> None:
    """Raise ``ValueError`` if the model has learned fewer positions."""
    if length > (most := _positions(model) or length):
        raise ValueError(f"cannot read windows of {length} tokens: the model has learned {most} positions")


def trial(model: nn.Module) -> Int[Tensor, "1 tried"]:
    """A few token ids that every model can read, on its device, to try something on.

    They are different, but for a vocabulary that is smaller than their number.
    """
    ids = torch.arange(TRIED, device=next(model.parameters()).device)[None]
    known = getattr(model, "get_input_embeddings", lambda: None)()
    return ids if known is None else ids % known.weight.shape[0]


def _positions(model: nn.Module) -> int | None:
    """How many positions the model has learned; None where it computes them, and any number will do."""
    tokens = cast(PreTrainedModel, model).get_input_embeddings()
    if any(isinstance(module, nn.Embedding) and module is not tokens for module in model.modules()):
        return getattr(cast(PreTrainedModel, model).config.get_text_config(), "max_position_embeddings", None)
    return None


def tokens_at_once(model: nn.Module) -> int:
    """How many tokens' logits take no more than ``LOGIT_BYTES`` in float32: 1 … ``TOKENS``."""
    return min(max(LOGIT_BYTES // (4 * vocabulary(model)), 1), TOKENS)


def windows_at_once(model: nn.Module, length: int) -> int:
    """How many windows of so many tokens are read at a time, one at least."""
    return max(1, tokens_at_once(model) // length)


def predictions(model: nn.Module, ids: Int[Tensor, "n length"]) -> Iterator[Float[Tensor, "n some vocabulary"]]:
    """Logits of every token but the first, in the model's own dtype and in order, ``tokens_at_once`` at a time.

    Where one part is not enough, the body of the model reads the windows once. Its output is put, a part at a time, in the
    place of what it gives for one token, so that the head of the model and all that follows are the model's own. Where the body
    is not found to give out ``last_hidden_state``, the logits come in one part.
    """
    last, most, hidden = ids.shape[1] - 1, max(1, tokens_at_once(model) // len(ids)), []
    if last <= most:
        with evaluating(model):
            yield model(input_ids=ids, use_cache=False).logits[:, :-1]
        return
    for start in range(0, last, most):
        part = slice(start, min(start + most, last))

        def exchange(_module: nn.Module, _args: tuple, out: object, part: slice = part) -> None:
            if isinstance(out, dict) and "last_hidden_state" in out:
                hidden.append(hidden[0] if hidden else out["last_hidden_state"])
                out["last_hidden_state"] = hidden[0][:, part]

        handle = cast(PreTrainedModel, model).get_decoder().register_forward_hook(exchange)
        try:
            with evaluating(model):
                logits = model(input_ids=ids[:, :1] if hidden else ids, use_cache=False).logits
        finally:
            handle.remove()
        if not hidden:
            yield logits[:, :-1]
            return
        yield logits
