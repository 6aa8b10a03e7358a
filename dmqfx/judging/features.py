"""Feature spaces for sets of pictures: the built-in one, which needs no weights, and the user's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from dmqfx.errors import DmqfxError
from dmqfx.judging.frechet import Gaussian

__all__ = ["HAAR", "Features", "haar_features", "load_features"]

_LEVELS = 3
_OPPONENT = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))


@dataclass(frozen=True)
class Features:
    """A feature space: what it is called, and the function from pictures [N, C, H, W] in [-1, 1] to [N, D]."""

    name: str
    function: Callable[[Tensor], Tensor]

    def gaussian(self, batches: Iterable[Tensor], digest: str = "") -> Gaussian:
        """Mean and covariance over all pictures of the batches.

        Raises: DmqfxError if the function does not give a row for each picture, or there are fewer than two.
        """
        rows = list[Tensor]()
        with torch.no_grad():
            for batch in batches:
                found = self.function(batch)
                shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(batch):
                    raise DmqfxError(
                        f"{self.name} must give a tensor [{len(batch)}, D] for {len(batch)} pictures, and gives {shape}"
                    )
                rows.append(found.detach().cpu())
        return Gaussian.of(torch.cat(rows), self.name, digest)


def haar_features(pictures: Tensor) -> Tensor:
    """Colour and texture: the mean of each colour, and how much detail it has at 3 scales and 3 orientations.

    Colours are red + green + blue, red - blue and red + blue - 2 green, orthonormal. A detail is the root mean
    square of one kind of coefficients of the orthonormal 2 x 2 Haar transform, in units of the picture. No
    weights, nothing learned: it sees noise, blur, and colours that drift, and not what a picture shows.

    Shapes: [N, C, H, W] in [-1, 1] to float64 [N, 10 C]; H and W are cut to multiples of 8.
    Raises: DmqfxError for pictures smaller than that.
    """
    height, width = (side - side % 2**_LEVELS for side in pictures.shape[-2:])
    if not height * width:
        raise DmqfxError(f"the Haar features need at least 8 x 8 pixels, not {list(pictures.shape[-2:])}")
    rest = pictures[..., :height, :width].double()
    if rest.shape[1] == 3:
        axes = torch.nn.functional.normalize(rest.new_tensor(_OPPONENT), dim=1)
        rest = torch.einsum("oc,nchw->nohw", axes, rest)
    found = [rest.mean((2, 3))]
    for level in range(1, _LEVELS + 1):
        a, b, c, d = rest[..., ::2, ::2], rest[..., ::2, 1::2], rest[..., 1::2, ::2], rest[..., 1::2, 1::2]
        details = ((a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2)
        found += [detail.square().mean((2, 3)).sqrt() / 2**level for detail in details]
        rest = (a + b + c + d) / 2
    return torch.cat(found, dim=1)


def load_features(name: str) -> Features:
    """The function that `module:function` names; modules of the current folder are found too.

    Raises: DmqfxError if there is no such function.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise DmqfxError(f"{name!r} names no function; write module:function, e.g. my_features:inception")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(import_module(module), function, None)
    except Exception as error:  # whatever a module of the user's raises when it is imported
        raise DmqfxError(f"cannot import {module} for {name}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise DmqfxError(f"{module} has no function {function}")
    return Features(name, found)


HAAR: Final = Features("haar-1 (mean colours; strength of Haar details at 3 scales)", haar_features)
"""The built-in feature space."""
