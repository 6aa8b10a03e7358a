"""Tensors of a file: codes stay there until somebody reads them, what is computed with in floating point is copied."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import Tensor

__all__ = ["TensorFile"]

_LENGTH: Final = 8  # bytes at the start of a safetensors file, which say how long its header is


@dataclass(frozen=True, eq=False)
class TensorFile:
    """Every tensor of a safetensors file.

    Packed codes (uint8, row by row) are views of the mapped file, which keeps them: what a process has read of them can
    be given back. All others are in memory of their own, aligned as torch does it, on which last digits depend.
    """

    tensors: Mapping[str, Tensor]
    _map: mmap.mmap

    @classmethod
    def read(cls, path: Path, strides: Mapping[str, tuple[int, ...]]) -> TensorFile:
        """The file; `strides` are those of tensors that do not lie row by row.

        Raises: SafetensorError or OSError for a file that is none.
        """
        with safe_open(path, framework="pt") as checked, path.open("rb") as raw:
            mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)
            begin = _LENGTH + int.from_bytes(mapped[:_LENGTH], "little")
            header, found = json.loads(mapped[_LENGTH:begin]), dict[str, Tensor]()
            for name in tuple(checked.keys()):
                (start, end), shape = header[name]["data_offsets"], header[name]["shape"]
                if header[name]["dtype"] == "U8" and name not in strides and end > start:
                    at = {"dtype": torch.uint8, "count": end - start, "offset": begin + start}
                    found[name] = torch.frombuffer(mapped, **at).view(shape)
                else:
                    found[name] = _copied(checked.get_tensor(name), strides.get(name))
        return cls(found, mapped)

    def give_back(self) -> None:
        """Let the memory go that codes have been read into; whoever reads them again finds them in the file.

        What somebody wrote into them is forgotten. Where the system does not let go (pages that are locked) nothing happens.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            with suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED)


def _copied(tensor: Tensor, stride: tuple[int, ...] | None) -> Tensor:
    own = (
        torch.empty_like(tensor)
        if stride is None
        else torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype)
    )
    return own.copy_(tensor)
