"""A directory that one process at a time may use; the lock of a process that died is gone with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dmqfx.errors import StoreError

if os.name == "posix":
    import fcntl

__all__ = ["LOCK", "locked"]

LOCK = "lock"
"""The name of the file that is locked."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; without POSIX locks nothing is held.

    Raises: StoreError if another process holds it, or the directory takes no file or no lock.
    """
    with ExitStack() as held:
        try:
            file = held.enter_context((directory / LOCK).open("a"))  # appending spoils no file of this name
            if os.name == "posix":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(directory / LOCK)):
                    raise BlockingIOError  # who had it has removed it, and another may have made a new one
        except BlockingIOError as error:
            raise StoreError(f"another process is at work in {directory}; wait for it, or end it") from error
        except OSError as error:
            raise StoreError(f"{directory} cannot be held for one process: {error}") from error
        yield
