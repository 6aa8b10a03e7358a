"""How much memory automatic differentiation holds on to until the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Remembered", "remembered"]


@dataclass
class Remembered:
    """Units: bytes."""

    nbytes: int = 0


@contextmanager
def remembered() -> Iterator[Remembered]:
    """Counts what operations keep for their way back, each piece of memory once."""
    found, seen = Remembered(), set[int]()

    def keep(x: Tensor) -> Tensor:
        memory = x.untyped_storage()
        if memory.data_ptr() not in seen:
            seen.add(memory.data_ptr())
            found.nbytes += memory.nbytes()
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield found
