"""What the loss makes of every layer's outputs: the output side of the Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from nsvd.linalg.precision import double
from nsvd.walk.decoder import Decoder
from nsvd.walk.hooks import evaluating
from nsvd.walk.moments import check_names, check_windows
from nsvd.walk.passes import Passing, forward
from nsvd.walk.sampling import draw
from nsvd.walk.targets import targets
from nsvd.walk.text import tokens_at_once, windows_at_once


@torch.inference_mode(False)
def fisher(
    model: nn.Module,
    windows: Tensor,
    *,
    layers: Iterable[str] | None = None,
    diagonal: bool = False,
    teacher: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """H = E[g gᵀ] by layer name, (d_out, d_out), g the gradient of a window's loss with respect to the layer's output.

    The loss is the summed negative log-likelihood, in nats, of labels drawn from the model's own predictions at every
    position, which makes H the Fisher information of the outputs and not an accident of the text. One walk forward, one
    backward over the blocks, each of which runs a second time; no gradient of a parameter. Held are the hidden states before
    every block, in the host's memory, and the graph of one block and one batch. Products in float64 where the model is, sums
    in float64 on the CPU (those of a model of 7B parameters take some 80 GB), averaged over tokens.
    ``diagonal=True`` keeps E[g²] only, (d_out,).
    With a ``teacher``, the logits of another model for token ids, labels are drawn from its predictions. E[g] is then the gradient
    of KL(teacher ‖ model), and H no Fisher information any more: it weighs the direction of the model's error, too.
    ``batch`` windows are read at a time, by default 8, or as many as ``nsvd.walk.text`` allows logits for.

    Raises:
        ValueError: if ``windows`` is empty or such as the model cannot read, a layer never runs or is in no block, or the model
            cannot be run block by block.
        FloatingPointError: if a gradient holds NaN or Inf; the layer is named.
    """
    check_windows(windows, model)
    batch = batch or min(8, windows_at_once(model, windows.shape[1]))
    names = list(targets(model) if layers is None else layers)
    check_names(model, names)
    modules = {name: model.get_submodule(name) for name in names}
    sums: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        g = double(gradient.reshape(-1, gradient.shape[-1]))
        new = (g.square().sum(0) if diagonal else g.mT @ g).cpu()
        sums[name] = sums[name].add_(new) if name in sums else new

    frozen = [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.callback(lambda: [p.requires_grad_(True) for p in frozen])
        for parameter in frozen:
            parameter.requires_grad_(False)
        decoder = Decoder(model)
        inside = {name: decoder.index(name) for name in names}
        passing = forward(decoder, windows.split(batch), progress=progress)
        _epilogue(decoder, passing, teacher, seed, progress)
        for index in tqdm(reversed(range(len(decoder))), "fisher", len(decoder), disable=not progress, leave=False):
            here = {name: module for name, module in modules.items() if inside[name] == index}
            with decoder.held(index), _watching(here, add):
                for item in passing:
                    hidden = item.borders.pop().to(decoder.device)
                    gradient = item.gradient.to(decoder.device)
                    item.gradient = decoder.pull(index, hidden, item.calls[index], gradient).cpu()
    for name in names:
        if name not in sums:
            raise ValueError(f"no gradient reached layer {name}")
        if not sums[name].isfinite().all():
            raise FloatingPointError(f"the gradient at layer {name} holds NaN or Inf")
    return {name: sums[name].div_(windows.numel()) for name in names}


def _epilogue(
    decoder: Decoder, passing: list[Passing], teacher: Callable[[Tensor], Tensor] | None, seed: int, progress: bool
) -> None:
    """The gradient of every batch's loss with respect to the hidden states behind the last block, some positions at a time."""
    generator = torch.Generator().manual_seed(seed)
    for item in tqdm(passing, "labels", disable=not progress, leave=False):
        labels = None if teacher is None else _drawn(teacher(item.ids), generator)
        hidden, gradients = item.borders.pop().to(decoder.device), []
        for part in torch.arange(item.ids.shape[1]).split(max(1, tokens_at_once(decoder.model) // len(item.ids))):
            last = hidden[:, part].requires_grad_(True)
            with torch.enable_grad():
                logits = decoder.logits(item.ids[:, part], last.clone())
                wanted = _drawn(logits.detach(), generator) if labels is None else labels[:, part]
                loss = cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="sum")
                gradients += torch.autograd.grad(loss, last)
        item.gradient = torch.cat(gradients, dim=1).cpu()


@contextmanager
def _watching(layers: Mapping[str, nn.Module], observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``observe(name, g)`` with the gradient at the output of each named layer, while in the context."""

    def watch(name: str, _module: nn.Module, _args: tuple, out: Tensor) -> Tensor | None:
        if not out.requires_grad:
            return None
        out = out.clone() if out._is_view() else out  # what adds to a view in place takes it off its hooks
        out.register_hook(partial(observe, name))
        return out

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(watch, name)).remove)
        yield


@torch.no_grad()
def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token (n, length) at every position, drawn from what the logits predict."""
    return draw(logits.float().flatten(0, 1).softmax(-1), generator).view(logits.shape[:2])
