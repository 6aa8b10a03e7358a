"""What is alive during a sweep: float and quantized values, chunk by chunk, inside a memory budget."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

Value: TypeAlias = "Tensor | tuple[Tensor, ...]"


@dataclass(frozen=True, eq=False)
class Pair:
    """One value of the graph on one chunk of rows; `quantized is real` where nothing upstream is quantized."""

    real: object
    quantized: object

    @property
    def same(self) -> bool:
        """Whether the quantized network has the float network's value."""
        return self.quantized is self.real


class Values:
    """Pairs by (node, chunk). Beyond the budget, what is needed last goes to memory-mapped files.

    Units: budget in bytes.
    """

    def __init__(self, next_use: Callable[[fx.Node], int], budget: int, folder: Path | None = None) -> None:
        self._next_use, self._budget = next_use, budget
        self._held: dict[fx.Node, dict[int, Pair]] = {}
        self._bytes: dict[fx.Node, int] = {}
        self._spilled: set[fx.Node] = set()
        self._scratch = tempfile.TemporaryDirectory(prefix="dmqfx-sweep-", dir=folder)
        self.peak = 0
        self.spilled_bytes = 0

    def put(self, node: fx.Node, chunk: int, pair: Pair) -> None:
        """Keep a pair; others may be written to disk for it."""
        if node in self._spilled:
            pair = self._to_disk(node, chunk, pair)
        else:
            self._bytes[node] = self._bytes.get(node, 0) + _size(pair)
        self._held.setdefault(node, {})[chunk] = pair
        while sum(self._bytes.values()) > self._budget and self._bytes:
            self._spill(max(self._bytes, key=self._next_use))
        self.peak = max(self.peak, sum(self._bytes.values()))

    def get(self, node: fx.Node, chunk: int) -> Pair:
        """The pair of a node on a chunk.

        Raises: KeyError if it was never put, or dropped.
        """
        return self._held[node][chunk]

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._held

    def drop(self, nodes: Sequence[fx.Node]) -> None:
        """Let go of values that nothing reads any more."""
        for node in nodes:
            self._held.pop(node, None)
            self._bytes.pop(node, None)
            self._spilled.discard(node)
            for file in Path(self._scratch.name).glob(f"{node.name}.*.bin"):
                file.unlink()

    def close(self) -> None:
        """Remove the files."""
        self._held.clear()
        self._scratch.cleanup()

    def _spill(self, node: fx.Node) -> None:
        self._spilled.add(node)
        self._held[node] = {k: self._to_disk(node, k, pair) for k, pair in self._held[node].items()}
        del self._bytes[node]

    def _to_disk(self, node: fx.Node, chunk: int, pair: Pair) -> Pair:
        def move(name: str, value: object) -> object:
            parts = iter(range(1 << 30))

            def write(tensor: Tensor) -> Tensor:
                path = Path(self._scratch.name) / f"{node.name}.{chunk}.{name}{next(parts)}.bin"
                self.spilled_bytes += tensor.nbytes
                return mapped(tensor, path)

            return tree_map_only(Tensor, write, value)

        real = move("f", pair.real)
        return Pair(real, real if pair.same else move("q", pair.quantized))


def mapped(tensor: Tensor, path: Path) -> Tensor:
    """A copy of a tensor in a memory-mapped file, which the system may leave on disk."""
    if not tensor.numel():
        return tensor.clone()
    found = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return found.view(tensor.shape).copy_(tensor)


def _size(pair: Pair) -> int:
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    tree_map_only(Tensor, count, pair.real if pair.same else (pair.real, pair.quantized))
    return total
