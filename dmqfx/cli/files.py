"""Files and folders that are named on the command line: looked at before anything long is computed."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dmqfx.errors import DmqfxError

__all__ = ["read_prompts", "read_text", "to_be_file", "to_be_folder"]


def to_be_file(name: str) -> Path:
    """The path of a file to write, looked at before anything long is computed for it.

    Raises: DmqfxError if a folder has this name, or nothing can be written there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise DmqfxError(f"{name} is a folder; say the file to write")
    return _writable(path)


def to_be_folder(name: str) -> Path:
    """The path of a folder to write, looked at before anything long is computed for it.

    Raises: DmqfxError if a file has this name, or nothing can be written there.
    """
    path = Path(name).expanduser()
    if path.exists() and not path.is_dir():
        raise DmqfxError(f"{name} is a file; say a folder")
    return _writable(path)


def _writable(path: Path) -> Path:
    """The path, if the nearest folder above it takes files, and the folder that is there as well."""
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise DmqfxError(f"{path} cannot be written: {nearest} is a file, not a folder")
    for folder in (nearest, path) if path.is_dir() else (nearest,):
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise DmqfxError(
                f"{path} cannot be written: {folder} takes no files ({error.strerror})"
            ) from error
    return path


def read_text(name: str) -> str:
    """The text of a file.

    Raises: DmqfxError if it is not text; OSError if it cannot be read.
    """
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DmqfxError(f"{name} is not a text file in UTF-8: {error}") from error


def read_prompts(name: str) -> list[str]:
    """The prompts of a file, one a line.

    Raises: DmqfxError if it holds none or is not text; OSError if it cannot be read.
    """
    prompts = [line.strip() for line in read_text(name).splitlines() if line.strip()]
    if not prompts:
        raise DmqfxError(f"{name} holds no prompt; write one a line")
    return prompts
