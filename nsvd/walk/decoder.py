"""A decoder taken apart into prologue, blocks and epilogue, by its own forward pass.

The blocks are replaced by stubs for one pass. Each stub notes how the model calls its block and hands on the hidden states it
was given: this is the prologue, it runs embeddings, masks and rotations and no block. With a last stub that hands on other
hidden states, the same pass is the epilogue: last norm and head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from nsvd.walk.lazy import held
from nsvd.walk.text import trial, vocabulary

CLOSE = 1e-3  # relative error of the last hidden states; the walk repeats the same operations, so it is 0 but for odd kernels


@dataclass(frozen=True)
class Call:
    """What a block is called with besides the hidden states: masks, rotations, positions."""

    args: tuple
    kwargs: dict


@dataclass
class Entered:
    """A batch of token ids (count, length) behind the prologue: hidden states (count, length, d) and the call of every block."""

    ids: Tensor
    hidden: Tensor
    calls: list[Call]


class Decoder:
    """The blocks of a model, and what comes before and behind them.

    ``name`` is that of the list of blocks, ``blocks`` the list itself.

    Raises:
        ValueError: if the model has no list of blocks, or a walk over a few tokens does not give what the model gives: its
            blocks hand each other more than hidden states, or remember the text.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.name, self.blocks = block_list(model)
        self._tuples = False  # whether the blocks give tuples, and their stubs have to
        self._check()

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.model.parameters()).device

    def index(self, layer: str) -> int:
        """The number of the block that holds a layer; raises ``ValueError`` for a layer that is in none."""
        place = place_in(self.name, layer)
        if place is None:
            raise ValueError(
                f"layer {layer} is in none of the blocks {self.name}, so it cannot be reached in their order"
            )
        return place[0]

    @torch.no_grad()
    def enter(self, ids: Tensor, like: Entered | None = None) -> Entered:
        """Run the prologue on token ids (count, length); calls equal to those of ``like`` are shared with it."""
        ids = ids.to(self.device)
        with self._stubbed(len(self)) as stubs:
            body = getattr(self.model, "base_model", self.model)
            body(input_ids=ids, use_cache=False)
        calls, first = [stub.call for stub in stubs if stub.call is not None], stubs[0].came
        if first is None or len(calls) < len(self):
            raise ValueError(f"it does not run each of {self.name}")
        if like is not None and same([(c.args, c.kwargs) for c in calls], [(c.args, c.kwargs) for c in like.calls]):
            calls = like.calls
        return Entered(ids, first, calls)

    def held(self, index: int) -> AbstractContextManager[None]:
        """In the context a block's numbers stay in memory: for whoever runs it more than once. See ``nsvd.walk.lazy.held``."""
        return held(self.blocks[index])

    def run(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """Hidden states (count, length, d) behind a block."""
        return run_block(self.blocks[index], hidden, call)

    def pull(self, index: int, hidden: Tensor, call: Call, gradient: Tensor) -> Tensor:
        """The gradient of a loss with respect to the hidden states before a block, from that behind it.

        The block runs once more, and only its graph is held. Hooks on the outputs of its layers see their gradients.
        """
        hidden = hidden.detach().requires_grad_(True)
        with torch.enable_grad():
            out = self.run(index, hidden.clone(), call)  # a block may change its input in place
            return torch.autograd.grad(out, hidden, gradient)[0]

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Run the epilogue on the hidden states behind the last block; (count, length, vocabulary).

        Raises ``ValueError`` for a model without an output head.
        """
        with self.resumed(len(self), hidden):
            out = self.model(input_ids=ids, use_cache=False)
        if "logits" not in out:
            raise ValueError(f"{type(self.model).__name__} has no output head, which gradients and losses need")
        return out.logits

    def ended(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """What the body of the model gives out for hidden states (count, length, d) behind the last block."""
        with self.resumed(len(self), hidden):
            return self._last(ids)

    def _last(self, ids: Tensor) -> Tensor:
        """What the body of the model gives out for token ids, the head left out."""
        return getattr(self.model, "base_model", self.model)(input_ids=ids, use_cache=False)[0]

    @contextmanager
    def resumed(self, index: int, hidden: Tensor) -> Iterator[None]:
        """In the context the model's own pass begins at a block, with these hidden states (count, length, d) before it.

        Whatever reads the model then reads it as ever, on windows of this shape; the blocks before do not run.
        """
        with self._stubbed(index) as stubs:
            if stubs:
                stubs[-1].out = hidden
            yield

    @torch.no_grad()
    def _check(self) -> None:
        kind, given = type(self.model).__name__, []
        ids = trial(self.model)
        handle = self.blocks[0].register_forward_hook(lambda _m, _a, out: given.append(out))
        try:
            plain = self._last(ids)
        finally:
            handle.remove()
        if len(given) != 1:
            raise ValueError(f"{kind} cannot be run block by block: it does not run each of {self.name} once")
        self._tuples = isinstance(given[0], tuple)
        try:
            entered = self.enter(ids)
            self.enter(
                vocabulary(self.model) - 1 - ids
            )  # another text: whatever a model keeps of one is then of this one
            hidden = entered.hidden
            for index, call in enumerate(entered.calls):
                hidden = self.run(index, hidden, call)
            walked = self.ended(entered.ids, hidden)
        except (AttributeError, RuntimeError, TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{kind} cannot be run block by block: {error}") from error
        if plain.isfinite().all() and not (walked - plain).norm() <= CLOSE * plain.norm():
            raise ValueError(f"{kind} cannot be run block by block: its blocks hand on more than hidden states")

    @contextmanager
    def _stubbed(self, count: int) -> Iterator[list[_Stub]]:
        """Stubs in the place of the first so many blocks."""
        real = list(self.blocks)[:count]
        stubs = [_Stub(block, self._tuples) for block in real]
        try:
            for index, stub in enumerate(stubs):
                self.blocks[index] = stub
            yield stubs
        finally:
            for index, block in enumerate(real):
                self.blocks[index] = block


class _Stub(nn.Module):
    """Notes how a block is called; hands on the hidden states that it is given, or those that it is told to."""

    call: Call | None
    came: Tensor | None
    out: Tensor | None

    def __init__(self, block: nn.Module, tuples: bool):
        super().__init__()
        object.__setattr__(self, "block", block)  # no submodule: it is not to be found twice
        self.tuples, self.call, self.came, self.out = tuples, None, None, None

    def __getattr__(self, name: str):  # what the model's forward reads of a block, such as its kind of attention
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, *args, **kwargs):
        rest = dict(kwargs)
        came: Tensor = args[0] if args else rest.pop("hidden_states")
        self.came, self.call = came, Call(args[1:], rest)
        head = self.out is not None and came.shape[1] == 1 < self.out.shape[1]  # one token only asks for the head
        out = came if self.out is None or head else self.out
        if out.shape != came.shape:
            raise ValueError(f"hidden states {tuple(out.shape)} in the place of {tuple(came.shape)}")
        return (out, None) if self.tuples else out


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks that hidden states go through, and its name: the ``longest_list``.

    Raises:
        ValueError: if there is no list.
    """
    found = longest_list(model)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no list of blocks to go through in order")
    return found


def longest_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The longest of the module lists in the text decoder, and its name; lists in a list (a block's experts) are not looked at."""
    found = max(_outermost_lists(*text_decoder(model)), key=lambda item: len(item[1]), default=None)
    return found if found and len(found[1]) else None


def place_in(blocks: str, layer: str) -> tuple[int, str] | None:
    """The number of the block that holds a layer, and the layer's name in there; ``blocks`` is the name of their list."""
    number, _, inner = layer.removeprefix(f"{blocks}.").partition(".")
    return (int(number), inner) if layer.startswith(f"{blocks}.") and number.isdigit() else None


def text_decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """The part of the model that reads text, and its name: the whole model where it tells of no other."""
    decoder: nn.Module = getattr(model, "get_decoder", lambda: model)()
    if decoder is head_of(model):
        decoder = model  # what is called a decoder there is the head
    return next(name for name, module in model.named_modules() if module is decoder), decoder


def head_of(model: nn.Module) -> nn.Module | None:
    """The output embedding, where the model tells of one."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def _outermost_lists(name: str, module: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for child, inner in module.named_children():
        path = f"{name}.{child}" if name else child
        if isinstance(inner, nn.ModuleList):
            yield path, inner
        else:
            yield from _outermost_lists(path, inner)


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The block's output (count, length, d) for hidden states and its other arguments."""
    out = block(hidden, *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out


def same(a: object, b: object) -> bool:
    """Whether two nests of tensors and other values are equal."""
    (ours, form), (theirs, other) = tree_flatten(a), tree_flatten(b)
    if form != other:
        return False
    pairs = zip(ours, theirs, strict=True)
    return all(type(x) is type(y) and (torch.equal(x, y) if isinstance(x, Tensor) else x == y) for x, y in pairs)
