"""What is alive during a sweep: float and quantized values, chunk by chunk, inside a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from dmqfx.errors import CalibrationError
from dmqfx.sweep.scratch import Scratch, Stored

__all__ = ["Pair", "Values", "megabytes"]

Key: TypeAlias = tuple[fx.Node, int]


@dataclass(frozen=True, eq=False)
class Pair:
    """One value of the graph on one chunk of rows; `quantized is real` where nothing upstream is quantized."""

    real: object
    quantized: object

    @property
    def same(self) -> bool:
        """Whether the quantized network has the float network's value."""
        return self.quantized is self.real

    def map(self, kind: type, change: Callable[..., object]) -> Pair:
        """The pair with every part of a kind changed."""
        real = tree_map_only(kind, change, self.real)
        return Pair(real, real if self.same else tree_map_only(kind, change, self.quantized))

    def parts(self) -> Iterator[object]:
        """Tensors, and whatever else values are made of."""
        yield from tree_leaves(self.real)
        if not self.same:
            yield from tree_leaves(self.quantized)


class Values:
    """Pairs by (node, chunk). Beyond the budget, what is needed last (Belady) is set aside in a file.

    Memory that several values share is counted once. `reserve` sets room apart for what is no value.

    Units: budget, resident and peak in bytes; next_use tells when a value is read the next time.
    """

    def __init__(
        self, budget: int, next_use: Callable[[fx.Node, int], tuple[int, int]], folder: Path | None = None
    ) -> None:
        self.budget, self._next_use = budget, next_use
        self._held: dict[Key, Pair] = {}
        self._aside: dict[Key, Pair] = {}
        self._users: dict[int, int] = {}  # how many values lie in the memory at an address
        self._scratch = Scratch(folder)
        self._reserved = 0
        self.resident = 0
        self.peak = 0

    @property
    def on_disk(self) -> int:
        """The bytes of disk that were ever needed."""
        return self._scratch.size

    def put(self, node: fx.Node, chunk: int, pair: Pair) -> None:
        """Keep a pair; others, or this one, are set aside for it.

        Raises: StoreError if the disk is full.
        """
        self.drop(node, chunk)
        own = pair.map(Tensor, _alone)
        self._held[node, chunk] = own
        self._count(own, 1)
        self._make_room()

    def get(self, node: fx.Node, chunk: int) -> Pair:
        """The pair of a node on a chunk; one that was set aside is a view of its file.

        Raises: KeyError if it was never put, or dropped.
        """
        held = self._held.get((node, chunk))
        return held if held is not None else self._aside[node, chunk].map(Stored, self._scratch.read)

    def drop(self, node: fx.Node, chunk: int) -> None:
        """Let go of a value, if it is there."""
        if (held := self._held.pop((node, chunk), None)) is not None:
            self._count(held, -1)
        if (aside := self._aside.pop((node, chunk), None)) is not None:
            aside.map(Stored, self._scratch.free)

    def reserve(self, nbytes: int, what: str) -> None:
        """Keep so many more bytes free of values, until `release`.

        Raises: CalibrationError if they are more than the budget.
        """
        if self._reserved + nbytes > self.budget:
            raise CalibrationError(
                f"{what} take {megabytes(nbytes)}, and {megabytes(self.budget - self._reserved)} of the memory"
                " budget are left\n  mend: a larger memory=, or fewer rows= in the pass's options"
            )
        self._reserved += nbytes
        self._make_room()

    def release(self) -> None:
        """End of all reservations."""
        self._reserved = 0

    def close(self) -> None:
        """Let go of everything, on disk too."""
        self._held.clear()
        self._aside.clear()
        self._users.clear()
        self.resident = 0
        self._scratch.close()

    def _make_room(self) -> None:
        while self.resident + self._reserved > self.budget and self._held:
            key = max(self._held, key=lambda key: self._next_use(*key))
            pair = self._held.pop(key)
            self._aside[key] = pair.map(Tensor, self._scratch.write)
            self._count(pair, -1)
        self.peak = max(self.peak, self.resident + self._reserved)

    def _count(self, pair: Pair, sign: int) -> None:
        """Add a pair's memory that nothing was counted in, or take away what nothing lies in any more."""
        for tensor in pair.parts():
            if not isinstance(tensor, Tensor):
                continue
            memory = tensor.untyped_storage()
            users = self._users.pop(memory.data_ptr(), 0)
            if max(users, users + sign) == 1:
                self.resident += sign * memory.nbytes()
            if users + sign:
                self._users[memory.data_ptr()] = users + sign


def megabytes(nbytes: int) -> str:
    """A number of bytes in words."""
    if nbytes < 2**20:
        return f"{nbytes / 2**10:.0f} kB"
    return f"{nbytes / 2**20:.0f} MB" if nbytes < 2**30 else f"{nbytes / 2**30:.1f} GB"


def _alone(tensor: Tensor) -> Tensor:
    """A tensor that does not keep more memory alive than it shows."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
