"""Evaluation: a compiled UNet against its float model on the same noise, prompts and schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from dmqfx import emoji
from dmqfx.calibration.calibration import Calibration
from dmqfx.frontend.capture import Canonical, evaluating
from dmqfx.frontend.signature import UNet
from dmqfx.runtime.unet import CompiledUNet
from dmqfx.seeing import wording
from dmqfx.seeing.lockstep import Ratio

__all__ = ["Evaluation", "emoji_calibration", "evaluate", "mean_db", "psnr_db"]

_BATCH = 4


@dataclass(frozen=True)
class Evaluation:
    """How near a compiled UNet is to its float model.

    Units: output_db is the SQNR of the UNet's output in dB by recorded timestep, both on the same inputs;
    image_db the PSNR in dB of each final picture, each model along its own trajectory; inf means equal.
    """

    output_db: Mapping[float, float]
    image_db: tuple[float, ...] = ()

    @property
    def mean_output_db(self) -> float:
        """The mean of output_db."""
        return mean_db(list(self.output_db.values()))

    @property
    def mean_image_db(self) -> float | None:
        """The mean of image_db, or None without pictures."""
        return mean_db(self.image_db) if self.image_db else None

    def misses(self, *, sqnr_db: float | None = None, psnr_db: float | None = None) -> list[str]:
        """The floors that are not reached, in words; nan reaches none."""
        found = []
        if sqnr_db is not None and not self.mean_output_db >= sqnr_db:
            found.append(f"the output has {self.mean_output_db:.1f} dB SQNR, {sqnr_db:g} dB are wanted")
        if psnr_db is not None and self.mean_image_db is None:
            found.append(f"there are no pictures, and {psnr_db:g} dB PSNR of them are wanted")
        elif psnr_db is not None and not (self.mean_image_db or 0.0) >= psnr_db:
            found.append(f"the pictures have {self.mean_image_db:.1f} dB PSNR, {psnr_db:g} dB are wanted")
        return found

    def to_data(self) -> dict[str, object]:
        """The same as plain values."""
        return {
            "output_db": {f"{time:g}": db for time, db in self.output_db.items()},
            "image_db": list(self.image_db),
            "mean_output_db": self.mean_output_db,
            "mean_image_db": self.mean_image_db,
        }

    def __str__(self) -> str:
        rows = [["timestep", "output SQNR dB"]]
        rows += [[f"{time:g}", f"{db:.1f}"] for time, db in sorted(self.output_db.items(), reverse=True)]
        rows.append(["mean", f"{self.mean_output_db:.1f}"])
        text = wording.columns(rows, right={0, 1})
        if self.mean_image_db is None:
            return text
        pictures = f"pictures: {len(self.image_db)}, PSNR {self.mean_image_db:.1f} dB in the mean"
        return f"{text}\n{pictures}, {min(self.image_db):.1f} dB the worst"


def evaluate(
    unet: UNet,
    compiled: CompiledUNet,
    calibration: Calibration,
    *,
    images: tuple[Tensor, Tensor] | None = None,
    rows: int = 64,
    progress: bool = False,
) -> Evaluation:
    """Compare on recorded calls, best ones not calibrated on, and on final pictures if there are any.

    The float model is run by diffusers, the compiled one as its target runs it.

    Shapes: images are (float, quantized), each [N, C, H, W] in [-1, 1].
    Raises: CalibrationError if the recorded calls do not fit the model.
    Example:
        >>> from diffusers import UNet2DModel
        >>> from dmqfx.compiler import compile
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=2, **blocks).eval()
        >>> held_out = Calibration.synthesize(unet, steps=2, trajectories=1, seed=1)
        >>> found = evaluate(unet, compile(unet, "w8a16", report_rows=0), held_out)
        >>> found.misses(sqnr_db=20), len(found.output_db)
        ([], 2)
    """
    spec = compiled.program.inputs
    calibration.check(spec)
    exact = Canonical(unet, tuple(i.name for i in spec.inputs))
    wanted = max(rows, len(set(calibration.timesteps().tolist())))
    chosen = calibration.select(wanted, torch.Generator().manual_seed(0))
    found: dict[float, Ratio] = {}
    with (
        evaluating(unet),
        torch.no_grad(),
        tqdm(total=len(chosen), desc="evaluate", unit="row", disable=not progress) as bar,
    ):
        for batch in chosen.batches(_BATCH, spec, dtype=unet.dtype):
            right = exact(*(batch[i.name].to(unet.device) for i in spec.inputs))
            result = compiled.runner(
                **{i.name: batch[i.name].to(compiled.device, i.dtype) for i in spec.inputs}
            )
            approximate = result if isinstance(result, tuple) else (result,)
            for k, time in enumerate(batch["timestep"].tolist()):
                for a, b in zip(right, approximate, strict=True):
                    found.setdefault(time, Ratio()).add(a[k].cpu(), b[k].cpu())
            bar.update(len(batch["timestep"]))
    pairs = () if images is None else tuple(psnr_db(a, b) for a, b in zip(*images, strict=True))
    return Evaluation({time: found[time].db for time in sorted(found, reverse=True)}, pairs)


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two pictures in [-1, 1], in dB; inf if equal, nan if not finite."""
    error = (a.double() - b.double()).square().mean()
    return float("inf") if error == 0 else float(10 * torch.log10(4 / error))


def mean_db(values: Sequence[float]) -> float:
    """The mean of what differs at all; inf if nothing does, nan for no values."""
    lossy = [value for value in values if value != float("inf")]
    if not lossy:
        return float("inf") if values else float("nan")
    return sum(lossy) / len(lossy)


def emoji_calibration(
    prompts: Sequence[str] | None = None,
    *,
    count: int | None = None,
    steps: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Guided DDIM trajectories of the bundled emoji model at guidance 3, as its demo samples.

    Units: if no prompts are given, `count` of those that no demo shows, 8 unless said.
    """
    chosen = emoji.calibration_prompts(count or 8) if prompts is None else prompts
    return Calibration.record(
        emoji.load_unet(),
        scheduler=emoji.load_scheduler(),
        conditioning={"encoder_hidden_states": emoji.embed(chosen)},
        unconditional={"encoder_hidden_states": emoji.embed([""] * len(chosen))},
        steps=steps,
        guidance_scale=3.0,
        seed=seed,
        progress=progress,
    )
