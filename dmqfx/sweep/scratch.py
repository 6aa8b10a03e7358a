"""Tensors on disk, in one file without a name: it is gone when this process is, however that ends."""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

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
    """A file that tensors are written to and read back from, bit for bit and in their memory layout.

    Room that was freed is used again. Reading gives new memory: what is read never changes.

    Raises: StoreError if the disk is full or broken.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: io.BufferedRandom | None = None
        self._free: dict[int, list[int]] = {}
        self.size = 0

    def write(self, tensor: Tensor) -> Stored:
        """Copy the whole memory of a tensor."""
        memory = tensor.untyped_storage()
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory).cpu()
        spare = self._free.get(raw.nbytes)
        offset = spare.pop() if spare else self.size
        try:
            file = self._opened()
            file.seek(offset)
            file.write(raw.numpy().data)
        except OSError as error:
            raise StoreError(
                f"cannot set aside {raw.nbytes / 2**20:.0f} MB of activations in {self._where()}: {error}\n"
                "  mend: give more memory, fewer calibration rows, or a run directory on a larger disk"
            ) from error
        self.size = max(self.size, offset + raw.nbytes)
        return Stored(
            offset, raw.nbytes, tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride(),
            int(tensor.storage_offset()),
        )  # fmt: skip

    def read(self, stored: Stored) -> Tensor:
        """The tensor that was written."""
        raw = torch.empty(stored.nbytes, dtype=torch.uint8)
        file = self._opened()
        file.seek(stored.offset)
        if file.readinto(raw.numpy().data) != stored.nbytes:
            raise StoreError(f"activations that were set aside in {self._where()} cannot be read back")
        memory = raw.to(stored.device).untyped_storage()
        empty = torch.empty(0, dtype=stored.dtype, device=stored.device)
        return empty.set_(memory, stored.start, stored.shape, stored.stride)

    def free(self, stored: Stored) -> None:
        """Let the room of a tensor be used again."""
        self._free.setdefault(stored.nbytes, []).append(stored.offset)

    def close(self) -> None:
        """Give the room back to the disk."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _opened(self) -> io.BufferedRandom:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="dmqfx-", dir=self._folder)  # noqa: SIM115  # see close
        return self._file

    def _where(self) -> str:
        return str(self._folder or tempfile.gettempdir())
