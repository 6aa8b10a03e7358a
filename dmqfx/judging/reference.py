"""Reference pictures: a folder, an array, or the statistics of a set that are already known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from dmqfx.errors import DmqfxError
from dmqfx.judging.features import Features
from dmqfx.judging.frechet import Gaussian

__all__ = ["RESIZE", "check_reference", "load_reference"]

RESIZE = "pillow, bicubic, antialiased; transparent pictures on white"
_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_ARRAYS = (".npz", ".npy")
_BATCH = 32
_DAMAGE = (BadZipFile, EOFError, KeyError, SafetensorError, TypeError, ValueError)
"""What readers of arrays and tensors make of files that are not theirs."""


def check_reference(source: Path, features: Features) -> None:
    """Refuse, before anything long is done, what `load_reference` would refuse; pictures of a folder by their heads.

    Raises: as `load_reference`.
    """
    if source.suffix == ".safetensors":
        _known(source, features)
        return
    with _naming(source):
        found = _array(source) if source.suffix in _ARRAYS else _files(source)
        for file in found if isinstance(found, list) else ():
            Image.open(file).close()
    if len(found) < 2:
        raise DmqfxError(f"{source} holds 1 picture; a Fréchet distance needs at least 2")


def load_reference(source: Path, size: tuple[int, int], features: Features) -> Gaussian:
    """The statistics of reference pictures, brought to a size (height, width), and the SHA-256 of their files.

    `source` is a folder of pictures, a .npz or .npy file of uint8 [N, H, W, 3], or a .safetensors file of
    `Gaussian.save`, which must be of the same features.

    Raises: DmqfxError if it is none of these, or of other features; OSError if it cannot be read.
    """
    if source.suffix == ".safetensors":
        return _known(source, features)
    files = [source] if source.suffix in _ARRAYS else _files(source)
    return features.gaussian(_batches(_read(source), size), _digest(files))


def _read(source: Path) -> Iterator[Image.Image]:
    with _naming(source):
        if source.suffix in _ARRAYS:
            yield from map(Image.fromarray, _array(source))
        else:
            yield from map(Image.open, _files(source))


@contextmanager
def _naming(source: Path) -> Iterator[None]:
    """What readers raise for a file that is not theirs, in words."""
    try:
        yield
    except _DAMAGE as error:
        raise DmqfxError(f"{source} holds no reference pictures: {error}") from error


def _known(source: Path, features: Features) -> Gaussian:
    with _naming(source):
        known = Gaussian.load(source)
    if known.features != features.name:
        raise DmqfxError(f"{source} is of the features {known.features!r}, not {features.name!r}")
    return known


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        raise DmqfxError(f"{source} is neither a folder of pictures nor a .npz, .npy or .safetensors file")
    files = sorted(file for file in source.iterdir() if file.suffix.lower() in _KINDS)
    if not files:
        raise DmqfxError(f"{source} holds no pictures ({', '.join(_KINDS)})")
    return files


def _array(source: Path) -> np.ndarray:
    loaded = np.load(source, allow_pickle=False)
    arrays = [loaded] if isinstance(loaded, np.ndarray) else [loaded[key] for key in loaded.files]
    for array in arrays:
        if array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3 and len(array):
            return array
    raise DmqfxError(f"{source} holds no pictures: they would be uint8 [N, height, width, 3]")


def _batches(pictures: Iterable[Image.Image], size: tuple[int, int]) -> Iterator[Tensor]:
    """Batches of pictures of one size. Shapes: [n, 3, *size] in [-1, 1]."""
    batch = list[Tensor]()
    for picture in pictures:
        batch.append(_tensor(picture, size))
        if len(batch) == _BATCH:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def _tensor(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    with picture:
        if "A" in picture.getbands() or "transparency" in picture.info:
            clear = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        plain = picture.convert("RGB")
        if plain.size != size[::-1]:
            plain = plain.resize(size[::-1], Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(plain)).permute(2, 0, 1).float() / 127.5 - 1


def _digest(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()
