"""A run directory: what each turn of a sweep wrote, stored when it is over, so that no turn is done twice."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from dmqfx import processes
from dmqfx.errors import StoreError
from dmqfx.graph.address import Site
from dmqfx.graph.journal import Application, Refusal
from dmqfx.graph.table import Entry
from dmqfx.storage.atomic import TORN, replacing
from dmqfx.storage.codec import Json, decode, dump, encode, parse
from dmqfx.storage.lock import LOCK, locked
from dmqfx.storage.manifest import read_manifest, write_manifest

__all__ = ["NoRun", "OtherRun", "Run", "Written", "made", "packed", "running", "unpacked", "until_done"]

_RECORD, _TENSORS, _PLAN, _STATE = "record.json", "tensors.safetensors", "plan", "state"
_DAMAGED = "%s\n  it is computed again, and so is what came after it"
_KEPT = re.compile(
    r"(\d{2,}-[\w+-]+|calibration)-[0-9a-f]{12}|\.calibration-[0-9a-f]{12}\.dmqfx-[a-z0-9_]{8}"
)
"""The names of the folders of a run directory: runs and calibrations by their keys, and such as are half written."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What one turn left: entries in their order, the kinds that it dropped, and what each pass put in its journal."""

    entries: tuple[tuple[Site, Entry], ...]
    dropped: tuple[tuple[Site, str], ...]
    applied: tuple[tuple[Application, ...], ...]
    refused: tuple[tuple[Refusal, ...], ...]


class NoRun:
    """No run directory: nothing is known, and nothing is kept."""

    factor: float | None = None

    def begin(self, factor: float) -> None:
        """Note what the turns will be made with, before there is one."""

    def finished(self, sites: Sequence[Site]) -> list[Written]:
        """The turns that need not be done again."""
        return []

    def write(self, number: int, site: Site, written: Written) -> None:
        """Keep what a turn wrote."""

    def state(self) -> tuple[int, dict[str, Tensor]] | None:
        """How far what has no turns had come, and its tensors."""
        return None

    def keep(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep them, instead of those before."""

    def own(self) -> NoRun:
        """Where each of several processes keeps a state of its own."""
        return self


class Run(NoRun):
    """The finished turns of one sweep in a folder of their own.

    `factor` is the one that a time budget was found to have room for, once that is known.
    """

    def __init__(self, folder: Path, key: Mapping[str, Json], device: torch.device) -> None:
        self._folder, self._key, self._device = folder, key, device
        plan = self._read(_PLAN)
        self.factor = None if plan is None else float(plan["factor"])

    def begin(self, factor: float) -> None:
        """Note what the turns will be made with, before there is one."""
        if self.factor is None:
            self.factor = factor
            self._write(_PLAN, {"key": encode(self._key), "factor": factor}, {})

    def finished(self, sites: Sequence[Site]) -> list[Written]:
        """The turns that need not be done again: all from the first to the last that is whole.

        What follows a turn that is damaged depends on it, so it goes too.
        """
        found: list[Written] = []
        for site in sites if self.factor is not None else ():
            record = self._read(_name(len(found)))
            if record is None:
                break
            if record["site"] != site:
                _log.warning(_DAMAGED, f"{self._folder / _name(len(found))} is not of {site}")
                break
            found.append(_written(record))
        for later in self._folder.glob("turn-*"):
            if later.name >= _name(len(found)):
                self._remove(later)
        return found

    def write(self, number: int, site: Site, written: Written) -> None:
        """Keep what a turn wrote; it is there whole, or not at all."""
        self._write(_name(number), *_parts({"site": site, **vars(written)}))

    def state(self) -> tuple[int, dict[str, Tensor]] | None:
        """How far what has no turns had come, and its tensors; None if it had not begun."""
        for folder in sorted(self._folder.glob(f"{_STATE}-*"), reverse=True):
            if (record := self._read(folder.name)) is not None:
                return int(record["number"]), record["tensors"]
        return None

    def keep(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep them, instead of those before; they are there whole, or those before are."""
        name = f"{_STATE}-{number:07d}"
        self._write(name, *_parts({"number": number, "tensors": dict(tensors)}))
        for folder in self._folder.glob(f"{_STATE}-*"):
            if folder.name != name:
                self._remove(folder)

    def clear(self) -> None:
        """Remove what a process that was killed had half written."""
        for torn in self._folder.glob(TORN):
            self._remove(torn)

    def _remove(self, folder: Path) -> None:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise StoreError(f"cannot keep a run in {self._folder}: {error}") from error

    def _write(self, name: str, record: Mapping[str, Json], tensors: dict[str, Tensor]) -> None:
        try:
            with replacing(self._folder / name) as new:
                (new / _RECORD).write_text(dump(record), encoding="utf-8")
                save_file(tensors, new / _TENSORS)
                write_manifest(new, {})
        except (OSError, SafetensorError) as error:  # which is what safetensors makes of a full disk
            raise StoreError(f"cannot keep a run in {self._folder}: {error}") from error

    def _read(self, name: str) -> dict[str, Any] | None:
        """A record, or None if it is not there, or not whole, which is said."""
        folder = self._folder / name
        if not folder.exists():
            return None
        try:
            read_manifest(folder, frozenset({_RECORD, _TENSORS}))
            tensors = load_file(folder / _TENSORS, device=str(self._device))
            return _whole((folder / _RECORD).read_bytes(), str(folder / _RECORD), tensors)
        except (StoreError, SafetensorError, OSError, KeyError) as error:
            _log.warning(_DAMAGED, error)
            return None


class OtherRun(Run):
    """What the first of several processes keeps: another one reads it, and writes nothing."""

    def begin(self, factor: float) -> None:
        """The first process notes it."""

    def finished(self, sites: Sequence[Site]) -> list[Written]:
        """The turns of these sites.

        Raises: StoreError if they are not to be seen from here.
        """
        found = [self._read(_name(k)) for k in range(len(sites))]
        if None in found:
            raise StoreError(
                f"{self._folder} is not seen by all processes\n  mend: a run directory on a disk that they share"
            )
        return [_written(record) for record in found if record is not None]

    def write(self, number: int, site: Site, written: Written) -> None:
        """The first process writes."""

    def keep(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """The first process keeps them."""

    def own(self) -> Run:
        """A folder beside what the first process keeps, for this one alone."""
        folder = self._folder / f"process-{processes.rank()}"
        made(folder, self._folder)
        own = Run(folder, self._key, self._device)
        own.clear()
        return own


@contextmanager
def running(directory: Path, title: str, key: Mapping[str, str], device: torch.device) -> Iterator[Run]:
    """The run of this key in a directory, held for this process; where there are several, for the first.

    Runs of other keys are spoken of, and left.

    Raises: StoreError if the directory cannot be used, or another process is at work there.
    """
    whole: dict[str, Json] = dict(key.items())
    folder = directory / f"{title}-{hashlib.sha256(dump(whole).encode()).hexdigest()[:12]}"
    made(folder, directory)
    if not processes.is_first():
        yield OtherRun(folder, whole, device)
        return
    for other in sorted(directory.glob(f"{title}-*")):
        if other != folder:
            _log.warning("the run in %s %s; it is not used", other, _difference(other, whole))
    with locked(folder):
        run = Run(folder, whole, device)
        run.clear()
        yield run


def made(folder: Path, directory: Path) -> None:
    """Make a folder of a run directory, if it is not there.

    Raises: StoreError if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot keep a run in {directory}: {error}") from error


@contextmanager
def until_done(directory: Path) -> Iterator[None]:
    """A run directory for this command alone, which is removed when the block has come to its end.

    Only what runs keep goes. Where anything else is in the directory, both stay, which is said.

    Raises: StoreError if the directory cannot be used, or another process is at work in it.
    """
    if not processes.is_first():
        yield
        return
    made(directory, directory)
    with locked(directory):
        try:
            yield
            for each in _entries(directory):
                if _KEPT.fullmatch(each.name) and each.is_dir() and not each.is_symlink():
                    shutil.rmtree(each, ignore_errors=True)
        finally:
            left = [each.name for each in _entries(directory) if each.name != LOCK or each.stat().st_size]
            if not left:
                shutil.rmtree(directory, ignore_errors=True)
    if left:
        _log.warning("%s stays: %s is not of a run, or could not be removed", directory, ", ".join(left[:3]))


def _entries(directory: Path) -> list[Path]:
    """What is in a directory; nothing if it is gone."""
    return sorted(directory.iterdir()) if directory.is_dir() else []


def packed(written: Written) -> bytes:
    """What a turn left, as another process may be sent it."""
    record, tensors = _parts(vars(written))
    text = torch.frombuffer(bytearray(dump(record).encode()), dtype=torch.uint8)
    return save({**tensors, _RECORD: text})


def unpacked(raw: bytes, device: torch.device) -> Written:
    """Inverse of `packed`, on a device."""
    tensors = load(raw)
    text = tensors.pop(_RECORD).numpy().tobytes()
    return _written(_whole(text, _RECORD, {name: each.to(device) for name, each in tensors.items()}))


def _parts(record: Mapping[str, object]) -> tuple[dict[str, Json], dict[str, Tensor]]:
    """A record as JSON, and the tensors that it names."""
    tensors: dict[str, Tensor] = {}

    def tag(value: object) -> Json:
        if not isinstance(value, Tensor):
            return None
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}

    return {key: encode(value, tag) for key, value in record.items()}, tensors


def _whole(text: bytes, where: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        key: decode(value, lambda _, name: tensors[str(name)]) for key, value in parse(text, where).items()
    }


def _written(record: Mapping[str, Any]) -> Written:
    return Written(**{field.name: record[field.name] for field in fields(Written)})


def _difference(other: Path, key: Mapping[str, Json]) -> str:
    """In which parts of the key another run differs."""
    try:
        was = decode(parse((other / _PLAN / _RECORD).read_bytes(), str(other)).get("key"))
    except (StoreError, OSError):
        was = None
    if not isinstance(was, dict):
        return "never began"
    return "had other " + ", ".join(part for part, value in key.items() if was.get(part) != value)


def _name(number: int) -> str:
    return f"turn-{number:05d}"
