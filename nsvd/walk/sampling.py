"""Text that the model writes itself, to calibrate on where no other is at hand, or beside one."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from nsvd.linalg.precision import double, home
from nsvd.stored.checkpoint import check_unwrapped
from nsvd.walk.caches import caches_of, reserve
from nsvd.walk.hooks import evaluating
from nsvd.walk.processes import gathered, in_turn, mine, share
from nsvd.walk.sums import finite
from nsvd.walk.text import check_length, vocabulary

CACHE_BYTES = 8 * 2**30  # of a batch of windows while they are sampled
MOST_TOKENS = 2**27  # of text that is made up, 1 GiB of ids
DRAWN = 16  # tokens drawn at a time: what is made of their probabilities in float64 is to stay near the processor
OPENING, OPENING_TOKENS = 1.5, 10  # own text begins at this temperature, and is down at 1 after so many tokens


@torch.inference_mode(False)
@torch.no_grad()
def sample(
    model: PreTrainedModel,
    count: int = 128,
    length: int = 256,
    *,
    temperature: float = 1.0,
    opening: float | None = None,
    start: int | None = None,
    batch: int | None = None,
    seed: int = 0,
) -> Int[Tensor, "count length"]:
    """``count`` windows of ``length`` token ids drawn from the model's own distribution, one token after the other.

    At temperature 1 this is the language as the model knows it, all its domains in the proportions it learned them.
    With ``opening`` the first token is drawn at that temperature, which falls linearly to ``temperature`` over ten tokens: the
    windows set out in more directions than the model mostly takes, and go on as it does (after arXiv 2012.07805).
    Every window begins with the token ``start`` (by default the one the model's configuration begins a text with); an end
    of text is an ordinary token, what follows it is a new one. ``batch`` windows are drawn at a time, by default as many as
    their cache has room in ``CACHE_BYTES`` for, 128 at most; the windows are the same, but for rounding, whatever it is.
    Several processes deal the windows.

    Raises:
        ValueError: a wrapper of a model, a size or temperature that is not positive, more tokens than the model has positions
            for where these are learned, or no token to start from, or one that the vocabulary has not.
        FloatingPointError: if a prediction holds NaN or Inf.
    """
    check_unwrapped(model)
    opening = temperature if opening is None else opening
    if count < 1 or length < 2 or not temperature > 0 or not opening > 0:
        raise ValueError(
            f"cannot sample {count} windows of {length} tokens at temperature {temperature} after {opening}"
        )
    config = model.config.get_text_config()
    check_length(model, length)
    _check_size(count, length)
    start = config.bos_token_id if start is None else start
    if start is None:
        raise ValueError(
            "the model's configuration names no token that begins a text (bos_token_id), so it cannot write one: "
            "pass start= to sample, or calibrate on a text that is at hand (windows=, --calibration CORPUS)"
        )
    if not 0 <= start < (known := vocabulary(model)):
        raise ValueError(f"the token to start from (bos_token_id) is {start}, the vocabulary has {known} tokens")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device writes the same
    draws = torch.cat([_uniform(count, generator) for _ in range(length - 1)], dim=1)
    batch = share(count, _batch(model, length) if batch is None else batch)
    temperatures = _annealed(opening, temperature, length - 1)
    with evaluating(model):
        parts = [_sample(model, u, temperatures, start, device).cpu() for u in mine(draws.split(batch))]
    return torch.cat(in_turn(gathered(parts)))


def own_text(
    model: PreTrainedModel,
    count: int = 128,
    length: int | None = None,
    *,
    start: int | None = None,
    bos: bool = True,
    seed: int = 0,
) -> Int[Tensor, "count _"]:
    """Windows to calibrate on, half as long as ``length``, by default what the model allows, 2048 at most.

    Half, because the time for a token grows with what stands before it, and second moments of inputs hardly do. Drawn at
    temperature 1 after an ``OPENING`` at a higher one: left alone, our small models begin nearly all windows in English.
    They begin with the token that the model starts from, see ``sample``; with ``bos=False`` it is left out of them.
    """
    check_unwrapped(model)
    if length is None:
        most: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
        length = min(most, 2048)
    length = max(2, length // 2)
    return sample(model, count, length + (not bos), opening=OPENING, start=start, seed=seed)[:, not bos :]


def _batch(model: PreTrainedModel, length: int) -> int:
    """Windows of which keys and values take no more than ``CACHE_BYTES``: 1 … 128."""
    config = model.config.get_text_config()
    shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * shared * head * model.dtype.itemsize * length
    return min(max(CACHE_BYTES // max(each, 1), 1), 128)


def _annealed(opening: float, temperature: float, steps: int) -> list[float]:
    """The temperature at every step."""
    left = (max(0.0, 1 - step / OPENING_TOKENS) for step in range(steps))
    return [temperature + (opening - temperature) * share for share in left]


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, 1, dtype=torch.float64, generator=generator)


def _sample(
    model: PreTrainedModel, draws: Float[Tensor, "n steps"], temperatures: list[float], start: int, device: torch.device
) -> Tensor:
    ids, held = torch.full((len(draws), draws.shape[1] + 1), start, device=device), {}
    sound = torch.ones((), dtype=torch.bool, device=device)  # looked at in the end, for that waits for the device
    for step, (u, temperature) in enumerate(zip(draws.to(home(ids)).split(1, dim=1), temperatures, strict=True)):
        output = model(input_ids=ids[:, step : step + 1], use_cache=True, **held)
        logits, held = output.logits[:, -1].float(), caches_of(output)
        if step == 0:
            reserve(held, draws.shape[1])
        sound &= finite(logits)
        ids[:, step + 1 : step + 2] = index_at((logits / temperature).softmax(-1), u)
    if not sound:
        raise FloatingPointError("the model predicts NaN or Inf, so no text can be sampled from it")
    return ids


def index_at(probabilities: Float[Tensor, "n vocabulary"], u: Float[Tensor, "n 1"]) -> Int[Tensor, "n 1"]:
    """The index of every row at which its cumulative sum passes the share u of the whole: a draw, if u is uniform in [0, 1).

    Several times as fast as ``torch.multinomial`` on a CPU.
    """
    found = []
    for rows, shares in zip(probabilities.split(DRAWN), u.split(DRAWN), strict=True):
        steps = double(rows).cumsum(-1)
        index = torch.searchsorted(steps, shares.to(steps.device) * steps[:, -1:], right=True)
        found.append(index.clamp(max=steps.shape[1] - 1))
    return torch.cat(found).to(probabilities.device)


def random_tokens(
    vocabulary: int, count: int = 128, length: int = 256, *, start: int | None = None, seed: int = 0
) -> Int[Tensor, "count length"]:
    """``count`` windows of uniformly random token ids, the first of each ``start`` if given: the cheapest text of no domain.

    Raises:
        ValueError: a size that is not positive, or too much of it.
    """
    if count < 1 or length < 1:
        raise ValueError(f"cannot draw {count} windows of {length} random tokens")
    _check_size(count, length)
    ids = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    if start is not None:
        ids[:, 0] = start
    return ids


def _check_size(count: int, length: int) -> None:
    if count * length > MOST_TOKENS:
        raise ValueError(
            f"{count} windows of {length} tokens are {count * length} tokens, more than the {MOST_TOKENS} that are made at a time"
        )
