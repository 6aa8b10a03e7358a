"""Memory that one call after another writes into, and what makes room in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LIMIT", "Arena", "UnlikeError", "Watch"]

LIMIT = 128 * 2**20
"""Bytes of results between kernels that the replays of one module may keep."""
_EMPTY = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default, torch.ops.aten.new_empty_strided.default,
}  # fmt: skip


class UnlikeError(Exception):
    """A graph that does something else than native kernels, views, and operators that write into nothing."""


class Arena:
    """Blocks of memory that one call after another writes into; one that is given back is taken again."""

    def __init__(self) -> None:
        self.blocks: dict[int, torch.UntypedStorage] = {}
        self._free: list[torch.UntypedStorage] = []

    @property
    def size(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes() for block in self.blocks.values())

    def take(self, like: Tensor) -> Tensor:
        """A tensor of this shape, dtype and layout in a block of its own."""
        need = max(1, like.untyped_storage().nbytes())
        sizes = [
            (block.nbytes(), -n) for n, block in enumerate(self._free) if need <= block.nbytes() <= 2 * need
        ]
        # of free blocks the smallest, of equal ones that which was used last; the tensor's own memory nobody else has
        block = self._free.pop(-min(sizes)[1]) if sizes else like.untyped_storage()
        self.blocks[block.data_ptr()] = block
        if self.size > LIMIT:
            raise UnlikeError(f"more than {LIMIT >> 20} MB between kernels")
        return torch.empty(0, dtype=like.dtype).set_(block, 0, like.shape, like.stride())

    def give(self, start: int) -> None:
        """Take back the block that starts there."""
        self._free.append(self.blocks[start])


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # what torch does with subclasses
    """Has what a native operator makes room for in the arena, and sees whether it does more than that."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor its constructor
        self.arena, self.taken, self.computes = arena, list[Tensor](), False

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self.taken.append(self.arena.take(made))
            return self.taken[-1]
        aliases = [each.alias_info for each in func._schema.returns]
        self.computes |= any(alias is None or alias.is_write for alias in aliases)
        return made
