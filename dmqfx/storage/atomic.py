"""Files and directories that are the old one or the new one, complete, whatever happens while they are written."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from dmqfx.errors import StoreError
from dmqfx.storage.lock import locked

__all__ = ["TORN", "replacing", "replacing_file", "survivor"]

TORN: Final = ".*.dmqfx-*"
"""What a directory is called that `replacing` fills, as a glob: no other hidden file is ours."""


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """A path to write to; after the block the file there takes the place of `target`. An error changes nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_name(f".{target.name}.part")
    try:
        yield half
        half.replace(target)
    finally:
        half.unlink(missing_ok=True)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty directory to fill; after the block it takes the place of `target`. An error changes nothing.

    The old directory is renamed away, the new one renamed in, the old one deleted. If the process is killed
    between the two renames, both stand complete in a hidden directory beside the target: see `survivor`. What
    killed processes left is removed once a new directory has taken the place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    with _held(scratch):
        yield from _filled(scratch, target)
    _remove_leftovers(target)


@contextmanager
def _held(scratch: Path) -> Iterator[None]:
    """Hold the lock that says the process is alive, where the system and the file system have locks."""
    with ExitStack() as held:
        if os.name == "posix":
            with suppress(StoreError):
                held.enter_context(locked(scratch))
        yield


def _filled(scratch: Path, target: Path) -> Iterator[Path]:
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir()
        yield new
        _flush(new)
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:
            if old.exists():
                os.rename(old, target)
            raise
        _flush_directory(target.parent)
    finally:
        if target.exists() or not old.exists():  # never the only copy
            shutil.rmtree(scratch, ignore_errors=True)


def survivor(target: Path) -> Path | None:
    """What a killed `replacing` left of a directory that is gone, or None."""
    found = sorted(target.parent.glob(f"{_prefix(target)}*/old")) if target.parent.is_dir() else []
    return found[-1] if found and not target.exists() else None


def _remove_leftovers(target: Path) -> None:
    """Remove what processes that are dead left beside the target: a living one holds the lock of its directory."""
    if os.name != "posix":
        return  # without locks nobody knows who is alive
    name = re.compile(re.escape(_prefix(target)) + r"[a-z0-9_]{8}")  # as tempfile makes them
    for found in target.parent.iterdir():
        if name.fullmatch(found.name) and not found.is_symlink():
            with suppress(StoreError, OSError):
                _remove_if_dead(found)


def _remove_if_dead(directory: Path) -> None:
    if _is_ours(directory):
        with locked(directory):
            shutil.rmtree(directory, ignore_errors=True)


def _is_ours(directory: Path) -> bool:
    """Whether there is the lock of a save, and nothing but what a save makes."""
    there = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    return "lock" in there and there <= {"lock", "new", "old"}


def _prefix(target: Path) -> str:
    return f".{target.name}.dmqfx-"


def _flush(directory: Path) -> None:
    """Everything in a directory is on the disk."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    if os.name == "nt":
        return  # Windows opens no directories; its renames are journalled
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
