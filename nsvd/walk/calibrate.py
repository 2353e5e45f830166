"""Moments of every layer's inputs, one block at a time: what is held does not grow with the number of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.linalg import Moments
from nsvd.stored.folder import CheckpointError
from nsvd.walk.decoder import Decoder
from nsvd.walk.experts import experts_apart, filled, of_experts, scarce, sent_to_all, unreached
from nsvd.walk.hooks import evaluating, watch_inputs
from nsvd.walk.moments import (
    body_forward,
    check_names,
    check_sums,
    check_windows,
    inputs_of,
    mixed,
    origin_of,
    overflow,
    shares_of,
)
from nsvd.walk.shelf import Shelf
from nsvd.walk.statistics import Statistics
from nsvd.walk.stream import Batch, Stream, borders_of, kept_every, windows_read
from nsvd.walk.sums import Sums, finite
from nsvd.walk.targets import targets

STREAM, EXPERTS = "moments-stream", "moments-experts"  # on the shelf


@torch.inference_mode(False)
@torch.no_grad()
def calibrate(
    model: nn.Module,
    windows: Tensor,
    *,
    layers: Iterable[str] | None = None,
    batch: int | None = None,
    progress: bool = False,
) -> Statistics:
    """Second moments of the inputs of the named layers, by default all target layers.

    The text goes through the model one block at a time, ``batch`` windows at once, by default as many as ``stream.READ`` tokens
    are; the output head does not run. A model that cannot be taken apart is run whole. Layers that read one and the same tensor
    share their sums, see ``nsvd.walk.sums``. An expert has the moments of the tokens that are routed to it; where these are fewer
    than its inputs, they are filled up by the mean of all tokens that enter the block's experts, see ``nsvd.walk.experts.filled``.

    Raises:
        ValueError: if ``windows`` is empty or such as the model cannot read, or there is no such layer, or one that the text
            does not reach; it is named.
        FloatingPointError: if an input holds NaN or Inf; the first such layer is named. Likewise for what the model's
            body gives out, with the module where that begins.
    """
    check_windows(windows, model)
    with experts_apart(model):
        names = list(targets(model) if layers is None else layers)
        check_names(model, names)
        decoder = walkable(model, names)
        if decoder is None:
            return _whole(model, windows, names, batch, progress)
        return Walked(decoder, [windows], names, batch=batch, progress=progress).all({})


class Walked(Mapping[str, Moments]):
    """The same moments as ``calibrate`` and ``mix`` give, taken as they are asked for, in the order of the blocks.

    At any time it holds the hidden states (count, length, d) of all windows before one block, in the host's memory, and the
    moments of this block's layers. Those of earlier blocks are gone. The blocks themselves must stay as they are until
    theirs are taken: a layer may be exchanged once its block is passed. On a ``shelf`` that lasts, ``save`` keeps the border that
    was reached, and the same walk begins there the next time, or at the last that was kept up to ``most``. The border of
    a long text is kept behind some blocks only, see ``kept_every``.

    Raises:
        ValueError: as ``calibrate``; a layer in none of the blocks.
        KeyError: for a layer that is not there, or whose block is passed.
    """

    def __init__(
        self,
        decoder: Decoder,
        domains: Sequence[Tensor],
        layers: Sequence[str],
        weights: Sequence[float] | str = "uniform",
        *,
        shelf: Shelf | None = None,
        most: int | None = None,
        batch: int | None = None,
        progress: bool = False,
    ):
        self.decoder, self.gradients = decoder, {}
        for ids in domains:
            check_windows(ids, decoder.model)
        self.inputs, *others = [
            inputs_of(decoder.model, layers, ids, batch or windows_read(ids.shape[1])) for ids in domains
        ]
        if any(other != self.inputs for other in others):
            raise ValueError("the statistics to mix are not of the same layers")
        self._block = {layer: decoder.index(layer) for layer in layers}
        self._shares = shares_of(weights, len(domains))
        origins = [origin_of(decoder.model, ids) for ids in domains]
        self.origin = origins[0] if len(origins) == 1 else {"mixed": origins, "weights": self._shares}
        self._moments: dict[str, Moments] = {}
        self._shelf = shelf if shelf is not None and shelf.lasting else None
        scratch = None if shelf is None else shelf.scratch()
        with torch.no_grad(), evaluating(decoder.model):
            self._stream = Stream(decoder, domains, batch=batch, scratch=scratch)
        self._every = kept_every(domains)
        if self._shelf is not None:
            kept = borders_of(self._shelf, STREAM)
            self._stream.restore(self._shelf, STREAM, max((at for at in kept if most is None or at <= most), default=0))
            for at in range(self._stream.at):
                if (key := f"{EXPERTS}/{at}") in self._shelf:
                    self._count(self._shelf.note(key))
        self._bar = tqdm(total=len(decoder), desc="moments", disable=not progress, leave=False)
        self._bar.update(self._stream.at)

    def __getitem__(self, layer: str) -> Moments:
        if layer not in self._block:
            raise KeyError(f"the statistics hold no layer {layer!r}")
        if self._block[layer] < self._stream.at - 1:
            raise KeyError(f"the moments of layer {layer} are gone: its block is passed")
        while self._stream.at <= self._block[layer]:
            self._advance()
        return self._moments[self.inputs[layer]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def shares(self, _count: int) -> list[float]:
        """The weights, of sum 1, of the domains."""
        return self._shares

    @property
    def at(self) -> int:
        """The border that was reached."""
        return self._stream.at

    def save(self) -> None:
        """Keep the border, if it is one to be kept: what was taken up to here need not be taken again."""
        if self._shelf is not None and self._kept:
            self._stream.save(self._shelf, STREAM)

    def forget(self) -> None:
        """Let go of the borders that were kept before this one, if it is kept."""
        if self._shelf is not None and self._kept:
            self._stream.forget(self._shelf, STREAM)

    @property
    def _kept(self) -> bool:
        """Whether the border that was reached is one to be kept."""
        return self.at % self._every == 0

    def all(self, into: MutableMapping[str, Moments]) -> Statistics:
        """The moments of all layers, put ``into`` a mapping by the first layer that reads each input."""
        while self._stream.at < len(self.decoder):
            self._advance()
            into.update(self._moments)
            self.save()
            self.forget()
        self._moments = {}
        return Statistics(into, self.inputs, self.origin)

    @torch.no_grad()
    def _advance(self) -> None:
        """Take the next block's moments, and go on behind it."""
        self._moments = {}  # none stays in memory while the next block's are summed
        stream, model = self._stream, self.decoder.model
        here = [leader for leader in dict.fromkeys(self.inputs.values()) if self._block[leader] == stream.at]
        routed = bool(of_experts(model, here))
        with evaluating(model), self.decoder.held(stream.at):
            parts, sound = self._read(here, onwards=not routed)
            few = scarce(model, parts) if routed else {}
            if routed:
                with sent_to_all(model, few.values()):
                    every, sound = self._read(list(dict.fromkeys(few.values())), onwards=True)
        for sums in parts:
            check_sums(model, {name: one for name, one in sums.items() if name not in few})
        if routed:
            found = unreached(model, parts)
            self._count(found)
            if self._shelf is not None:
                self._shelf.put(f"{EXPERTS}/{stream.at}", {}, **found)
        stream.at += 1
        for batch, fine in zip(stream.batches, sound, strict=True):
            if not fine:
                raise overflow(model, batch.ids)
        for sums in every if few else ():
            check_sums(model, sums)
        beside = [{name: one.result() for name, one in sums.items()} for sums in every] if few else []
        for leader in here:
            each = [
                filled(sums[leader], beside[domain][few[leader]]) if leader in few else sums[leader].result()
                for domain, sums in enumerate(parts)
            ]
            self._moments[leader] = each[0] if len(each) == 1 else mixed(each, self._shares)
        self._bar.update()
        if stream.at == len(self.decoder):
            self._bar.close()

    def _count(self, found: Mapping[str, int]) -> None:
        """Note how many experts a block has, and how many of them no token has reached."""
        known = self.origin.get("experts", {"count": 0, "unreached": 0})
        self.origin["experts"] = {name: number + found[name] for name, number in known.items()}

    def _read(self, layers: Sequence[str], *, onwards: bool) -> tuple[list[dict[str, Sums]], list[Tensor]]:
        """The sums over the inputs of layers of the next block, for every domain.

        With ``onwards`` the hidden states are those behind the block afterwards; then the second value says of each batch whether
        they are finite.
        """
        stream, parts, sound = self._stream, [{name: Sums() for name in layers} for _ in self._shares], []
        for index, batch in enumerate(stream.batches):
            sums = parts[batch.domain]
            with watch_inputs(self.decoder.model, layers, lambda name, x, sums=sums: sums[name].add(x)):
                hidden = stream.through(batch, stream.hidden[index])
            if onwards:
                sound.append(self._sound(batch, hidden))
                stream.hidden[index] = hidden
        for sums in parts:
            for one in sums.values():
                one.join()
        return parts, sound

    def _sound(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Whether hidden states behind the block are finite, those behind the last one as the body of the model gives them out.

        The answer is on the device: to look at it is to wait for it.
        """
        last = self._stream.at + 1 == len(self.decoder)
        return finite(self.decoder.ended(batch.ids, hidden) if last else hidden)


def walkable(model: nn.Module, layers: Iterable[str] = ()) -> Decoder | None:
    """The model taken apart into blocks, or None where it cannot be run so, or one of the layers is in no block."""
    try:
        with evaluating(model):
            decoder = Decoder(model)
        for layer in layers:
            decoder.index(layer)
    except CheckpointError:  # of a block that is read
        raise
    except ValueError:
        return None
    return decoder


def _whole(model: nn.Module, windows: Tensor, names: Sequence[str], batch: int | None, progress: bool) -> Statistics:
    """``calibrate`` by whole passes: the sums of all layers at once."""
    batch = batch or windows_read(windows.shape[1])
    inputs = inputs_of(model, names, windows, batch)
    texts = tqdm(windows.split(batch), "calibrate", disable=not progress, leave=False)
    own = _summed(model, dict.fromkeys(inputs.values()), texts)
    few = scarce(model, [own])
    check_sums(model, {name: sums for name, sums in own.items() if name not in few})
    with sent_to_all(model, few.values()):
        every = _summed(model, few.values(), windows.split(batch)) if few else {}
    check_sums(model, every)
    beside = {name: sums.result() for name, sums in every.items()}
    moments = {n: filled(sums, beside[few[n]]) if n in few else sums.result() for n, sums in own.items()}
    experts = {"experts": found} if (found := unreached(model, [own]))["count"] else {}
    return Statistics(moments, inputs, origin_of(model, windows) | experts)


def _summed(model: nn.Module, layers: Iterable[str], texts: Iterable[Tensor]) -> dict[str, Sums]:
    """The sums over the inputs of layers, by one pass of the body of the model over the texts."""
    running, overflown = {name: Sums() for name in layers}, None
    with watch_inputs(model, running, lambda name, x: running[name].add(x)):
        for ids in texts:
            if not finite(body_forward(model, ids)) and overflown is None:
                overflown = ids
    if overflown is not None:  # of experts that no token has reached nothing is known
        check_sums(model, {name: sums for name, sums in running.items() if sums.n})
        raise overflow(model, overflown)
    return running
