"""Tensors in a memory-mapped file without a name: it is gone when this process is, however that ends."""

from __future__ import annotations

import io
import mmap
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor

from dmqfx.errors import StoreError

__all__ = ["Scratch", "Stored"]


@dataclass(frozen=True)
class Stored:
    """Where the memory of a tensor lies in the file, and how the tensor lies in that memory.

    Units: offset and nbytes of the file in bytes; start in elements.
    """

    offset: int
    nbytes: int
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int


class Scratch:
    """A file that tensors are written to and mapped from, bit for bit and in their memory layout.

    What is read is a view of the file: its pages come as they are looked at and are given back with the last tensor
    on them. Room that was freed is used again when nobody has a view of it, so that what is read does not change as
    long as nobody writes into it: as values in memory, it is for all who read it.

    Units: size in bytes, of the room that was ever used.
    Raises: StoreError if the disk is full, or cannot be mapped.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: io.BufferedRandom | None = None
        self._map: mmap.mmap | None = None
        self._views: WeakValueDictionary[int, memoryview] = WeakValueDictionary()
        self._free: dict[int, list[int]] = {}
        self.size = 0

    def write(self, tensor: Tensor) -> Stored:
        """Copy the whole memory of a tensor."""
        memory = tensor.untyped_storage()
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory).cpu()
        offset = self._spare(_room(raw.nbytes))
        try:
            file = self._opened()
            file.seek(offset)
            file.write(raw.numpy().data)
            file.flush()
        except OSError as error:
            raise StoreError(
                f"cannot set aside {raw.nbytes / 2**20:.0f} MB of activations in {self._where()}: {error}\n"
                "  mend: give more memory, fewer calibration rows, or a run directory on a larger disk"
            ) from error
        self.size = max(self.size, offset + _room(raw.nbytes))
        return Stored(
            offset, raw.nbytes, tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride(),
            int(tensor.storage_offset()),
        )  # fmt: skip

    def read(self, stored: Stored) -> Tensor:
        """The tensor that was written."""
        raw = torch.empty(0, dtype=torch.uint8)
        if stored.nbytes:
            raw = torch.frombuffer(self._view(stored.offset, stored.nbytes), dtype=torch.uint8)
        memory = raw.to(stored.device).untyped_storage()
        empty = torch.empty(0, dtype=stored.dtype, device=stored.device)
        return empty.set_(memory, stored.start, stored.shape, stored.stride)

    def free(self, stored: Stored) -> None:
        """Let the room of a tensor be used again."""
        self._free.setdefault(_room(stored.nbytes), []).append(stored.offset)

    def close(self) -> None:
        """Give the room back to the disk; views that somebody has stay what they are."""
        file, self._file, self._map = self._file, None, None
        if file is not None:
            with suppress(OSError):  # of what a full disk did not take, which nobody wants any more
                file.close()

    def _spare(self, room: int) -> int:
        """An offset where so many bytes are free and nobody looks, or that of the end."""
        free = self._free.get(room, [])
        offset = next((offset for offset in free if offset not in self._views), None)
        if offset is None:
            return self.size
        free.remove(offset)
        return offset

    def _view(self, offset: int, nbytes: int) -> memoryview:
        view = self._views.get(offset)
        if view is None:
            mapped = self._mapped(offset + nbytes)
            view = self._views[offset] = memoryview(mapped)[offset : offset + nbytes]
            finalize(view, _give_back, mapped, offset, nbytes).atexit = False
        return view

    def _mapped(self, end: int) -> mmap.mmap:
        """The file in memory, up to `end` at least; twice as far each time, so that there are few maps of it.

        A map that is shared with the file takes no memory of its own, however long the file is.
        """
        if self._map is None or len(self._map) < end:
            try:
                file = self._opened()
                file.truncate(1 << (self.size - 1).bit_length())
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE)
            except OSError as error:
                raise StoreError(
                    f"activations that were set aside in {self._where()} cannot be mapped: {error}\n"
                    "  mend: give more memory (--memory), or a run directory on a disk that can be mapped"
                ) from error
        return self._map

    def _opened(self) -> io.BufferedRandom:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="dmqfx-", dir=self._folder)  # noqa: SIM115  # see close
        return self._file

    def _where(self) -> str:
        return str(self._folder or tempfile.gettempdir())


def _room(nbytes: int) -> int:
    """So many bytes in whole pages, which is how memory is given back."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _give_back(mapped: mmap.mmap, offset: int, nbytes: int) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):
        with suppress(OSError):
            mapped.madvise(mmap.MADV_DONTNEED, offset, nbytes)
