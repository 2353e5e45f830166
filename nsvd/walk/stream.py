"""Texts on their way through the blocks: the hidden states of all windows at one border between two blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsvd.walk.decoder import Call, Decoder, Entered
from nsvd.walk.memory import room_on
from nsvd.walk.processes import count, gathered, rank, share, wait
from nsvd.walk.shelf import Shelf
from nsvd.walk.waiting import Row

READ = 2048  # tokens read at a time, or one window where it is longer
KEPT = 2**16  # tokens whose border is kept behind every block; one of n times as many is kept behind every n-th


@dataclass
class Batch:
    """Some windows of one domain: token ids (count, length), the number of the first among all windows of all domains, and
    the calls of every block."""

    domain: int
    first: int
    ids: Tensor
    calls: list[Call]


class Stream:
    """All windows of all domains before block ``at``; of several processes each has its share of them, unless not ``dealt``.

    ``hidden`` has the states (count, length, d) of every batch, in a row on a ``scratch`` shelf, or on the GPU where that has
    room. ``step`` takes them through the next block. Where a walk was interrupted, ``restore`` begins at a border that was kept.
    """

    def __init__(
        self,
        decoder: Decoder,
        domains: Sequence[Tensor],
        *,
        batch: int | None = None,
        dealt: bool = True,
        scratch: Shelf | None = None,
    ):
        self.decoder, self.at = decoder, 0
        self.batches: list[Batch] = []
        self.hidden = Row(scratch or Shelf(), "hidden", room_on(decoder.device))
        self.hidden.fill(self._entered(domains, batch, dealt))

    def _entered(self, domains: Sequence[Tensor], batch: int | None, dealt: bool) -> Iterator[Tensor]:
        entered: Entered | None = None
        for domain, first, ids in batches(domains, batch, dealt=dealt):
            entered = self.decoder.enter(ids, like=entered)
            self.batches.append(Batch(domain, first, entered.ids, entered.calls))
            yield entered.hidden

    @torch.no_grad()
    def step(self) -> None:
        """Run the next block on every batch."""
        with self.decoder.held(self.at):
            for index, batch in enumerate(self.batches):
                self.hidden[index] = self.through(batch, self.hidden[index])
        self.at += 1

    def through(self, batch: Batch, hidden: Tensor) -> Tensor:
        """What the next block makes of hidden states, on its device."""
        return self.decoder.run(self.at, hidden.to(self.decoder.device), batch.calls[self.at])

    def save(self, shelf: Shelf, key: str) -> None:
        """Keep the border for ``restore``, beside those that are there."""
        shelf.own.put(f"{key}/{self.at}", numbered(self.hidden))

    def restore(self, shelf: Shelf, key: str, at: int | None = None) -> None:
        """Go on at the border ``at``, or the last that was kept by all processes."""
        at = max(borders_of(shelf, key), default=0) if at is None else at
        if at:
            self.at = at
            self.hidden.fill(in_order(shelf.own.get(f"{key}/{at}")))

    def forget(self, shelf: Shelf, key: str) -> None:
        """Drop the borders that were kept before this one, which all processes have kept."""
        wait()
        for name in shelf.own.keys(key):
            if int(name.removeprefix(f"{key}/")) < self.at:
                shelf.own.drop(name)


def windows_read(length: int) -> int:
    """How many windows of so many tokens are read at a time: ``READ`` tokens, but one window at least."""
    return max(1, READ // length)


def batches(
    domains: Sequence[Tensor], most: int | None = None, *, dealt: bool = True
) -> Iterator[tuple[int, int, Tensor]]:
    """Windows that are read at a time: the number of their domain, that of the first of them, and their ids.

    They are ``most`` at the most, by default ``windows_read``. Of several processes each gets its share, unless not ``dealt``;
    with fewer windows than processes some get none.
    """
    total, first, turn = sum(map(len, domains)), 0, 0
    for domain, windows in enumerate(domains):
        here = most or windows_read(windows.shape[1])
        for ids in windows.split(share(total, here) if dealt else here):
            if not dealt or turn % count() == rank():
                yield domain, first, ids
            first, turn = first + len(ids), turn + 1


def kept_every(domains: Sequence[Tensor]) -> int:
    """Behind every how many blocks a border is kept: to write a long text's hidden states takes longer than a block."""
    return -(-sum(ids.numel() for ids in domains) // KEPT)


def borders_of(shelf: Shelf, key: str) -> set[int]:
    """The borders that are kept, by all processes."""
    return set.intersection(*gathered({int(name.removeprefix(f"{key}/")) for name in shelf.own.keys(key)}))


def numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """A list as a group of tensors for a shelf."""
    return {str(index): tensor for index, tensor in enumerate(tensors)}


def in_order(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The list again."""
    return [tensors[str(index)] for index in range(len(tensors))]
