"""Calibration rows that a compilation makes itself, kept in its run directory as what is computed from them is."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.calibration.recording import origin
from dmqfx.calibration.sampling import warn_of_random
from dmqfx.calibration.shards import MANIFEST
from dmqfx.errors import StoreError
from dmqfx.frontend.signature import UNet
from dmqfx.storage.provenance import weights_digest
from dmqfx.sweep.run import made

__all__ = ["kept"]

_log = logging.getLogger(__name__)


def kept(
    directory: Path | None, unet: UNet, seed: int, make: Callable[[], Calibration], how: str = "synthetic"
) -> Calibration:
    """The rows that `make` makes of this model with this seed; if it made them here before, those.

    Made anew they could be others: how many there are depends on how busy the machine is. Of several processes
    the first one writes, and all read. `how` tells what makes them from others.

    Raises: StoreError if the directory cannot be used, or rows in it are not seen by all processes; whatever
        `make` raises.
    """
    if directory is None:
        return make()
    folder = directory / f"calibration-{_digest(unet, seed, how)}"
    with processes.together():
        made(folder, directory)
        found = _read(folder)
        if not processes.agreed(found is not None):
            found = make()
            if processes.is_first():
                found.save(folder)
        elif found is None:
            raise StoreError(
                f"{folder} is not seen by all processes\n  mend: a run directory on a disk that they share"
            )
        else:
            warn_of_random(unet, found)
    return found


def _digest(unet: UNet, seed: int, how: str) -> str:
    """Of all that the rows depend on: the model, what makes them, the seed and the versions."""
    about = asdict(origin(unet, "synthetic", None, {"seed": seed, "rows": how}, ()))
    text = json.dumps({**about, "weights": weights_digest(unet)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(folder: Path) -> Calibration | None:
    """The rows in a folder, or None if they are not there, or not whole, which is said."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        return Calibration.load(folder)
    except StoreError as error:
        _log.warning("%s\n  the calibration is made again, and so is all that came after it", error)
        return None
