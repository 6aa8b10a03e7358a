"""A directory that one process at a time may use; the lock of a process that died is gone with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmqfx.errors import StoreError

if os.name == "posix":
    import fcntl

__all__ = ["locked"]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; without POSIX locks nothing is held.

    Raises: StoreError if another process holds it.
    """
    with (directory / "lock").open("w") as file:
        if os.name == "posix":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StoreError(
                    f"another process is at work in {directory}; wait for it, or end it"
                ) from error
        yield
