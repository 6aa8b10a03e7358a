"""compile: from a diffusers UNet and a policy to a drop-in quantized UNet. The whole way in one function."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration, CalibrationWarning
from dmqfx.calibration.recording import weights_fingerprint
from dmqfx.checking.verify import checking
from dmqfx.errors import CalibrationError, CaptureError, PipelineError, PolicyError
from dmqfx.frontend.capture import capture
from dmqfx.frontend.exclusions import refuse
from dmqfx.frontend.signature import UNet, demanded
from dmqfx.graph import registry
from dmqfx.graph.facts import FITTED, PLANNED, QDQ, Fact
from dmqfx.graph.pipeline import PassContext, Pipeline, Preserves
from dmqfx.graph.program import Program
from dmqfx.policy.mark import Mark, Said
from dmqfx.policy.policy import Policy
from dmqfx.runtime import targets
from dmqfx.runtime.targets import Target
from dmqfx.runtime.unet import CompiledUNet
from dmqfx.seeing.measurement import selected
from dmqfx.seeing.report import Report
from dmqfx.storage.provenance import fingerprint, provenance, weights_digest
from dmqfx.sweep.budget import Budget, bytes_of, seconds_of
from dmqfx.sweep.finite import refuse_overflow
from dmqfx.sweep.kept import kept

logger = logging.getLogger(__name__)

MEASURED_ROWS = 16


class QualityWarning(UserWarning):
    """The compiled UNet misses a floor that its policy expects."""


class NothingQuantizedWarning(UserWarning):
    """The policy asks for bits, and not one site of this model got any."""


@torch.inference_mode(False)  # whoever compiles inside of it: some passes learn
def compile(
    unet: UNet,
    policy: str | PathLike[str] | Mapping[str, object] | Policy = "w4a8-quick",
    *,
    calibration: Calibration | None = None,
    target: str | Target = "auto",
    overrides: Sequence[str] = (),
    verify: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    report_rows: int = MEASURED_ROWS,
    budget: str | float | None = None,
    memory: str | int = "6GB",
    run_dir: str | PathLike[str] | None = None,
) -> CompiledUNet:
    """Quantize a diffusers UNet by a policy; the result goes where the UNet went (`pipe.unet = q`).

    The UNet is not changed. `policy` is a shipped name (with or without .yaml), a path, a dict or a Policy;
    `overrides` are `a.b=c` strings. Without `calibration`, trajectories are made from the model itself.
    `verify` checks every pass as it runs. `budget` is a time such as 90s, 5min, 1h or overnight that all
    passes should take together, by what this machine is measured to need: they get fewer rows, or more
    iterations. `memory` is what a sweep may take beside the model; what is beyond goes to disk. In `run_dir`
    such trajectories and finished parts of sweeps are kept: the same call, made again after a kill, goes on
    behind them to the same bits. `target` says what the layers run as, see `TARGETS`.

    Units: seed starts every generator; the report measures SQNR on report_rows calibration rows (0: none).
    Raises: PolicyError, CaptureError, CalibrationError, PipelineError; VerifyError if `verify` finds a
        wrong pass; StoreError for a run directory that cannot be used; ValueError for a budget that is no
        time, or a memory that is no size.
    Example:
        >>> from dmqfx import emoji
        >>> q = compile(emoji.load_unet(), "w8a16", report_rows=0)
        >>> q.report.layer("mid_block.resnets.0.conv1/conv2d").got("weight")
        8
    """
    refuse(unet)
    seconds = None if budget is None else seconds_of(budget)
    room, folder = bytes_of(memory), None if run_dir is None else Path(run_dir)
    bars = processes.is_first() and (sys.stderr.isatty() if progress is None else progress)
    lowered = targets.resolve(target)
    chosen = Policy.load(policy, overrides, check_step=registry.problems_with)
    _check(unet, chosen, calibration)
    budgeted = None if seconds is None else Budget.over(seconds, _steps(chosen).steps)
    data = calibration
    if data is None and (report_rows or needs_calibration(chosen)):
        data = kept(folder, unet, seed, lambda: Calibration.synthesize(unet, seed=seed, progress=bars))
    before = _captured(unet, data)
    ctx = PassContext(
        chosen, data, seed, bars, train_timesteps(unet, data), memory=room, budget=budgeted, run_dir=folder
    )
    scaled, after = quantize(before, ctx, verify=verify)
    report = Report.measure(
        scaled, after, data, rows=report_rows if processes.is_first() else 0, progress=bars
    )
    _warn(chosen, report, scaled, data, report_rows)
    made = {"seed": seed, "calibration": data.describe() if data is not None else None}
    origin = {**provenance(before), "float_weights": weights_digest(unet), **made}
    return CompiledUNet(
        after, config=unet.config, target=lowered, policy=chosen, report=report, provenance=origin
    )


def _check(unet: UNet, policy: Policy, calibration: Calibration | None) -> None:
    """Refuse what cannot be compiled before anything long is done; rows are checked again on what the graph reads."""
    check_pipeline(policy)
    check_finite(unet)
    if calibration is not None:
        calibration.check(demanded(unet, residuals=has_residuals(calibration)))
        _warn_of_others(unet, calibration)


def _warn_of_others(unet: UNet, calibration: Calibration) -> None:
    """Say so where rows were recorded from other weights; rounded ones (bfloat16) are not told apart from others."""
    rounded = any(each.dtype == torch.bfloat16 for each in unet.parameters())
    said = {origin.weights for origin in calibration.origins if origin.weights}
    if not rounded and said - {weights_fingerprint(unet)}:
        what = (
            f"the calibration was recorded from other weights than those of this {type(unet).__name__}: what is "
            "quantized is fitted to what that model saw; record one of this model, or go on if it is a near relative"
        )
        warnings.warn(what, CalibrationWarning, stacklevel=4)


def _captured(unet: UNet, data: Calibration | None) -> Program:
    """The graph of the UNet as it is compiled, whose inputs the calibration rows fit, the same in all processes."""
    before = computing(capture(unet, residuals=data is not None and has_residuals(data)))
    if data is not None:
        data.check(before.inputs)
        if processes.count() > 1:
            processes.same("calibration rows", fingerprint(data.columns()))
    return before


def _warn(policy: Policy, report: Report, before: Program, data: Calibration | None, rows: int) -> None:
    """Say to the caller of `compile` what the policy wanted and did not get, and where the float model overflows."""
    if policy.bits_asked_at and (idle := report.idle):
        what = f"the policy {policy.name!r} asks for bits, but {idle}"
        warnings.warn(what, NothingQuantizedWarning, stacklevel=3)
    for miss in report.misses(policy.expect):
        warnings.warn(miss, QualityWarning, stacklevel=3)
    if data is not None and any(map(math.isnan, report.output_db.values())):
        try:
            refuse_overflow(before, selected(data, rows))
        except CalibrationError as error:
            what = f"nothing could be measured of some rows: {error}"
        else:
            what = "the compiled model's output is not finite on some rows, where the float one's is; see the report"
        warnings.warn(what, CalibrationWarning, stacklevel=3)


def check_pipeline(policy: Policy) -> None:
    """Refuse, before anything runs, a pipeline in a wrong order or without the steps that its bits need.

    Raises: PolicyError with every problem, at the step that has it.
    """
    steps, providers = _steps(policy), tuple(registry.passes().values())
    problems = [policy.pipeline[k].mark.problem(words) for k, words in steps.problems(None, providers)]
    lowering = {name: target.name for target in reversed(targets.TARGETS) for name in target.passes}
    problems += [
        step.mark.problem(
            f"pipeline: {step.name} is what the target {lowering[step.name]!r} runs behind every pipeline; "
            f"remove the step and choose the target, as in compile(..., target={lowering[step.name]!r})"
        )
        for step in policy.pipeline
        if step.name in lowering
    ]
    if problems:
        raise PolicyError(problems)
    provided = frozenset[Fact]().union(*(step.provides for step in steps.steps))
    if policy.searched_at and FITTED not in provided:
        words = f"observers keep only extremes, but {policy.searched_at} is asked for; put fit-ranges into the pipeline"
        raise PolicyError([_own(policy, policy.searched_at).problem(words)])
    lacking = [fact for fact in (PLANNED, QDQ) if fact not in provided]
    if policy.bits_asked_at and lacking:
        fact = lacking[0]
        helpful = " or ".join(cls.name() for cls in providers if fact in cls.provides - cls.requires)
        words = (
            f"the policy asks for bits ({policy.bits_asked_at}), but no step of the pipeline provides {fact.name!r} "
            f"({fact.meaning}); put {helpful} into it, or say float"
        )
        raise PolicyError([_own(policy, policy.bits_asked_at).problem(words)])


def _own(policy: Policy, said: Said) -> Mark:
    """Of the pipeline and what it does not fit, the one that the user wrote; the pipeline, if both or neither."""
    marks = policy.pipeline[-1].mark, said.mark
    return next((mark for mark in marks if not mark.shipped), marks[0])


def check_finite(unet: UNet) -> None:
    """Refuse weights with nan or infinity before anything is computed from them.

    Raises: CaptureError naming the module and the weight.
    """
    for name, weight in unet.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            module, _, own = name.rpartition(".")
            bad = int((~torch.isfinite(weight)).sum())
            reason = f"{own} has {bad} of {weight.numel()} values that are not finite"
            raise CaptureError(
                reason, address=module, mend="load the weights again, in a dtype that holds them"
            )


def computing(program: Program) -> Program:
    """The program in a dtype that scales can be exact in: half precision becomes float32, in tensors of its own.

    A caller still passes and gets its own dtype; see CompiledUNet.forward.
    """
    if program.dtype not in (torch.float16, torch.bfloat16):
        return program
    logger.info("the UNet is %s; it is compiled in float32, and callers get their own dtype", program.dtype)
    return program.astype(torch.float32)


def quantize(program: Program, ctx: PassContext, *, verify: bool = False) -> tuple[Program, Program]:
    """Run the policy's pipeline on a captured program: the last float program, and the quantized one.

    They differ by the lossy pass and what follows it, so their layers can be compared one by one.

    Raises: PipelineError, PolicyError, CalibrationError; VerifyError if `verify` finds a wrong pass.
    """
    if ctx.policy is None:
        raise PipelineError("quantize needs a policy in its context: PassContext(policy=Policy.load('w4a8'))")
    steps = _steps(ctx.policy)
    providers, observe = tuple(registry.passes().values()), checking() if verify else None
    steps.check(program, providers)
    lossy = [k for k, step in enumerate(steps.steps) if step.preserves is Preserves.LOSSY]
    first = lossy[0] if lossy else len(steps.steps)
    exact = Pipeline(steps.steps[:first]).run(program, ctx, providers=providers, observe=observe)
    return exact, Pipeline(steps.steps[first:]).run(exact, ctx, providers=providers, observe=observe)


def _steps(policy: Policy) -> Pipeline:
    return registry.pipeline((step.name, step.keywords()) for step in policy.pipeline)


def needs_calibration(policy: Policy) -> bool:
    """Whether a pass of the policy streams calibration data."""
    return any(step.needs_calibration for step in _steps(policy).steps)


def has_residuals(calibration: Calibration) -> bool:
    """Whether some call carried a ControlNet's residuals."""
    return any("mid_residual" in group.columns for group in calibration.groups)


def train_timesteps(unet: UNet, calibration: Calibration | None) -> int:
    """The number of timesteps that the schedule was trained with, as far as anybody says; 1000 otherwise."""
    origins = calibration.origins if calibration is not None else ()
    said = [origin.scheduler_config.get("num_train_timesteps") for origin in origins]
    said.append(unet.config.get("num_train_timesteps"))
    return next((int(number) for number in said if isinstance(number, int) and number > 0), 1000)
