"""What is found once and kept as long as a tensor lives."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import Tensor

__all__ = ["Kept", "Stamp", "stamp"]

Value = TypeVar("Value")
Stamp = list[tuple[int, int] | None]


class Kept(Generic[Value]):
    """Values by the tensor itself, not what is in it; for every call of a layer, so a look-up costs a dictionary's.

    A value must not hold its tensor, which then would live for ever.
    """

    def __init__(self) -> None:
        self._of: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def __len__(self) -> int:
        return len(self._of)

    def get(self, tensor: Tensor) -> Value | None:
        """What was kept for this very tensor."""
        found = self._of.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def keep(self, tensor: Tensor, value: Value) -> None:
        """Until the tensor dies, or another value is kept for it."""
        number = id(tensor)

        def forget(dead: weakref.ref[Tensor]) -> None:
            known = self._of.get(number)
            if known is not None and known[0] is dead:
                del self._of[number]

        self._of[number] = (weakref.ref(tensor, forget), value)


def stamp(*tensors: Tensor | None) -> Stamp:
    """What changes when somebody writes into one of them, or moves it, as `share_memory_` does.

    Raises: RuntimeError for tensors made in inference mode, in which nobody counts what is written into them.
    """
    return [None if each is None else (each._version, each.data_ptr()) for each in tensors]
