"""Factor layers by one method and put the factors in their place: all at once, or in the order they run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.compression.distill import distill_
from nsvd.compression.measure import is_mine, naming, owners, prepare_layer
from nsvd.compression.ordered import OURS, STREAMS, Arrived, FollowedBlock, followed
from nsvd.compression.refine import refine_block_
from nsvd.compression.report import Clock, relative_errors
from nsvd.compression.request import Request
from nsvd.linalg import Decomposition, LowRank, saves_parameters
from nsvd.linalg.decomposition import Spectrum
from nsvd.linalg.factors import n_params, remaining
from nsvd.linalg.precision import home
from nsvd.stored.checkpoint import compressed_layer, describe, empty_layer
from nsvd.stored.files import sha256
from nsvd.stored.layers import CompressedLayer, NarrowLinear, stand_in
from nsvd.walk.calibrate import Walked
from nsvd.walk.decoder import longest_list
from nsvd.walk.lazy import LazyBlock, as_first, held, read_from, revert, settle
from nsvd.walk.memory import give_back
from nsvd.walk.processes import count, gathered, same
from nsvd.walk.shelf import Kept, Shelf
from nsvd.walk.statistics import Statistics
from nsvd.walk.stream import borders_of
from nsvd.walk.targets import by_block, shape_of

TARGET_RIDGE = 0.03  # of shifted targets, for methods without a ridge of their own: the inputs never fix a target alone

Packed = tuple[dict | None, dict[str, Tensor]]  # what ``describe`` says of a layer, if it is compressed, and its state


@dataclass
class Exchange:
    """Factor layers of a model as the request asks, and put the factors in their place, block by block.

    ``shelf`` is where finished blocks are noted: one that lasts lets an interrupted exchange go on behind them. ``stage`` is the
    name that they have there. Several processes deal the layers of a block, and all put them in their place.
    """

    model: nn.Module
    layers: Mapping[str, nn.Linear]  # dense, all that could be exchanged
    stats: Statistics | Walked | None
    ask: Request
    clock: Clock
    shelf: Shelf = field(default_factory=Shelf)
    stage: str = "final"
    originals: Mapping[str, nn.Linear] = field(default_factory=dict)  # what stood where layers have lost neurons
    errors: dict[str, dict[str, float]] = field(default_factory=dict, init=False)  # relative ones, by layer

    def __post_init__(self) -> None:
        self.options = self.ask.method.resolve(self.ask.options)
        self.list, self.blocks = longest_list(self.model) or ("", [self.model])
        self.owner = owners(self.model, self.layers)

    @property
    def ratio(self) -> float:
        """The fraction of the layers' parameters that lower ranks are to remove, with what has gone before."""
        before, now = (sum(layer.weight.numel() for layer in which.values()) for which in (self.before, self.layers))
        return self.ask.removed if before == now else 1 - remaining(before, self.ask.removed) / now

    @property
    def before(self) -> dict[str, nn.Linear]:
        """The layers as they were at first."""
        return dict(self.layers) | dict(self.originals)

    def smaller(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """The ranks of those layers that are worth exchanging."""
        shapes = {name: shape_of(self.layers[name]) for name in ranks}
        return {name: k for name, k in ranks.items() if saves_parameters(*shapes[name], k, self.ask.factors)}

    @property
    def measured(self) -> Statistics | None:
        """The statistics, where all moments are at hand: those taken on a walk serve ranks that are known."""
        return cast(Statistics | None, self.stats)

    def at_once(self, ranks: Mapping[str, int], prepared: Mapping[str, Decomposition] | None) -> None:
        """Every layer for the inputs of the dense model."""
        for index, names in tqdm(
            by_block(self.model, ranks).items(), self.stage, disable=not self.ask.progress, leave=False
        ):
            if self.resumed(index):
                continue
            with held(self.blocks[index]):
                if isinstance(self.stats, Walked):
                    self.stats[names[0]]  # takes those of the whole block
                    self.clock.lap("calibrate")
                made = {}
                for name in names:
                    if not is_mine(self.owner, name):
                        continue
                    one = prepared[name].to(home(self.layers[name].weight)) if prepared is not None else None
                    how = (self.layers[name], name, self.stats, self.ask.whole, self.options)
                    one = one or prepare_layer(*how, k=ranks[name])
                    self.clock.lap("decompose")
                    made[name] = self._cut(name, one, ranks[name])
                self.put(index, told(made, self.owner, {name: self.layers[name] for name in names}))
            if isinstance(prepared, Kept):  # of what is done the singular values are enough
                for name in names:
                    prepared[name] = Spectrum(prepared[name].s)
        self.clock.lap("exchange")

    def in_order(self, names: Iterable[str], ranks: Mapping[str, int]) -> None:
        """Every layer for the inputs that the layers before it leave it, towards what the dense model has there.

        Those of the ``names`` that have no rank stay dense: they get the best weight of full rank, which costs no parameters.
        """
        ask, inside, done, begin = self.ask, by_block(self.model, names), 0, 0
        while done < len(self.blocks) and f"{self.stage}/{done}" in self.shelf:
            done += 1
        last = max((at for at in borders_of(self.shelf, STREAMS) if at <= done), default=0) if self.shelf.lasting else 0
        while begin < last and self.resumed(begin):
            begin += 1
        how = {"mu": self.options.get("mu", TARGET_RIDGE), "weights": self._shares(), "unsettled": bool(ask.refine)}
        how |= {"originals": self.originals, "begin": begin, "shelf": self.shelf, "progress": ask.progress}
        with closing(followed(self.model, ask.domains, list(names), **how)) as blocks:
            for block in blocks:
                for arrived in block.inputs():
                    self.clock.lap("follow")
                    owner = owners(self.model, arrived.dense)
                    dense, mine = arrived.dense, [name for name in owner if is_mine(owner, name)]
                    fits = {name: self._fitted(name, arrived, ranks.get(name)) for name in mine}
                    del arrived  # its matrices are not to stay beside what comes next
                    give_back()
                    made = {name: self._stand_in(name, fits.pop(name), ranks.get(name)) for name in mine}
                    for name, layer in told(made, owner, dense).items():
                        self.model.set_submodule(name, layer)
                here = inside.get(block.index, ())
                if ask.refine and here:
                    self._refine(block, [name for name in here if name in ranks])
                block.step()
                self.clock.lap("follow")
                self.put(block.index, {name: self.model.get_submodule(name) for name in here})
        for name in names:  # they were made while the model was in evaluation mode
            self.model.get_submodule(name).train(self.layers[name].training)

    def _fitted(self, name: str, arrived: Arrived, k: int | None) -> Decomposition | Tensor:
        """What a layer should be for the inputs that arrive at it: without a rank a dense weight."""
        with naming(name):
            target = arrived.target(name)
            if k is not None:
                H = self._gradients.get(name)
                known = dataclasses.replace(arrived.moments, H=None if H is None else H.to(target.device))
                target = self.ask.whole.prepare(target, known, k=k, **self.options)
        self.clock.lap("decompose")
        return target

    def _stand_in(self, name: str, fit: Decomposition | Tensor, k: int | None) -> nn.Module:
        """What takes the place of a layer; its errors are noted."""
        if k is not None:
            return self._cut(name, cast(Decomposition, fit), k)
        new = copy.deepcopy(self.layers[name])
        new.weight.copy_(cast(Tensor, fit))
        if not new.weight.isfinite().all():
            raise FloatingPointError(
                f"layer {name}: the weight that fits its inputs is too large for {new.weight.dtype}"
            )
        self.errors[name] = relative_errors(self.layers[name], new.weight, self.stats, name)
        self.clock.lap("errors")
        return NarrowLinear.of(new) if name in self.originals else new

    def _refine(self, block: FollowedBlock, names: Sequence[str]) -> None:
        """Fit the factors of a block to what the dense one gives out."""
        last = by_block(self.model, self.layers)[block.index][-1]
        refine_block_(block, self._stream_metric(last, block), steps=self.ask.refine, seed=self.ask.seed)
        self.clock.lap("refine")
        self._measure(names)

    def put(self, index: int, new: Mapping[str, nn.Module]) -> None:
        """Exchange layers of a block, held, and note that it is done."""
        for name, layer in new.items():
            self.model.set_submodule(name, layer)
        self._join({name: self.errors[name] for name in new if name in self.errors})
        if not self.shelf.lasting:
            return
        if isinstance(self.stats, Walked):
            self.stats.save()
        at = self.stats.at if isinstance(self.stats, Walked) else None
        settle(self.blocks[index], self._file(index))
        errors = {name: self.errors[name] for name in new if name in self.errors}
        kinds = {name: describe(layer) for name, layer in new.items() if isinstance(layer, CompressedLayer)}
        file = self._file(index)  # a block in memory has none, and so cannot be resumed
        told = {"layers": kinds, "errors": errors, "at": at, "sum": sha256(file) if file.is_file() else None}
        self.shelf.put(f"{self.stage}/{index}", {}, **told)
        if isinstance(self.stats, Walked):
            self.stats.forget()

    def resumed(self, index: int) -> bool:
        """Whether an earlier run has finished the block: then its layers are in their place."""
        key = f"{self.stage}/{index}"
        if not self.shelf.lasting or key not in self.shelf:
            return False
        if isinstance(self.stats, Walked) and index >= self.stats.at:
            return False  # the walk has to go through the dense block again
        note, block = self.shelf.note(key), self.blocks[index]
        if note["sum"] is None or not isinstance(block, LazyBlock):
            return False
        for name, spec in note["layers"].items():
            self.model.set_submodule(name, empty_layer(name, self.layers[name], spec))
        if sha256(self._file(index)) != note["sum"]:
            raise OSError(f"{self._file(index)} is not what was written there")
        read_from(block, self._file(index))
        self.errors |= note["errors"]
        return True

    def _file(self, index: int) -> Path:
        """Where a finished block lies."""
        return self.shelf.file(f"{self.stage}-block/{index}")

    def distill(self, touched: Sequence[str], names: Sequence[str]) -> list[float]:
        """All factors together, towards what the dense model predicts; the loss at every step. ``touched`` are all layers that
        are not what they were, the ``names`` those that have factors."""
        ask, dense = self.ask, {name: self.before[name] for name in touched}
        how = {"steps": ask.distill, "seed": ask.seed, "progress": ask.progress}
        losses = distill_(self.model, dense, ask.domains, self._shares(), **how)
        self.clock.lap("distill")
        self._measure(names)
        return losses

    def undo(self, names: Iterable[str]) -> None:
        """Put the layers themselves back."""
        for block, layers in self._by_block({name: self.layers[name] for name in names}):
            revert(block, layers)

    def place(self, name: str) -> tuple[nn.Module, str]:
        """The block that holds a layer, and the layer's name in there."""
        (index,) = by_block(self.model, [name])
        return self.blocks[index], name.removeprefix(f"{self.list}.{index}.") if self.list else name

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the layers that have lost neurons are what they were."""
        with ExitStack() as stack:
            for block, layers in self._by_block(self.originals):
                stack.enter_context(as_first(block, layers))
            yield

    def _by_block(self, layers: Mapping[str, nn.Linear]) -> Iterator[tuple[nn.Module, dict[str, nn.Linear]]]:
        """The blocks that hold the layers, and the layers by their names in there."""
        for names in by_block(self.model, layers).values():
            yield self.place(names[0])[0], {self.place(name)[1]: layers[name] for name in names}

    def rows(self, wanted: Mapping[str, int], smaller: Mapping[str, int]) -> list[dict]:
        """A row a layer for the report."""
        rows = []
        for name, layer in self.layers.items():
            (d_out, d_in), (m, n) = self.before[name].weight.shape, layer.weight.shape
            params = n_params(m, n, smaller[name], self.ask.factors) if name in smaller else m * n
            row = {"layer": name, "d_out": d_out, "d_in": d_in, "rank": wanted.get(name), "dense": name not in smaller}
            left = {"outputs": m, "inputs": n} if self.originals else {}
            rows.append(row | left | {"params": params} | self.errors.get(name, {}))
        return rows

    def _cut(self, name: str, one: Decomposition, k: int) -> CompressedLayer:
        """The stand-in of a layer; its errors are noted."""
        with naming(name):
            value: LowRank = self.ask.whole.cut(one, k, **self.options)
            new = stand_in(self.layers[name], value, self.ask.factors)
        self.clock.lap("cut")
        give_back()
        self.errors[name] = relative_errors(self.layers[name], value.dense(), self.stats, name)
        self.clock.lap("errors")
        return new

    def _measure(self, names: Iterable[str]) -> None:
        """Note the errors of what stands in the model now."""
        found = {}
        for name in names:
            if is_mine(self.owner, name):
                now = compressed_layer(self.model, name).dense()
                found[name] = relative_errors(self.layers[name], now, self.stats, name)
        self._join(found)
        self.clock.lap("errors")

    def _join(self, errors: dict[str, dict[str, float]]) -> None:
        """Note the errors that each process has found."""
        for found in gathered(errors):
            self.errors |= found

    def _shares(self) -> list[float]:
        count = len(self.ask.domains)
        return self.stats.shares(count) if self.stats else [1 / count] * count

    @property
    def _gradients(self) -> Mapping[str, Tensor]:
        """H of the layers that the statistics know it of."""
        return {} if self.stats is None else self.stats.gradients

    def _stream_metric(self, last: str, block: FollowedBlock) -> Tensor | None:
        """H of the block's last layer, what the loss makes of errors there.

        None where it is not known, or the block changes that output before it gives it out (a norm).
        """
        H = self._gradients.get(last) if block.batches and last not in block.within else None
        if H is None:
            return None
        stream: Tensor = block.batches[0].hidden[OURS]
        if len(H) != stream.shape[-1]:
            return None
        return H.to(stream.device, torch.float32)


@torch.no_grad()
def told(
    made: Mapping[str, nn.Module], owner: Mapping[str, int], dense: Mapping[str, nn.Linear]
) -> dict[str, nn.Module]:
    """What takes the place of each ``dense`` layer, from the process that owns it and has ``made`` it."""
    if count() == 1:
        return dict(made)
    new = {}
    for name, layer in dense.items():
        spec, state = cast(Packed, same(_packed(made[name]) if name in made else None, owner[name]))
        new[name] = made[name] if name in made else _unpacked(name, layer, spec, state)
    return new


def _packed(layer: nn.Module) -> Packed:
    spec = describe(layer) if isinstance(layer, CompressedLayer) else None
    return spec, {name: value.cpu().clone() for name, value in layer.state_dict().items()}


def _unpacked(name: str, layer: nn.Linear, spec: dict | None, state: dict[str, Tensor]) -> nn.Module:
    new = copy.deepcopy(layer) if spec is None else empty_layer(name, layer, spec)
    new.requires_grad_(layer.weight.requires_grad)
    new.load_state_dict(state)
    return new.train(layer.training)
