"""Layer after layer, each for the inputs it will really get: two streams of hidden states, one pass over the blocks.

The dense stream is what the model was, the compressed stream what it has become so far. Every layer is replaced by the best
factors for its inputs in the compressed stream, with the dense stream as the target (AA-SVD, arXiv 2604.02119). The target is
what the dense stream holds at the *landmark* of the layer: the last place in the block that moves by exactly what the layer's
output is moved by. For a projection that is added to the residual stream this is the stream after the addition, so that the
error of everything before is made up for as far as the rank allows; for others it is the layer's own output. Landmarks are found by
trying, not by name.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.linalg import Moments
from nsvd.linalg.kfac import shift
from nsvd.linalg.moments import mixing
from nsvd.linalg.precision import double
from nsvd.stored.transposed import linear_at
from nsvd.walk.decoder import Decoder, Entered, run_block
from nsvd.walk.hooks import evaluating, inputs_seen
from nsvd.walk.landmarks import arrivals, check_every_token, landmark, value_at
from nsvd.walk.lazy import as_first
from nsvd.walk.memory import Room, give_back, room_on
from nsvd.walk.moments import readers
from nsvd.walk.processes import rank, same
from nsvd.walk.settled import completion, remembering, settled_parts
from nsvd.walk.shelf import Shelf
from nsvd.walk.stream import batches as dealt_batches
from nsvd.walk.stream import kept_every
from nsvd.walk.sums import Sums
from nsvd.walk.text import trial
from nsvd.walk.waiting import Waiting

STREAMS = "ordered-streams"  # on the shelf
DENSE, OURS = "dense", "ours"  # the two streams of a batch
INPUT = "input"  # and the inputs of a layer that is exchanged just now
PROBE = (
    -1
)  # the number of a batch of a few tokens, on which landmarks are looked for: all inputs of a block are held there


class Batch:
    """Windows of one domain on their way through the blocks.

    ``hidden`` has, by name, their states (count, length, d) in both streams, before the block or behind it. ``landmarks`` has what
    the dense stream holds inside the block, ``outputs`` what its parts give out that will not change any more.
    """

    def __init__(self, domain: int, weight: float, first: int, entered: Entered, shelf: Shelf, room: Room):
        self.domain, self.weight = domain, weight  # the weight is 1 on average
        self.first = first  # the number of the first window
        self.calls = entered.calls
        parts = [Waiting(shelf, f"{first}/{part}", room) for part in ("hidden", "landmarks", "outputs")]
        self.hidden, self.landmarks, self.outputs = parts
        self.hidden[DENSE] = self.hidden[OURS] = entered.hidden

    def wanted(self, place: str | None) -> Tensor:
        """What the dense stream holds at a landmark of the block, by its name; None is the block's output."""
        return self.hidden[DENSE] if place is None else self.landmarks[place]


@dataclass
class Arrived:
    """What arrives at one input of a block: ``moments`` of the compressed stream there, and the ``dense`` layers that read it."""

    dense: dict[str, nn.Linear]
    moments: Moments
    missing: Tensor  # E[y x'ᵀ], y what is missing at the landmark, or x − x' where this is the layer itself
    itself: bool
    mu: float

    def target(self, name: str) -> Tensor:
        """The best weight (d_out, d_in) of a layer for these inputs, of full rank; in float64."""
        W = self.dense[name].weight.to(self._shift.device)
        return (double(W) @ self._shift if self.itself else self._shift) + W

    @cached_property
    def _shift(self) -> Tensor:
        """One for all layers: the moment is factored once, and what is missing is not needed any more."""
        found = shift(self.moments.G, self.missing, mu=self.mu)
        del self.missing
        return found


@torch.no_grad()
def followed(
    model: nn.Module,
    domains: Sequence[Tensor],
    names: Sequence[str],
    *,
    mu: float,
    originals: Mapping[str, nn.Linear] | None = None,
    weights: Sequence[float] | None = None,
    unsettled: bool = False,
    begin: int = 0,
    shelf: Shelf | None = None,
    batch: int | None = None,
    progress: bool = False,
) -> Generator[FollowedBlock, None, None]:
    """The blocks in their order, between two streams. Whoever takes one exchanges its layers, and calls its ``step``.

    All ``domains`` (token ids, count × length each) have equal ``weights`` unless some of sum 1 are given, and are mixed as by
    ``moments.mix``; ``mu`` is the ridge that keeps a target near the layer's own weight where its inputs say nothing. The dense
    stream goes through ``originals`` where layers have been exchanged before. A block is ``unsettled`` if it will change once
    more when its layers are exchanged. On a ``shelf`` that lasts both streams behind a block are kept at its ``step``, of a
    long text behind some blocks only (``kept_every``). ``begin``, the border of one of these ``STREAMS`` or 0, is where an
    earlier walk is taken up.

    One block runs at a time. Of all the calibration text there wait the hidden states of both streams, what the dense stream holds
    at the landmarks of the layers that are not done, the outputs of parts of the block that are done (its attention), and the
    inputs of a part's last layer: on a GPU that has room, in memory, or past a limit in files. The blocks' other arguments (masks,
    rotations) stay in memory. ``batch`` windows are read at a time, by default as many as ``stream.READ`` tokens are. Several
    processes deal the windows.

    Raises:
        ValueError: if a layer is in none of the model's blocks, or does not see every token; it is named.
        FloatingPointError: if an input holds NaN or Inf; the layer is named.
    """
    weights = [1 / len(domains)] * len(domains) if weights is None else weights
    shelf = Shelf() if shelf is None else shelf
    leaders = readers(
        model, names, (domains[0][:1, :8], *(ids for _, _, ids in dealt_batches(domains, batch, dealt=False)))
    )
    check_every_token(model, leaders, domains[0][:1, :8])
    with evaluating(model):
        decoder = Decoder(model)
        for layer in names:
            decoder.index(layer)
            if layer not in leaders:
                raise ValueError(f"layer {layer} saw no input: take a text that reaches it")
        waiting, batches, entered = (shelf.scratch(), room_on(decoder.device)), [], None
        for d, first, ids in dealt_batches(domains, batch):
            entered = decoder.enter(ids, like=entered)
            batches.append(Batch(d, len(domains) * weights[d], first, entered, *waiting))
        probe = Batch(0, 0.0, PROBE, decoder.enter(trial(model)), *waiting)
        device = probe.hidden[DENSE].device
        kept = shelf.own.get(f"{STREAMS}/{begin}") if begin else {}
        for name, tensor in kept.items():
            stream, _, number = name.partition(" ")
            item = probe if int(number) == PROBE else batches[int(number)]
            item.hidden[stream] = tensor.to(device)
        every = kept_every(domains)
        terms = _Terms(weights, mu, unsettled, shelf, originals or {}, every)
        counted = {"total": len(decoder), "initial": begin, "disable": not progress, "leave": False}
        for index in tqdm(range(begin, len(decoder)), "shifted", **counted):
            with decoder.held(index):
                yield FollowedBlock(decoder, index, leaders, batches, probe, terms)
            if not (index + 1) % every:
                for earlier in range(index + 1):
                    shelf.own.drop(f"{STREAMS}/{earlier}")


class _Terms(NamedTuple):
    """What holds for all blocks; see ``followed``."""

    weights: Sequence[float]
    mu: float
    unsettled: bool
    shelf: Shelf
    originals: Mapping[str, nn.Linear]
    every: int  # see ``kept_every``


class FollowedBlock:
    """A block between the two streams.

    ``inputs`` takes the dense stream behind the block and tells of one input after the other, in forward order; the layers that
    read it are to be exchanged before the next is asked for. After the last ``step`` takes the compressed stream behind it, too.
    """

    def __init__(
        self,
        decoder: Decoder,
        index: int,
        leaders: Mapping[str, str],
        batches: Sequence[Batch],
        probe: Batch,
        terms: _Terms,
    ):
        self.index, self.block, self.batches = index, decoder.blocks[index], batches
        self._model, self._prefix = decoder.model, f"{decoder.name}.{index}."
        self._probe, (self._weights, self._mu, self._unsettled, self._shelf, originals, self._every) = probe, terms
        here = {name: layer for name, layer in originals.items() if name.startswith(self._prefix)}
        self._originals = {name.removeprefix(self._prefix): layer for name, layer in here.items()}
        now = {name: self._model.get_submodule(name) for name in here}
        self._fewer = {name for name, old in here.items() if old.out_features != now[name].out_features}
        self._narrow = {name for name, old in here.items() if old.in_features != now[name].in_features}
        self._settled: list[str] = []
        self.within: set[str] = set()  # layers that do not end in what the block gives out, once ``inputs`` has begun
        self._groups: dict[str, list[str]] = {}
        for layer in leaders:  # in forward order
            if layer.startswith(self._prefix):
                self._groups.setdefault(leaders[layer], []).append(layer)

    @torch.no_grad()
    def inputs(self) -> Iterator[Arrived]:
        """What arrives at each input of the block's layers."""
        with as_first(self.block, self._originals):
            places = self._landmarks()
            self._through_dense(set(places.values()))
        self.within = {leader for leader, place in places.items() if place is not None}
        for leader, group in self._groups.items():
            before, now = self._settled, settled_parts(self.block, self._prefix, self._groups, leader)
            last = self._unsettled and len(places) == 1  # all that is done runs once more
            part = None if last or len(group) > 1 else next((part for part in now if part not in before), None)
            place, layer = places.pop(leader), self._model.get_submodule(leader)
            sums, rest = self._measured(leader, layer, place, part)
            yield self._arrived(group, sums, place == leader.removeprefix(self._prefix))  # and kept by nobody here
            del sums
            for item, output_of in zip(self.batches, rest, strict=True):
                if part is not None and output_of is not None:  # the part's new output, from its last layer's
                    item.outputs[part] = output_of(self._model.get_submodule(leader)(item.hidden.pop(INPUT)))
                if place is not None and place not in places.values():
                    del item.landmarks[place]
            self._settled = now

    @torch.no_grad()
    def step(self) -> None:
        """Take the compressed stream behind the block as it is now, and keep both where the shelf lasts."""
        for item in self.batches:
            settled = [] if self._unsettled else self._settled
            with remembering(self.block, settled, item.outputs):
                item.hidden[OURS] = run_block(self.block, item.hidden[OURS], item.calls[self.index])
            item.outputs.clear()
        if self._shelf.lasting and not (self.index + 1) % self._every:
            both = {f"{s} {n}": item.hidden[s].cpu() for n, item in enumerate(self.batches) for s in (DENSE, OURS)}
            both[f"{DENSE} {PROBE}"] = self._probe.hidden[DENSE].cpu()
            self._shelf.own.put(f"{STREAMS}/{self.index + 1}", both)

    def _landmarks(self) -> dict[str, str | None]:
        """Where the target of each input's layers is measured, by name; looked for once, told to all processes."""
        names, found = {module: name for name, module in self.block.named_modules()}, {}
        for leader, group in self._groups.items() if rank() == 0 else ():
            # It stands for its own output, where several share the input, or where what it gave out has other neurons.
            layer, alone = self._model.get_submodule(leader), len(group) == 1 and leader not in self._fewer
            here = self._probe.hidden[DENSE], self._probe.calls[self.index]
            found[leader] = names.get(landmark(self.block, layer, *here) if alone else layer)
        return same(found)

    def _through_dense(self, places: set[str | None]) -> None:
        """Take the dense stream behind the block, and note what it holds at some places."""
        modules = {self.block.get_submodule(place): place for place in places if place is not None}
        probe = self._probe
        probe.hidden[DENSE] = run_block(self.block, probe.hidden[DENSE], probe.calls[self.index])
        for item in self.batches:
            found = arrivals(self.block, item.hidden[DENSE], item.calls[self.index], set(modules))
            item.hidden[DENSE] = found.pop(None)
            for module, value in found.items():
                item.landmarks[modules[cast(nn.Module, module)]] = value

    def _measured(self, leader: str, layer: nn.Module, place: str | None, part: str | None) -> tuple[list[Sums], list]:
        """Sums over what arrives at an input and what is missing at the landmark, by domain.

        If the ``part`` gives out the output of its last layer as it is, the layer's inputs are kept, and for every batch a function
        is returned that makes the part's output from the layer's.
        """
        sums, rest = [Sums() for _ in self._weights], []
        module = None if place is None else self.block.get_submodule(place)
        apart = leader in self._narrow and place == leader.removeprefix(self._prefix)
        for item in self.batches:
            with (
                remembering(self.block, self._settled, item.outputs),
                inputs_seen(layer) as seen,
                completion(self.block, part, layer) as found,
            ):
                have = value_at(module, self.block, item.hidden[OURS], item.calls[self.index])
            # A layer that stands for its own output and has lost inputs is fitted to what it would make of those that arrive.
            wanted = have if apart else item.wanted(place)
            sums[item.domain].add(seen[0], (wanted - have).to(seen[0].device))
            rest.append(found[0] if found else None)
            if found:
                item.hidden[INPUT] = seen[0]
        for one in sums:
            one.join()
        return sums, rest

    def _arrived(self, group: Sequence[str], sums: Sequence[Sums], itself: bool) -> Arrived:
        give_back()
        moments, missing = self._mixed(sums)
        if not (moments.G.diagonal().isfinite().all() and missing.isfinite().all()):
            raise FloatingPointError(f"the input of layer {group[0]} holds NaN or Inf on the calibration text")
        return Arrived({name: linear_at(self._model, name) for name in group}, moments, missing, itself, self._mu)

    def _mixed(self, sums: Sequence[Sums]) -> tuple[Moments, Tensor]:
        """The moments of all domains, and E, mixed as ``moments.mix`` mixes G and mean absolute values; sums are used up."""
        scales = mixing([s.squares.mean() / s.n for s in sums], self._weights)
        G, E = (
            _total(getattr(s, part).mul_(a / s.n) for a, s in zip(scales, sums, strict=True))
            for part in ("outer", "cross")
        )
        roots = [(w * a) ** 0.5 for w, a in zip(self._weights, scales, strict=True)]
        mean_abs = _total(root * cast(Tensor, s.absolute) / s.n for root, s in zip(roots, sums, strict=True))
        for one in sums:
            one.forget()
        return Moments(G, mean_abs, sum(s.n for s in sums)), E


def _total(tensors: Iterator[Tensor]) -> Tensor:
    """Their sum, in the first."""
    total = next(tensors)
    for tensor in tensors:
        total += tensor
    return total
