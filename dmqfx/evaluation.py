"""Evaluation: a compiled UNet against its float model on the same noise, prompts and schedule."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from dmqfx import emoji
from dmqfx.calibration.calibration import Calibration
from dmqfx.calibration.recording import plain, recording
from dmqfx.errors import CalibrationError, DmqfxError
from dmqfx.frontend.capture import evaluating
from dmqfx.frontend.signature import UNet
from dmqfx.judging import protocol
from dmqfx.judging.features import HAAR, Features
from dmqfx.judging.findings import Evaluation, Run, mean_db
from dmqfx.judging.outputs import compare_outputs
from dmqfx.judging.paired import PictureJudge
from dmqfx.judging.pictures import psnr_db
from dmqfx.judging.samplers import Drawn, Sampler
from dmqfx.runtime.unet import CompiledUNet
from dmqfx.storage.provenance import weights_digest

__all__ = ["Evaluation", "OtherWeightsWarning", "emoji_calibration", "evaluate", "mean_db", "psnr_db"]


class OtherWeightsWarning(UserWarning):
    """What is compared was not compiled from the weights of this float model."""


def evaluate(
    unet: UNet,
    compiled: CompiledUNet,
    calibration: Calibration | Sequence[Calibration] = (),
    *,
    sampler: Sampler | None = None,
    seeds: Sequence[int] = (0,),
    rows: int | None = 64,
    guidance_scale: float | None = None,
    features: Features = HAAR,
    reference: Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Compare a compiled UNet with its float model: outputs and, with a sampler, trajectories and pictures.

    Without a sampler there is a run for each recorded `calibration`, best not those of compiling. With one,
    both models draw from the same noise, a run for each seed; outputs are compared on the calls that the float
    model had on the way, or on the calibrations: one for all seeds or one for each.

    The float model is run by diffusers, the compiled one as its target runs it. Guided pairs among the calls
    are combined at `guidance_scale`: the recording's or the sampler's own, unless said.

    Units: rows is how many calls of a run are compared, at least one of every timestep; None is all of them.
    A compiled model that was made from other weights than this float model's is an OtherWeightsWarning.

    Raises: CalibrationError if there is nothing to compare on, or recorded calls do not fit the model;
        DmqfxError for a compiled model of another configuration, and for a reference (see `load_reference`)
        or features that cannot be used.
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
    given = [calibration] if isinstance(calibration, Calibration) else list(calibration)
    _refuse_others(unet, compiled)
    _warn_of_others(unet, compiled)
    _refuse(given, sampler, seeds)
    for each in given:
        each.check(compiled.program.inputs)

    def outputs(data: Calibration, seed: int | None = None) -> Run:
        scale = _guidance_scale(data) if guidance_scale is None else guidance_scale
        found = compare_outputs(unet, compiled, data, rows=rows, guidance_scale=scale, progress=progress)
        return Run(found, seed, scale)

    about = protocol.of_models(unet, compiled)
    if sampler is None:
        return Evaluation(tuple(map(outputs, given)), {**about, **protocol.of_rows(given, rows)})
    judge, runs, recorded = PictureJudge(features, reference), list[Run](), list[Calibration]()
    for k, seed in enumerate(seeds):
        exact, quantized, calls = _draw(unet, compiled, sampler, seed, progress)
        recorded.append(given[k % len(given)] if given else calls)
        runs.append(judge.judge(outputs(recorded[-1], seed), exact, quantized))
    about |= {**protocol.of_rows(recorded, rows), **protocol.of_pictures(sampler, seeds, exact)}
    return Evaluation(tuple(runs), {**about, **judge.protocol()})


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


def _refuse_others(unet: UNet, compiled: CompiledUNet) -> None:
    """Only a model of the same configuration can have been compiled from this one."""
    here, there = plain(dict(unet.config)), plain(dict(compiled.config))
    assert isinstance(here, dict)
    assert isinstance(there, dict)
    others = [name for name in here if not name.startswith("_") and here[name] != there.get(name)]
    if others:
        told = ", ".join(f"{name} {there.get(name)} and not {here[name]}" for name in others[:3])
        raise DmqfxError(f"the compiled model was made from another model than this float one: it has {told}")


def _warn_of_others(unet: UNet, compiled: CompiledUNet) -> None:
    """Say so where the weights are not those that were compiled; a model that does not say is believed."""
    said = compiled.provenance.get("float_weights")
    if said is not None and said != weights_digest(unet):
        what = (
            f"the compiled model was made from other weights than those of this float {type(unet).__name__}: "
            "the numbers tell how far the two models are apart, not what quantization cost; "
            "compare with the float model that was compiled"
        )
        warnings.warn(what, OtherWeightsWarning, stacklevel=3)


def _refuse(given: Sequence[Calibration], sampler: Sampler | None, seeds: Sequence[int]) -> None:
    if sampler is None and not given:
        raise CalibrationError(
            "there is nothing to compare on\n  mend: give recorded calls (Calibration.record), or a sampler"
        )
    if sampler is not None and not seeds:
        raise CalibrationError("a sampler needs at least one seed")
    if sampler is not None and len(given) not in (0, 1, len(seeds)):
        raise CalibrationError(
            f"{len(given)} recordings for {len(seeds)} seeds: give one for all of them, or one for each"
        )


def _draw(
    unet: UNet, compiled: CompiledUNet, sampler: Sampler, seed: int, progress: bool
) -> tuple[Drawn, Drawn, Calibration]:
    """What the float and the compiled model draw, and the calls that the float one had."""
    with evaluating(unet), torch.no_grad(), recording(unet) as tape:
        exact = sampler(unet, seed, progress=progress)
    with torch.no_grad():
        quantized = sampler(compiled, seed, progress=progress)
    settings = {"seed": seed, "guidance_scale": sampler.guidance_scale, **sampler.settings()}
    return exact, quantized, tape.calibration(scheduler=sampler.scheduler, settings=settings)


def _guidance_scale(calibration: Calibration) -> float | None:
    """The one that a recording was made with, if it says and all of it says the same."""
    said = {origin.settings.get("guidance_scale") for origin in calibration.origins}
    scale = said.pop() if len(said) == 1 else None
    return float(scale) if isinstance(scale, (int, float)) else None
