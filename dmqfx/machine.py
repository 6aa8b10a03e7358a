"""The machine: what a number was measured on, and memory that goes back to it."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

__all__ = ["give_back_memory", "processor"]


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
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
