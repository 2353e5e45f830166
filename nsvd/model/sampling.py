"""Text that the model writes itself, to calibrate on where no other is at hand, or beside one."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from nsvd.model.hooks import evaluating


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    count: int = 128,
    length: int = 256,
    *,
    temperature: float = 1.0,
    start: int | None = None,
    batch: int = 128,
    seed: int = 0,
) -> Int[Tensor, "count length"]:
    """``count`` windows of ``length`` token ids drawn from the model's own distribution, one token after the other.

    At temperature 1 this is the language as the model knows it, all its domains in the proportions it learned them.
    Every window opens with the token ``start`` (by default the one the model's configuration begins a text with); an end
    of text is an ordinary token, what follows it is a new one.

    Raises:
        ValueError: a size or temperature that is not positive, or no token to start from.
        FloatingPointError: if a prediction holds NaN or Inf.
    """
    if count < 1 or length < 2 or not temperature > 0:
        raise ValueError(f"cannot sample {count} windows of {length} tokens at temperature {temperature}")
    start = model.config.get_text_config().bos_token_id if start is None else start
    if start is None:
        raise ValueError("the model's configuration names no token that begins a text; pass start=")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with evaluating(model):
        sizes = [min(batch, count - i) for i in range(0, count, batch)]
        return torch.cat([_sample(model, size, length, temperature, start, generator) for size in sizes]).cpu()


def own_text(
    model: PreTrainedModel, count: int = 128, length: int | None = None, *, seed: int = 0
) -> Int[Tensor, "count _"]:
    """Windows to calibrate on, half as long as ``length``, by default what the model allows, 2048 at most.

    Half, because the time for a token grows with what stands before it, and second moments of inputs hardly do.
    """
    if length is None:
        length = min(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048, 2048)
    return sample(model, count, max(2, length // 2), seed=seed)


def _sample(
    model: PreTrainedModel, count: int, length: int, temperature: float, start: int, generator: torch.Generator
) -> Tensor:
    ids = torch.full((count, 1), start, device=generator.device)
    cache = DynamicCache(config=model.config)
    while ids.shape[1] < length:
        logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1].float()
        if not logits.isfinite().all():
            raise FloatingPointError("the model predicts NaN or Inf, so no text can be sampled from it")
        ids = torch.cat([ids, draw((logits / temperature).softmax(-1), generator)], dim=1)
    return ids


def draw(probabilities: Float[Tensor, "n vocabulary"], generator: torch.Generator) -> Int[Tensor, "n 1"]:
    """One index from every row, by inverting its cumulative sum: several times as fast as ``torch.multinomial`` on a CPU."""
    steps = probabilities.double().cumsum(-1)
    u = torch.rand(len(steps), 1, dtype=steps.dtype, device=steps.device, generator=generator)
    return torch.searchsorted(steps, u * steps[:, -1:], right=True).clamp(max=steps.shape[1] - 1)


def random_tokens(
    vocabulary: int, count: int = 128, length: int = 256, *, seed: int = 0
) -> Int[Tensor, "count length"]:
    """``count`` windows of uniformly random token ids: the cheapest text that is of no domain."""
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
