"""The manifest of a saved model: format version, provenance, and the SHA-256 of every file and of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dmqfx.errors import StoreError
from dmqfx.storage.codec import Json, dump, parse

__all__ = ["FORMAT_VERSION", "MANIFEST", "read_manifest", "write_manifest"]

MANIFEST: Final = "dmqfx.json"
FORMAT_VERSION: Final = 1
_DIGEST: Final = "sha256"


def write_manifest(directory: Path, provenance: Mapping[str, Json]) -> None:
    """Write the manifest of the files that are in a directory."""
    files: dict[str, Json] = {path.name: _digest(path) for path in sorted(directory.iterdir())}
    document: dict[str, Json] = {
        "format": "dmqfx",
        "format_version": FORMAT_VERSION,
        "files": files,
        "provenance": dict(provenance),
    }
    (directory / MANIFEST).write_text(_sealed(document), encoding="utf-8")


def read_manifest(directory: Path, required: frozenset[str]) -> tuple[frozenset[str], dict[str, Json]]:
    """The names of the files and the provenance, after every file was compared with its digest.

    Raises: StoreError naming the file that is missing, truncated or altered, or of a newer format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise StoreError(f"{directory} holds no {MANIFEST}: it was not saved by dmqfx, or not completely")
    text = path.read_bytes()
    document = parse(text, str(path))
    _check_version(document, path)
    if not _is_sealed(document, text):
        raise StoreError(f"{path} was altered; copy the directory again, or compile the model again")
    files, provenance = document.get("files"), document.get("provenance")
    if not isinstance(files, dict) or not isinstance(provenance, dict):
        raise StoreError(f"{path} lists no files")
    for name in sorted(required - set(files)):
        raise StoreError(f"{path} does not list {name}")
    for name in files:
        if Path(name).name != name:
            raise StoreError(f"{path} lists {name!r}, which is outside the directory")
    for name, digest in files.items():
        _check_file(directory / name, digest)
    return frozenset(files), provenance


def _check_version(document: Mapping[str, Json], path: Path) -> None:
    version = document.get("format_version")
    if document.get("format") != "dmqfx" or not isinstance(version, int):
        raise StoreError(f"{path} is not a manifest of dmqfx")
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path} has format {version}, and this dmqfx reads up to {FORMAT_VERSION}: update dmqfx"
        )
    if version < 1:
        raise StoreError(f"{path} has format {version}, which never was")


def _is_sealed(document: Mapping[str, Json], text: bytes) -> bool:
    try:
        return _sealed(document).encode() == text
    except ValueError:  # text that no writer would have written
        return False


def _check_file(path: Path, digest: Json) -> None:
    if not path.is_file():
        raise StoreError(f"{path} is missing; copy the directory again, all files of it")
    if _digest(path) != digest:
        raise StoreError(f"{path} was truncated or altered; copy it again, or compile the model again")


def _sealed(document: Mapping[str, Json]) -> str:
    """The text of a manifest, with the digest of everything else in it."""
    content = {key: value for key, value in document.items() if key != _DIGEST}
    seal = hashlib.sha256(dump(content).encode()).hexdigest()
    return dump({**content, _DIGEST: seal})


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
