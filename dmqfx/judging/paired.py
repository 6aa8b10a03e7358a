"""Pictures of two models side by side: what both drew from the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dmqfx.calibration.calibration import Json
from dmqfx.errors import DmqfxError
from dmqfx.judging.features import Features
from dmqfx.judging.findings import Run
from dmqfx.judging.frechet import Gaussian, frechet_distance
from dmqfx.judging.pictures import SSIM_WINDOW, find_lpips, psnr_db, ssim
from dmqfx.judging.reference import RESIZE, check_reference, load_reference
from dmqfx.judging.samplers import Drawn, drift

__all__ = ["PictureJudge"]

_BATCH = 32


class PictureJudge:
    """Measures pictures and trajectories; what that takes is loaded once.

    Raises: DmqfxError if there is no such reference, or it cannot be read.
    """

    def __init__(self, features: Features, reference: Path | None) -> None:
        if reference is not None:
            if not reference.exists():
                raise DmqfxError(f"there is no {reference} to take reference pictures from")
            check_reference(reference, features)
        self.features = features
        self._lpips, self._lpips_words = find_lpips()
        self._source, self._reference = reference, dict[tuple[int, int], Gaussian]()

    def judge(self, run: Run, exact: Drawn, quantized: Drawn) -> Run:
        """A run with what its pictures show; SSIM only of pictures that are large enough for its window."""
        pairs = list(zip(exact.pictures, quantized.pictures, strict=True))
        large = min(exact.pictures.shape[-2:]) >= SSIM_WINDOW
        return replace(
            run,
            drift=drift(exact, quantized),
            psnr_db=tuple(psnr_db(f, q) for f, q in pairs),
            ssim=tuple(ssim(f, q) for f, q in pairs) if large else (),
            lpips=self._perceptual(exact.pictures, quantized.pictures),
            frechet=self._distances(exact.pictures, quantized.pictures) if len(pairs) > 1 else {},
        )

    def protocol(self) -> dict[str, Json]:
        """How it measured."""
        found: dict[str, Json] = {
            "ssim": "Gaussian window 11, sigma 1.5, intensities 0 to 1, mean over channels, not scaled down",
            "lpips": self._lpips_words,
            "features": self.features.name,
        }
        for size, known in self._reference.items():
            found["reference"] = {
                "pictures": known.count, "sha256": known.digest, "size": list(size), "resize": RESIZE
            }  # fmt: skip
        return found

    def _perceptual(self, exact: Tensor, quantized: Tensor) -> tuple[float, ...]:
        if self._lpips is None:
            return ()
        with torch.no_grad():
            found = [self._lpips(f[None], q[None]) for f, q in zip(exact, quantized, strict=True)]
        return tuple(float(distance) for distance in found)

    def _distances(self, exact: Tensor, quantized: Tensor) -> Mapping[str, float]:
        f, q = (self.features.gaussian(torch.split(pictures, _BATCH)) for pictures in (exact, quantized))
        found = {"to_float": frechet_distance(q, f)}
        if self._source is None:
            return found
        height, width = exact.shape[-2:]
        size = (height, width)
        if size not in self._reference:
            self._reference[size] = load_reference(self._source, size, self.features)
        known = self._reference[size]
        return {
            **found,
            "to_reference": frechet_distance(q, known),
            "of_float_to_reference": frechet_distance(f, known),
        }
