"""A calibration on disk: safetensors shards named by their content, and a manifest that is written last."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from dmqfx.calibration.calibration import Calibration, Origin
from dmqfx.calibration.rows import Column, Rows
from dmqfx.errors import StoreError

__all__ = ["FORMAT", "load", "save"]

FORMAT = "dmqfx.calibration/1"
MANIFEST = "calibration.json"
_SHARD = re.compile(r"rows-[0-9a-f]{16}\.safetensors")


def save(calibration: Calibration, directory: str | PathLike[str], *, shard_bytes: int) -> None:
    """Write a calibration; what was in the directory before stays valid until the manifest is replaced.

    Raises: StoreError if the directory cannot be written.
    """
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        shards = [_write_shard(target, tensors) for tensors in _packed(_named(calibration), shard_bytes)]
        manifest: dict[str, object] = {
            "format": FORMAT,
            "rows": len(calibration),
            "groups": [_outline(group) for group in calibration.groups],
            "origins": [asdict(origin) for origin in calibration.origins],
            "shards": shards,
        }
        text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1) + "\n"
        _write(target / MANIFEST, text.encode())
        current = {shard["file"] for shard in shards}
        for old in target.iterdir():
            if _SHARD.fullmatch(old.name) and old.name not in current:
                old.unlink()
    except OSError as error:
        raise StoreError(f"cannot write a calibration to {target}: {error}") from error


def load(directory: str | PathLike[str]) -> Calibration:
    """Read a calibration, checking every byte.

    Raises: StoreError if anything is missing, truncated, altered or newer than this version.
    """
    source = Path(directory)
    manifest = _manifest(source / MANIFEST)
    tensors: dict[str, Tensor] = {}
    try:
        for shard in manifest["shards"]:
            tensors.update(_read_shard(source, **shard))
        groups = tuple(_group(k, outline, tensors) for k, outline in enumerate(manifest["groups"]))
        origins = tuple(
            Origin(**{**fields, "notes": tuple(fields["notes"])}) for fields in manifest["origins"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{source / MANIFEST} does not describe its shards: {error!r}") from error
    return Calibration(groups, origins)


def _named(calibration: Calibration) -> Iterator[tuple[str, Tensor]]:
    for k, group in enumerate(calibration.groups):
        yield f"{k}/trajectory", group.trajectory
        yield f"{k}/step", group.step
        for name, column in group.columns.items():
            yield f"{k}/index/{name}", column.index
            yield f"{k}/values/{name}", column.values


def _packed(named: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Shards of at most `limit` bytes or one value; what is bigger is cut into parts along its first dim."""
    shard, room = dict[str, Tensor](), limit
    for name, tensor in named:
        one = max(tensor[:1].nbytes, 1)
        start, part = 0, 0
        while start < len(tensor):
            if room < one and shard:
                yield shard
                shard, room = {}, limit
            piece = tensor[start : start + max(room // one, 1)]
            shard[f"{name}/{part}"] = piece.contiguous()
            room -= piece.nbytes
            start, part = start + len(piece), part + 1
    if shard:
        yield shard


def _outline(group: Rows) -> dict[str, object]:
    columns = {
        name: {
            "dtype": str(column.values.dtype).removeprefix("torch."),
            "shape": list(column.values.shape[1:]),
        }
        for name, column in group.columns.items()
    }
    return {"rows": len(group), "columns": columns, "scalars": dict(group.scalars)}


def _group(k: int, outline: Mapping[str, Mapping[str, float]], tensors: Mapping[str, Tensor]) -> Rows:
    columns = {
        name: Column(_whole(tensors, f"{k}/values/{name}"), _whole(tensors, f"{k}/index/{name}"))
        for name in outline["columns"]
    }
    return Rows(columns, _whole(tensors, f"{k}/trajectory"), _whole(tensors, f"{k}/step"), outline["scalars"])


def _whole(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor from its parts."""
    parts = [tensors[f"{name}/0"]]
    while f"{name}/{len(parts)}" in tensors:
        parts.append(tensors[f"{name}/{len(parts)}"])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _write_shard(directory: Path, tensors: dict[str, Tensor]) -> dict[str, str | int]:
    data = serialize(tensors)
    digest = hashlib.sha256(data).hexdigest()
    name = f"rows-{digest[:16]}.safetensors"
    _write(directory / name, data)
    return {"file": name, "size": len(data), "sha256": digest}


def _read_shard(directory: Path, file: str, size: int, sha256: str) -> dict[str, Tensor]:
    if not _SHARD.fullmatch(file):
        raise StoreError(f"{directory / MANIFEST} names {file!r}, which is not the name of a shard")
    path = directory / file
    try:
        found = path.stat().st_size
        if found != size:
            raise StoreError(
                f"{path} is {'truncated' if found < size else 'altered'}: {found} bytes instead of {size}"
            )
        if _digest_of_file(path) != sha256:
            raise StoreError(f"{path} was altered: its SHA-256 is not the one in {MANIFEST}")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"cannot read {path}, which {MANIFEST} names: {error}") from error


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise StoreError(f"there is no calibration in {path.parent}: {error}") from error
    except ValueError as error:
        raise StoreError(f"{path} is truncated or is not JSON: {error}") from error
    name, _, number = str(manifest.get("format") if isinstance(manifest, dict) else "").partition("/")
    if name != FORMAT.partition("/")[0]:
        raise StoreError(f"{path} is not a calibration of dmqfx")
    if f"{name}/{number}" != FORMAT:
        raise StoreError(
            f"{path} has the format {name}/{number}; this version of dmqfx reads {FORMAT}: update dmqfx"
        )
    contents: dict[str, Any] = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != _digest(contents):
        raise StoreError(f"{path} was altered: its SHA-256 does not fit its contents")
    return contents


def _digest(manifest: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    """A whole new file under this name, or the old one as it was."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
