"""The machine: what a number was measured on, and memory that goes back to it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

__all__ = ["give_back_memory", "memory_given_back", "processor"]

_TRIM, _MAP = -1, -3  # parameters of mallopt
_ALONE: Final = 2 * 2**20
_MOST: Final = 32 * 2**20
"""From how many bytes on a tensor has memory of its own: while what is freed goes back, and as glibc ends up with."""


def processor() -> str:
    """The name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def give_back_memory() -> None:
    """Hand back to the system what was freed, on Linux with glibc.

    It keeps holes between what is still in use for itself, and tensors of up to 32 MB leave gigabytes of them.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Have large tensors go back to the system as soon as they are freed, and all else at the end.

    The way back through a network frees tensors in another order than it made them: the holes that glibc keeps were
    twice what was in use. A variable MALLOC_MMAP_THRESHOLD_ of the environment has the last word.
    """
    libc = _glibc()
    if libc is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc.mallopt(_MAP, _ALONE)
        libc.mallopt(_TRIM, 2 * _MOST)
    try:
        yield
    finally:
        if libc is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
            libc.mallopt(_MAP, _MOST)
        give_back_memory()


def _glibc() -> ctypes.CDLL | None:
    """The library of this process, if it is that one."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        return libc
    return None
