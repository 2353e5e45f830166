"""What the loss makes of every layer's outputs: the output side of the Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.walk.decoder import Decoder
from nsvd.walk.gradient_sums import MOMENTS, GradientSums, Kind
from nsvd.walk.hooks import evaluating
from nsvd.walk.memory import room_on
from nsvd.walk.moments import check_names, check_windows
from nsvd.walk.processes import gathered, wait
from nsvd.walk.sampling import index_at
from nsvd.walk.shelf import Shelf
from nsvd.walk.stream import Batch, Stream, borders_of, in_order, numbered
from nsvd.walk.targets import targets
from nsvd.walk.text import tokens_at_once
from nsvd.walk.waiting import Row

BORDER, PULL = "border", "pull"  # on the shelf, behind the name of the walk


@torch.inference_mode(False)
def fisher(
    model: nn.Module,
    windows: Tensor,
    *,
    layers: Iterable[str] | None = None,
    diagonal: bool = False,
    clipped: bool = False,
    labels: Tensor | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """H = E[g gᵀ] by layer name, (d_out, d_out), g the gradient of a window's loss with respect to the layer's output.

    The loss is the summed negative log-likelihood, in nats, of labels drawn from the model's own predictions at every
    position, which makes H the Fisher information of the outputs and not an accident of the text. One walk forward, one
    backward over the blocks, each of which runs a second time; no gradient of a parameter. Held are the hidden states before
    every block, in the host's memory or in a temporary file, the graph of one block and one batch, and the sums of one block.
    Products are in float32, in float64 where the model is, sums in float64 where the model lies, averaged over tokens.
    ``diagonal=True`` keeps E[g²] only, (d_out,). ``clipped=True`` leaves out the edges of windows and clips the norms of
    the others, as KFAC-SVD does; that paper takes the labels of the text: ``ids[:, :-1]`` with ``labels=ids[:, 1:]``.
    With ``labels`` (count, length), such as ``drawn_labels`` of another model, these are taken. Where they are drawn from
    another model's predictions E[g] is the gradient of KL(other ‖ model), and H no Fisher information any more: it weighs the
    direction of the model's error, too.
    ``batch`` windows are read at a time, by default as many as ``stream.READ`` tokens are. The labels are the same whatever it is.

    Raises:
        ValueError: if ``windows`` is empty or such as the model cannot read, a layer never runs or is in no block, or the model
            cannot be run block by block.
        FloatingPointError: if a gradient holds NaN or Inf; the layer is named.
    """
    how = {"kind": Kind(diagonal, clipped=clipped), "labels": None if labels is None else [labels], "seed": seed}
    names, found = list(targets(model) if layers is None else layers), {}
    fisher_into(found, model, [windows], [1.0], layers=names, batch=batch, progress=progress, **how)
    return {name: found[name] for name in names}


def fisher_into(
    found: MutableMapping[str, Tensor],
    model: nn.Module,
    domains: Sequence[Tensor],
    shares: Sequence[float],
    *,
    layers: Iterable[str] | None = None,
    kind: Kind = MOMENTS,
    labels: Sequence[Tensor] | None = None,
    seed: int = 0,
    batch: int | None = None,
    shelf: Shelf | None = None,
    walk: str = "gradients",
    progress: bool = False,
) -> None:
    """Put Σ share · ``fisher`` of the domains (token ids, count × length each) into a mapping, a block's layers at a time, the last
    block first; or another ``kind`` of sum. On a shelf that lasts the walk begins where an earlier one of this name ended.
    Several processes deal the windows."""
    for ids in domains:
        check_windows(ids, model)
    for ids, wanted in zip(domains, domains if labels is None else labels, strict=True):
        if wanted.shape != ids.shape:
            raise ValueError(f"labels {tuple(wanted.shape)} for windows {tuple(ids.shape)}: every token has one")
        check_windows(wanted, model)
    names = list(targets(model) if layers is None else layers)
    check_names(model, names)
    shelf = Shelf() if shelf is None else shelf
    if all(name in found for name in names):
        _leave(shelf, walk)
        return
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(_frozen(model))
        decoder = Decoder(model)
        inside = {name: decoder.index(name) for name in names}
        scratch = shelf.scratch()
        stream = Stream(decoder, domains, batch=batch, scratch=scratch)
        gradients = Row(scratch, "gradients", room_on(decoder.device))
        tokens = [share / ids.numel() for ids, share in zip(domains, shares, strict=True)]
        at = _begin(gradients, stream, shelf, walk, labels, seed, progress)
        for index in _counted(range(at)[::-1], len(decoder), progress):
            here = {name: model.get_submodule(name) for name in names if inside[name] == index}
            sums = GradientSums(here, kind)
            borders = in_order(shelf.own.get(f"{walk}-{BORDER}/{index}"))
            with decoder.held(index):
                for i, item in enumerate(stream.batches):
                    with _watching(here, partial(sums.taking, tokens[item.domain])):
                        hidden, gradient = (t.to(decoder.device) for t in (borders[i], gradients[i]))
                        gradients[i] = decoder.pull(index, hidden, item.calls[index], gradient)
            found.update(sums.whole())  # none stays in memory while the next block's are summed
            if shelf.lasting:
                shelf.own.put(f"{walk}-{PULL}/{index}", numbered(gradients))
                wait()
                shelf.own.drop(f"{walk}-{PULL}/{index + 1}")
            shelf.own.drop(f"{walk}-{BORDER}/{index}")
        _leave(shelf, walk)


def weight_gradients_into(
    found: MutableMapping[str, Tensor],
    model: nn.Module,
    domains: Sequence[Tensor],
    shares: Sequence[float],
    *,
    layers: Iterable[str] | None = None,
    shelf: Shelf | None = None,
    progress: bool = False,
) -> None:
    """Put ∂L/∂W (d_out, d_in) of the named layers, by default every target layer, into a mapping.

    L = Σ share · mean nats a token of what comes next in the windows. The same walks as ``fisher_into``, and what it raises.

    Raises:
        ValueError: if a window has fewer than two tokens.
    """
    if any(ids.shape[1] < 2 for ids in domains):
        raise ValueError("windows of one token have no next one: the loss has no gradient")
    inputs, labels = [ids[:, :-1] for ids in domains], [ids[:, 1:] for ids in domains]
    how = {
        "layers": layers,
        "labels": labels,
        "shelf": shelf,
        "walk": "weight-gradients",
        "kind": Kind(weights=True),
        "progress": progress,
    }
    fisher_into(found, model, inputs, shares, **how)


def drawn_labels(
    model: nn.Module, windows: Tensor, *, seed: int = 0, first: int = 0, batch: int | None = None
) -> Tensor:
    """A token (count, length) for every position of the windows, drawn from what the model predicts there.

    The draws of a window depend on ``seed`` and its number, which begins at ``first``, and on nothing else. One walk forward.
    Several processes deal the windows.
    """
    found = {}
    with torch.no_grad(), evaluating(model):
        decoder = Decoder(model)
        stream = Stream(decoder, [windows], batch=batch)
        while stream.at < len(decoder):
            stream.step()
        for item, hidden in zip(stream.batches, stream.hidden, strict=True):
            uniform, labels = _uniform(item, seed, first), torch.empty(item.ids.shape, dtype=torch.long)
            for part in _parts(decoder, item):
                logits = decoder.logits(item.ids[part], hidden[part].to(decoder.device))
                labels[part] = _drawn(logits.float().softmax(-1), uniform[part]).cpu()
            found[item.first] = labels
    found = {number: labels for those in gathered(found) for number, labels in those.items()}
    return torch.cat([found[number] for number in sorted(found)])


def _leave(shelf: Shelf, walk: str) -> None:
    """Let go of what the walk has kept, so that the next one begins anew."""
    for key in [*shelf.own.keys(f"{walk}-{BORDER}"), *shelf.own.keys(f"{walk}-{PULL}")]:
        shelf.own.drop(key)


def _counted(numbers: range, total: int, progress: bool) -> Iterator[int]:
    return iter(tqdm(numbers, "fisher", total=total, initial=total - len(numbers), disable=not progress, leave=False))


def _begin(
    gradients: Row,
    stream: Stream,
    shelf: Shelf,
    walk: str,
    labels: Sequence[Tensor] | None,
    seed: int,
    progress: bool,
) -> int:
    """Fill in the gradients of every batch's loss at a border: the last one unless a walk was interrupted. Returns its number."""
    decoder = stream.decoder
    if shelf.lasting and (done := borders_of(shelf, f"{walk}-{PULL}")):
        gradients.fill(in_order(shelf.own.get(f"{walk}-{PULL}/{min(done)}")))
        stream.hidden.fill([])
        return min(done)
    if shelf.lasting:
        stream.restore(shelf, f"{walk}-{BORDER}")
    with tqdm(total=len(decoder), desc="forward", disable=not progress, leave=False) as bar:
        bar.update(stream.at)
        while stream.at < len(decoder):
            stream.save(shelf, f"{walk}-{BORDER}")
            stream.step()
            bar.update()
    counted = tqdm(stream.batches, "labels", disable=not progress, leave=False)
    both = zip(counted, stream.hidden, strict=True)
    gradients.fill(_epilogue(decoder, item, hidden, labels, seed) for item, hidden in both)
    stream.hidden.fill([])
    if shelf.lasting:
        shelf.own.put(f"{walk}-{PULL}/{len(decoder)}", numbered(gradients))
    return len(decoder)


def _epilogue(decoder: Decoder, item: Batch, hidden: Tensor, labels: Sequence[Tensor] | None, seed: int) -> Tensor:
    """The gradient of a batch's loss with respect to the hidden states behind the last block, some positions at a time."""
    hidden = hidden.to(decoder.device)
    gradient = torch.empty_like(hidden)
    uniform, given = _uniform(item, seed), None
    if labels is not None:
        rows = [row for windows in labels for row in windows]
        given = torch.stack(rows[item.first : item.first + len(item.ids)]).to(decoder.device)
    for part in _parts(decoder, item):
        last = hidden[part].requires_grad_(True)
        with torch.enable_grad():
            logits = decoder.logits(item.ids[part], last.clone())
        slope = logits.detach().float().softmax(-1)  # of the loss, once 1 is taken off at the labels
        wanted = (_drawn(slope, uniform[part]) if given is None else given[part])[..., None]
        slope.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=slope.dtype))
        gradient[part] = torch.autograd.grad(logits, last, slope.to(logits.dtype))[0]
    return gradient


def _drawn(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """A token (n, length) at every position, drawn from what is predicted there."""
    return index_at(probabilities.flatten(0, 1), uniform.reshape(-1, 1)).view(uniform.shape)


def _parts(decoder: Decoder, item: Batch) -> Iterator[tuple[slice, slice]]:
    """Windows and positions of a batch, as many at a time as there is room for their logits."""
    (count, length), most = item.ids.shape, tokens_at_once(decoder.model)
    rows = min(count, most)
    columns = most // rows
    for row in range(0, count, rows):
        for column in range(0, length, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def _uniform(item: Batch, seed: int, first: int = 0) -> Tensor:
    """A number in [0, 1) for every position of a batch's windows, (count, length), from the seed and the window's number."""
    rows = []
    for number in range(first + item.first, first + item.first + len(item.ids)):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        rows.append(torch.rand(item.ids.shape[1], dtype=torch.float64, generator=generator))
    return torch.stack(rows)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient in the context."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def _watching(
    layers: Mapping[str, nn.Module], observe: Callable[[str, Tensor], Callable[[Tensor], None]]
) -> Iterator[None]:
    """Call ``observe(name, x)(g)`` with input and gradient at the output of each named layer, while in the context."""

    def watch(name: str, _module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        if not out.requires_grad:
            return None
        out = out.clone() if out._is_view() else out  # what adds to a view in place takes it off its hooks
        out.register_hook(observe(name, args[0].detach()))
        return out

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(watch, name)).remove)
        yield
