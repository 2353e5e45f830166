"""What the loss makes of every layer's outputs: the output side of the Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from nsvd.model.hooks import evaluating
from nsvd.model.moments import check_windows
from nsvd.model.sampling import draw
from nsvd.model.targets import targets


def fisher(
    model: nn.Module,
    windows: Tensor,
    *,
    layers: Iterable[str] | None = None,
    diagonal: bool = False,
    teacher: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    batch: int = 8,
    progress: bool = False,
) -> dict[str, Tensor]:
    """H = E[g gᵀ] by layer name, (d_out, d_out), g the gradient of a window's loss with respect to the layer's output.

    The loss is the summed negative log-likelihood, in nats, of labels drawn from the model's own predictions at every
    position, which makes H the Fisher information of the outputs and not an accident of the text. One forward and one
    backward pass, no gradient of a parameter. Products in float64 where the model is, sums in float64 on the CPU (those of a
    model of 7B parameters take some 80 GB), averaged over tokens. ``diagonal=True`` keeps E[g²] only, (d_out,).
    With a ``teacher``, the logits of another model for token ids, labels are drawn from its predictions. E[g] is then the gradient
    of KL(teacher ‖ model), and H no Fisher information any more: it weighs the direction of the model's error, too.

    Raises:
        ValueError: if ``windows`` is empty, or a layer never runs.
        FloatingPointError: if a gradient holds NaN or Inf; the layer is named.
    """
    check_windows(windows)
    names = list(targets(model) if layers is None else layers)
    sums: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        g = gradient.reshape(-1, gradient.shape[-1]).double()
        new = (g.square().sum(0) if diagonal else g.mT @ g).cpu()
        sums[name] = sums[name].add_(new) if name in sums else new

    def watch(name: str, _module: nn.Module, _args: tuple, out: Tensor) -> None:
        if out.requires_grad:  # not where the teacher runs through the same layer
            out.register_hook(partial(add, name))

    device = next(model.parameters()).device
    generator, frozen = torch.Generator(device).manual_seed(seed), [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        stack.callback(lambda: [p.requires_grad_(True) for p in frozen])
        for parameter in frozen:
            parameter.requires_grad_(False)
        embedding = model.get_input_embeddings()
        leaf = embedding.register_forward_hook(lambda _m, _a, out: out.detach().requires_grad_(True).clone())
        stack.callback(leaf.remove)
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(partial(watch, name)).remove)
        for ids in tqdm(windows.split(batch), "fisher", disable=not progress, leave=False):
            ids = ids.to(device)
            labels = None if teacher is None else _labels(teacher, ids, generator)
            logits = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
            labels = draw(logits.detach().softmax(-1), generator)[:, 0] if labels is None else labels
            cross_entropy(logits, labels, reduction="sum").backward()
    for name in names:
        if name not in sums:
            raise ValueError(f"no gradient reached layer {name}")
        if not sums[name].isfinite().all():
            raise FloatingPointError(f"the gradient at layer {name} holds NaN or Inf")
    return {name: sums[name].div_(windows.numel()) for name in names}


@torch.no_grad()
def _labels(teacher: Callable[[Tensor], Tensor], ids: Tensor, generator: torch.Generator) -> Tensor:
    """A token at every position, drawn from what the teacher predicts."""
    return draw(teacher(ids).float().flatten(0, 1).softmax(-1), generator)[:, 0]
