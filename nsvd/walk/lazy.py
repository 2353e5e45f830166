"""Blocks that lie in files: their numbers are in memory while they run or are held, and on ``meta`` otherwise.

A lazy block reads itself when it is called, so whatever runs a model runs it unchanged. Who calls a block several times, or looks
at its weights, holds it. What takes the place of its layers stays in memory until it is settled in a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nsvd.stored.files import replacing
from nsvd.stored.folder import CheckpointError
from nsvd.stored.foreign import reading
from nsvd.stored.skeleton import check_finite
from nsvd.stored.transposed import linear_at
from nsvd.walk import processes
from nsvd.walk.hooks import exchanged
from nsvd.walk.memory import give_back


class Place(NamedTuple):
    """Where a tensor lies: a safetensors file, and its name in there."""

    file: Path
    key: str


class Slot(NamedTuple):
    """Where a tensor stands in a module: among its parameters or buffers, by name."""

    registry: dict[str, Any]  # ``_parameters`` or ``_buffers``
    name: str

    @property
    def tensor(self) -> Tensor:
        return self.registry[self.name]

    def put(self, tensor: Tensor) -> None:
        self.registry[self.name] = tensor


class Here(NamedTuple):
    """A tensor that is in memory for the time of a hold, and what stands in its slot afterwards."""

    slot: Slot
    tensor: Tensor
    empty: Tensor


@dataclass
class Source:
    """What a lazy block knows of itself: its name in the model, the places of its tensors, and who holds it.

    ``places`` are those of now, ``first`` those in the files of the model, ``base`` those that ``revert`` goes back to.
    """

    name: str
    first: dict[str, Place]
    device: torch.device
    places: dict[str, Place] = field(init=False)
    base: dict[str, Place] = field(init=False)
    holds: int = 0
    here: list[Here] = field(default_factory=list)
    checked: bool = False  # whether all values were finite when they were first read

    def __post_init__(self) -> None:
        self.places = self.base = self.first


class LazyBlock(nn.Module):
    """A block that reads itself for every call; ``make_lazy`` makes one of a block of any class."""

    source: Source


@cache
def _lazy(kind: type[nn.Module]) -> type[LazyBlock]:
    @wraps(kind.forward)
    def forward(self, *args, **kwargs):
        with held(self):
            return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (LazyBlock, kind), {"forward": forward, "__module__": kind.__module__})


def make_lazy(block: nn.Module, source: Source) -> None:
    """Let a block read its parameters and persistent buffers from files; those that it has are dropped."""
    block.__class__ = _lazy(type(block))
    block.source = source  # pyright: ignore[reportArgumentType]  # an attribute like any other
    for slot in slots(block).values():
        slot.put(_emptied(slot.tensor).requires_grad_(False))


def is_lazy(model: nn.Module) -> bool:
    """Whether blocks of the model are read from files."""
    return any(isinstance(module, LazyBlock) for module in model.modules())


@contextmanager
def held(block: nn.Module) -> Iterator[None]:
    """Inside, a block's numbers are in memory; they are dropped when the last of several holds ends.

    Layers may be exchanged inside. What takes their place stays in memory until it is settled; a change of a tensor in its place
    is lost unless it is settled. A block that is not lazy is in memory anyway.

    Raises:
        CheckpointError: if a file is not what it was, or a parameter that is read for the first time holds NaN or Inf.
    """
    if not isinstance(block, LazyBlock):
        try:
            yield
        finally:
            give_back()
        return
    if not block.source.holds:
        _fill(block)
    block.source.holds += 1
    try:
        yield
    finally:
        block.source.holds -= 1
        if not block.source.holds:
            _drop(block)
            give_back()


def settle(block: nn.Module, file: Path) -> None:
    """Write a held block as it is to one safetensors file, by the names inside the block, and read it from there from now on.

    Nothing happens to a block that is not lazy. Of several processes 0 writes the file, and all read it.

    Raises:
        OSError: if the file cannot be written.
        RuntimeError: if the block is not held.
    """
    if not isinstance(block, LazyBlock):
        return
    if not block.source.holds:
        raise RuntimeError(f"{block.source.name} is settled, but not held")
    tensors = {name: slot.tensor.detach().contiguous() for name, slot in slots(block).items()}

    def write() -> None:
        with replacing(file) as part:
            save_file(tensors, part, metadata={"format": "pt"})

    processes.once(write)
    processes.see(file)
    read_from(block, file)


def read_from(block: LazyBlock, file: Path) -> None:
    """Read all tensors of a block from one file that ``settle`` has written, from now on.

    Its layers must be of the kinds and sizes that they had then; they may be on ``meta``.
    """
    source, found = block.source, slots(block)
    source.places = {name: Place(Path(file), name) for name in found}
    known = {id(here.tensor) for here in source.here}
    for slot in found.values():
        if not slot.tensor.is_meta and id(slot.tensor) not in known:
            source.here.append(Here(slot, slot.tensor, _emptied(slot.tensor)))
    if not source.holds:
        _drop(block)


def revert(block: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Put the first layers back, by their names inside the block; a lazy block is read from the first files again.

    Where ``rebase`` has put a layer, that one counts as the first.
    """
    for name, layer in layers.items():
        block.set_submodule(name, layer)
    if isinstance(block, LazyBlock):
        _drop(block)
        block.source.places = block.source.base
        if block.source.holds:
            _fill(block)


def rebase(block: nn.Module, name: str, layer: nn.Linear, file: Path | None = None) -> None:
    """Put a layer in a block, by its name in there, for ``revert`` to go back to.

    A lazy block reads it from a safetensors file, by the names of the layer's own tensors, or without a file from the first files.
    The layer is on ``meta`` then.
    """
    if isinstance(block, LazyBlock):
        source, own = block.source, layer.state_dict()
        found = {
            f"{name}.{part}": source.first[f"{name}.{part}"] if file is None else Place(file, part) for part in own
        }
        source.base = source.base | found
    revert(block, {name: layer})


@contextmanager
def as_first(block: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, these layers are in a block again, by their names in there, with the numbers of the first files if it is lazy.

    Nothing else in the block may have been exchanged.
    """
    with exchanged(block, layers):
        if not isinstance(block, LazyBlock):
            yield
            return
        source, known, places = block.source, len(block.source.here), block.source.places
        source.places = source.first
        try:
            if source.holds:
                _fill(block)
            yield
        finally:
            _drop(block, known)
            source.places = places


def places(block: LazyBlock) -> Mapping[str, Place]:
    """Where each tensor of a lazy block is read from as of now, by its name inside the block."""
    return dict(block.source.places)


def held_modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules in their order; the numbers of those in a lazy block are in memory while they are looked at."""
    if isinstance(model, LazyBlock) or not is_lazy(model):
        with held(model):
            yield from model.modules()
        return
    yield model
    for child in model.children():
        yield from held_modules(child)


def weight_of(model: nn.Module, layer: str) -> Tensor:
    """The weight (d_out, d_in) of a layer, read for this where its block is in files."""
    parts = layer.split(".")
    above = (model.get_submodule(".".join(parts[:count])) for count in range(len(parts)))
    with held(next((module for module in above if isinstance(module, LazyBlock)), model)):
        return linear_at(model, layer).weight.detach()


def slots(module: nn.Module) -> dict[str, Slot]:
    """Every parameter and persistent buffer inside a module, by dotted name: what a state dict holds."""
    found = {}
    for path, inner in module.named_modules():
        stored: dict[str, dict[str, Any]] = {part: inner._parameters for part in inner._parameters}
        stored |= {part: inner._buffers for part in inner._buffers if part not in inner._non_persistent_buffers_set}
        for part, registry in stored.items():
            if registry[part] is not None:
                found[f"{path}.{part}" if path else part] = Slot(registry, part)
    return found


@torch.inference_mode(False)  # whatever reads a block, its tensors may be part of a graph
@torch.no_grad()
def read(wanted: Mapping[str, Place], like: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors at these places, on the device, in the dtypes of ``like``; no file stays open.

    Raises ``CheckpointError`` for a file that cannot be read, or holds a tensor of another shape.
    """
    files: dict[Path, list[str]] = {}
    for name, place in wanted.items():
        files.setdefault(place.file, []).append(name)
    values = {}
    for file, names in files.items():
        try:
            with safe_open(file, "pt") as tensors:
                for name in names:
                    value = tensors.get_tensor(wanted[name].key)
                    if value.shape != like[name].shape:
                        raise CheckpointError(f"{file}: {wanted[name].key} has another shape than when it was opened")
                    values[name] = torch.empty_like(like[name], device=device).copy_(value)  # the file may change
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: a weight file is damaged ({error})") from error
    return values


def filled(empty: Tensor, value: Tensor) -> Tensor:
    """A value in the place of an empty tensor: a parameter if that is one."""
    return nn.Parameter(value, requires_grad=empty.requires_grad) if isinstance(empty, nn.Parameter) else value


def _fill(block: LazyBlock) -> None:
    source = block.source
    empty = {n: s for n, s in slots(block).items() if n in source.places and s.tensor.is_meta}
    wanted = {name: source.places[name] for name in empty}
    values = read(wanted, {name: slot.tensor for name, slot in empty.items()}, source.device)
    for name, slot in empty.items():
        here = Here(slot, filled(slot.tensor, values.pop(name)), slot.tensor)
        source.here.append(here)
        slot.put(here.tensor)
    if empty and not source.checked:
        try:
            with reading(next(iter(source.first.values())).file.parent):
                check_finite(block, f"{source.name}.")
        except BaseException:
            _drop(block)
            raise
        source.checked = True


def _drop(block: LazyBlock, since: int = 0) -> None:
    """Empty what was read, or is settled, ``since`` so much was: also in layers that were taken out of the block meanwhile."""
    for slot, tensor, empty in block.source.here[since:]:
        if slot.registry.get(slot.name) is tensor:
            slot.put(empty)
    del block.source.here[since:]


@torch.inference_mode(False)
def _emptied(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
