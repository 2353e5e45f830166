"""Layer after layer, each for the inputs it will really get: two streams of hidden states, one pass over the blocks.

The dense stream is what the model was, the compressed stream what it has become so far. Every layer is replaced by the best
factors for its inputs in the compressed stream, with the dense stream as the target (AA-SVD, arXiv 2604.02119). The target is
what the dense stream holds at the *landmark* of the layer: the last place in the block that moves by exactly what the layer's
output is moved by. For a projection that is added to the residual stream this is the stream after the addition, so that the
error of everything before is made up for as far as the rank allows; for others it is the layer's own output. Landmarks are found by
trying, not by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.compression.dealing import is_mine, owners, told
from nsvd.compression.measure import naming
from nsvd.linalg import Moments
from nsvd.linalg.kfac import shifted
from nsvd.linalg.moments import mixing
from nsvd.linalg.precision import double
from nsvd.walk.decoder import Call, Decoder, Entered, run_block
from nsvd.walk.hooks import as_float32, evaluating, in_float32, watch_calls, watch_inputs
from nsvd.walk.memory import give_back
from nsvd.walk.moments import readers
from nsvd.walk.processes import gathered, rank, same, summed
from nsvd.walk.settled import completion, remembering, settled_parts
from nsvd.walk.shelf import Shelf
from nsvd.walk.stream import batches as dealt_batches

STREAMS = "ordered-streams"  # on the shelf

Replace = Callable[[str, Tensor, Moments], nn.Module]  # (layer, target weight, moments of its inputs) → stand-in


@dataclass
class Batch:
    """Windows of one domain on their way through the blocks."""

    domain: int
    weight: float  # of the domain, 1 on average
    dense: Tensor  # hidden states (count, length, d) before the block
    ours: Tensor
    calls: list[Call]  # of every block
    wanted: dict[nn.Module | None, Tensor]  # what the dense stream holds at the landmarks of the block; None: behind it
    outputs: dict[str, object] = field(default_factory=dict)  # of the block's parts that will not change any more
    device: torch.device | None = None
    first: int = 0  # the number of the first window, of all domains

    def at(self, hidden: Tensor) -> Tensor:
        """Hidden states where the block computes: between its runs they wait in the host's memory."""
        return hidden.to(self.device)


class _Reached(Exception):
    """Ends a forward pass at the layer that was waited for."""


@torch.no_grad()
def replace_in_order_(
    model: nn.Module,
    domains: Sequence[Tensor],
    names: Sequence[str],
    replace: Replace,
    *,
    mu: float,
    weights: Sequence[float] | None = None,
    finish: Callable[[int, nn.Module, Sequence[Batch]], None] | None = None,
    leave: Callable[[int], None] = lambda _index: None,
    begin: int = 0,
    shelf: Shelf | None = None,
    batch: int = 16,
    progress: bool = False,
) -> None:
    """Exchange the named layers, block by block and in forward order, for what ``replace`` makes of target and moments.

    All ``domains`` (token ids, count × length each) have equal ``weights`` unless some of sum 1 are given, and are mixed as by
    ``moments.mix``; ``mu`` is the ridge that keeps a target near the layer's own weight where its inputs say nothing. ``finish``
    is called with every block once its layers are exchanged and the dense stream behind it is known, ``leave`` with the number of
    every block that is done. What was exchanged stays exchanged when something raises. On a ``shelf`` that lasts both streams
    behind every block are kept before ``leave`` is called; ``begin`` is the number of blocks that an earlier walk has left.

    One block runs at a time. Held besides are, of all the calibration text, the hidden states of both streams before the block,
    what the dense stream holds behind it and at the landmarks of its layers until these are done, the outputs of parts of the
    block that are done (its attention), while a part's last layer is exchanged its inputs, and the blocks' other arguments
    (masks, rotations). Several processes deal the windows, and the layers that read one input.

    Raises:
        ValueError: if a layer is in none of the model's blocks; it is named.
        FloatingPointError: if an input holds NaN or Inf; the layer is named.
    """
    weights = [1 / len(domains)] * len(domains) if weights is None else weights
    leaders = readers(model, names, (domains[0][:1, :8], *(ids for windows in domains for ids in windows.split(batch))))
    _check_every_token(model, leaders, domains[0][:1, :8])
    with evaluating(model):
        decoder = Decoder(model)
        name, blocks = decoder.name, decoder.blocks
        lost = [layer for layer in names if layer not in leaders or not layer.startswith(f"{name}.")]
        if lost:
            raise ValueError(
                f"layer {lost[0]} is in none of the blocks {name}, so it cannot be compressed in their order"
            )
        batches: list[Batch] = []
        entered: Entered | None = None
        for d, first, ids in dealt_batches(domains, batch):
            entered = decoder.enter(ids, like=entered)
            hidden = entered.hidden.cpu()
            batches.append(
                Batch(
                    d, len(domains) * weights[d], hidden, hidden, entered.calls, {}, device=decoder.device, first=first
                )
            )
        if begin:
            kept = shelf.own.get(f"{STREAMS}/{begin}")
            for number, item in enumerate(batches):
                item.dense, item.ours = kept[f"dense {number}"], kept[f"ours {number}"]
        for index in tqdm(
            range(begin, len(blocks)), "shifted", total=len(blocks), initial=begin, disable=not progress, leave=False
        ):
            groups: dict[str, list[str]] = {}
            for layer in leaders:  # in forward order
                if layer.startswith(f"{name}.{index}."):
                    groups.setdefault(leaders[layer], []).append(layer)
            with decoder.held(index):
                _through_block(model, decoder, index, groups, batches, weights, replace, mu, finish)
                if shelf is not None and shelf.lasting:
                    both = {f"dense {n}": item.dense for n, item in enumerate(batches)}
                    shelf.own.put(
                        f"{STREAMS}/{index + 1}", both | {f"ours {n}": item.ours for n, item in enumerate(batches)}
                    )
                leave(index)
            if shelf is not None:
                shelf.own.drop(f"{STREAMS}/{index}")


def _through_block(
    model: nn.Module,
    decoder: Decoder,
    index: int,
    groups: Mapping[str, Sequence[str]],
    batches: Sequence[Batch],
    weights: Sequence[float],
    replace: Replace,
    mu: float,
    finish: Callable[[int, nn.Module, Sequence[Batch]], None] | None,
) -> None:
    """Exchange the layers of one block, by the first layer that reads each input, and take both streams behind it."""
    block, prefix = decoder.blocks[index], f"{decoder.name}.{index}."
    names = {module: name for name, module in block.named_modules()}
    known: dict[str, str | None] = {}
    for leader, group in groups.items() if rank() == 0 else ():  # looked for once, told to all processes
        layer = model.get_submodule(leader)  # it stands for its own output, where several share the input
        known[leader] = names.get(_landmark(block, layer, batches[0], index) if len(group) == 1 else layer)
    known = same(known)
    places = {leader: None if name is None else block.get_submodule(name) for leader, name in known.items()}
    for item in batches:
        found = _arrivals(block, item.at(item.dense), item.calls[index], set(places.values()))
        item.wanted = {place: value.cpu() for place, value in found.items()}
        item.dense = item.wanted[None]  # behind the block now: nothing asks for what was before
    settled: list[str] = []
    for leader, group in groups.items():
        where = (model.get_submodule(leader), places[leader])
        before, settled = settled, settled_parts(block, prefix, groups, leader)
        alone = len(group) == 1 and (finish is None or len(places) > 1)  # a block to be finished changes once more
        complete = next((part for part in settled if part not in before), None) if alone else None
        _replace_group(model, index, block, *where, group, complete, batches, weights, replace, mu, before)
        place = places.pop(leader)
        if place is not None and place not in places.values():
            for item in batches:
                del item.wanted[place]
        give_back()
    if finish is not None:
        settled = []
        for item in batches:
            item.outputs.clear()
        finish(index, block, batches)
    for item in batches:
        with remembering(block, settled, item.outputs):
            item.ours = run_block(block, item.at(item.ours), item.calls[index]).cpu()
        item.outputs.clear()


def _check_every_token(model: nn.Module, leaders: Mapping[str, str], ids: Tensor) -> None:
    """Raise ``ValueError`` naming a layer that does not see every token: two streams of its inputs could not be compared."""
    seen = dict.fromkeys(leaders.values(), 0)
    with evaluating(model), watch_inputs(model, seen, lambda name, x: seen.__setitem__(name, x.numel() // x.shape[-1])):
        model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    for name, count in seen.items():
        if count != ids.numel():
            raise ValueError(
                f"layer {name} sees {count} of {ids.numel()} tokens, as experts do, so its inputs cannot be followed: "
                "shifted=False compresses it for the inputs of the dense model"
            )


def _replace_group(
    model: nn.Module,
    index: int,
    block: nn.Module,
    layer: nn.Module,
    place: nn.Module | None,
    group: Sequence[str],
    complete: str | None,
    batches: Sequence[Batch],
    weights: Sequence[float],
    replace: Replace,
    mu: float,
    settled: Sequence[str],
) -> None:
    """Measure what arrives at one input, and what is missing at the landmark; exchange the layers that read it.

    Where the part to ``complete`` gives out the very output of the layer, its last, the part's new output is remembered.
    """
    sums, kept = [_Sums() for _ in weights], []
    for item in batches:
        seen: list[Tensor] = []
        with (
            remembering(block, settled, item.outputs),
            watch_inputs(layer, [""], lambda _name, x, seen=seen: seen.append(x)),
            completion(block, complete, layer) as found,
        ):
            have = _value_at(place, block, item.at(item.ours), item.calls[index])
        sums[item.domain].add(seen[0], item.at(item.wanted[place]) - have)
        kept.append((seen[0], found[0]) if found else None)
    for one in sums:
        one.join()
    G, missing, mean_abs = _mixed(sums, weights)
    moments = Moments(G, mean_abs, sum(s.n for s in sums))
    if not (G.isfinite().all() and missing.isfinite().all()):
        raise FloatingPointError(f"the input of layer {group[0]} holds NaN or Inf on the calibration text")
    dense, made = {name: model.get_submodule(name) for name in group}, {}
    owner = owners(model, dense)
    for name in group:
        if is_mine(owner, name):
            W = double(dense[name].weight)
            with naming(name):
                target = shifted(W, G, W @ missing if place is layer else missing, mu=mu)
            made[name] = replace(name, target, moments)
    for name, new in told(made, owner, dense).items():
        model.set_submodule(name, new)
    for item, known in zip(batches, kept, strict=True):
        if known is not None:
            x, output_of = known
            item.outputs[complete] = output_of(model.get_submodule(group[0])(x))


class _Sums:
    """Σ x' x'ᵀ, Σ y x'ᵀ and Σ |x'| over tokens; products in the streams' precision (float32 at least), summed in float64."""

    def __init__(self) -> None:
        self.n, self.outer, self.cross, self.absolute = 0, 0.0, 0.0, 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = (t.flatten(0, -2).to(torch.promote_types(t.dtype, torch.float32)) for t in (x, y))
        self.outer, self.cross = self.outer + double(x.mT @ x), self.cross + double(y.mT @ x)
        self.absolute = self.absolute + double(x.abs()).sum(0)
        self.n += len(x)

    def join(self) -> None:
        """Take in the sums of all processes."""
        parts = {name: getattr(self, name) for name in ("outer", "cross", "absolute")}
        for name, part in parts.items():
            setattr(self, name, summed(part if self.n else None))
        self.n = sum(gathered(self.n))


def _mixed(sums: Sequence[_Sums], weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """G, E and E|x'| of all domains, mixed as ``moments.mix`` mixes G and mean absolute values."""
    scales = mixing([s.outer / s.n for s in sums], weights)
    outer, cross = (
        sum(a * getattr(s, part) / s.n for a, s in zip(scales, sums, strict=True)) for part in ("outer", "cross")
    )
    roots = [(w * a) ** 0.5 for w, a in zip(weights, scales, strict=True)]
    mean_abs = sum(root * s.absolute / s.n for root, s in zip(roots, sums, strict=True))
    return outer, cross, mean_abs


def _value_at(place: nn.Module | None, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The input of a module of the block, which is run no further than that; None is the block's output."""
    if place is None:
        return run_block(block, hidden, call)

    seen: list[Tensor] = []

    def reached(_name: str, x: Tensor) -> None:
        seen.append(x)
        raise _Reached

    with watch_inputs(place, [""], reached), suppress(_Reached):
        run_block(block, hidden, call)
    if seen:
        return seen[0]
    raise RuntimeError("a module that ran before did not run again")


def _landmark(block: nn.Module, layer: nn.Module, item: Batch, index: int) -> nn.Module | None:
    """The last module whose input, or None if the block's output, moves by exactly what the layer's output is moved by.

    Where there is none it is the layer itself. Tried in float32, whatever the model's dtype: rounding would hide the equality.
    """
    hidden, moves = as_float32(item.at(item.dense)), []
    call = Call(as_float32(item.calls[index].args), as_float32(item.calls[index].kwargs))

    def move(_module: nn.Module, _args: tuple, out: Tensor) -> Tensor:
        moves.append(out.flip(-1))  # some direction of the output's own size
        return out + moves[0]

    with in_float32(block):
        plain = _arrivals(block, hidden, call)
        handle = layer.register_forward_hook(move)
        try:
            moved = _arrivals(block, hidden, call)
        finally:
            handle.remove()
    close = 1e-3 * moves[0].norm()
    for place in reversed(plain):
        if place in moved and plain[place].shape[-1] == moves[0].shape[-1] and plain[place].numel() == moves[0].numel():
            step = (moved[place] - plain[place]).reshape(moves[0].shape)  # some blocks lay all tokens in one row
            if (step - moves[0]).norm() <= close:
                return place
    return layer


def _arrivals(
    block: nn.Module, hidden: Tensor, call: Call, places: set[nn.Module | None] | None = None
) -> dict[nn.Module | None, Tensor]:
    """The inputs of modules of the block, by default all, in the order they run; at last, under None, the block's output."""
    inputs: dict[nn.Module | None, Tensor] = {}
    inner = {name: m for name, m in block.named_modules() if m is not block and (places is None or m in places)}

    def observe(name: str, args: tuple, _kwargs: dict) -> None:
        if args and isinstance(args[0], Tensor):
            inputs[inner[name]] = args[0]

    with watch_calls(block, inner, observe):
        out = run_block(block, hidden, call)
    return inputs | {None: out}
