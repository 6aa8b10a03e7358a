"""Whole models checked: every pass of a policy on a model, and a saved model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch

from dmqfx.calibration.calibration import Calibration, CalibrationWarning
from dmqfx.checking.probes import draw
from dmqfx.checking.shrink import shrunk
from dmqfx.checking.tablecheck import broken_claims
from dmqfx.checking.verify import checking
from dmqfx.compiler import needs_calibration, quantize, train_timesteps
from dmqfx.errors import VerifyError
from dmqfx.frontend.capture import capture
from dmqfx.frontend.signature import UNet
from dmqfx.graph import registry
from dmqfx.graph.journal import PassRecord
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.policy.policy import Policy
from dmqfx.runtime.targets import TARGETS
from dmqfx.runtime.unet import CompiledUNet

__all__ = ["Checked", "verify_policy", "verify_saved"]

_LARGE = 100_000_000  # parameters beyond which a twin with few channels is checked instead
_STEPS, _TRAJECTORIES = 8, 1  # of the calibration that ranges are made from: enough to see them wrong


@dataclass(frozen=True)
class Checked:
    """The passes of a policy, each found to keep its promise, and what it was tried on."""

    model: str
    policy: str
    narrow: bool
    passes: tuple[PassRecord, ...]

    def __str__(self) -> str:
        where = f"{self.model} with few channels" if self.narrow else self.model
        lines = map(str, self.passes)
        return "\n".join([*lines, f"{self.policy} on {where}: {len(self.passes)} passes keep their promises"])

    def to_data(self) -> dict[str, object]:
        """The same as plain values."""
        passes = [
            {
                "name": done.name,
                "preserves": done.preserves,
                "applied": len(done.applied),
                "refused": len(done.refused),
                "drift": done.drift,
            }
            for done in self.passes
        ]
        return {"model": self.model, "policy": self.policy, "narrow": self.narrow, "passes": passes}


def verify_policy(unet: UNet, policy: Policy, *, seed: int = 0, progress: bool = False) -> Checked:
    """Run a policy's passes, and those of every target after them, and check each as `dmqfx.verify` does.

    A model of over a hundred million parameters is replaced by one with the same blocks and few channels.

    Raises: VerifyError for the first pass that breaks its promise; what compiling raises.
    """
    narrow = sum(parameter.numel() for parameter in unet.parameters()) > _LARGE
    model = shrunk(unet, seed=seed) if narrow else unet
    data = _calibration(model, seed, progress) if needs_calibration(policy) else None
    ctx = PassContext(policy, data, seed, progress, train_timesteps(unet, data))
    _, program = quantize(capture(model), ctx, verify=True)
    lowered = [record for names in _lowerings() for record in _lowered(program, names, ctx)]
    return Checked(type(unet).__name__, policy.name, narrow, (*program.log, *lowered))


def verify_saved(compiled: CompiledUNet, *, seed: int = 0) -> tuple[str, ...]:
    """Check a loaded model: its table against its graph, its output on random inputs; returns words.

    That its files are whole and unaltered was checked when it was loaded.

    Raises: VerifyError for a wrong entry or an output that is not finite.
    """
    program = compiled.program
    for broken in broken_claims(program):
        where = str(broken.site.at)
        raise VerifyError(f"{broken.kind} of {broken.site}: {broken.reason}", step="load", address=where)
    probes = draw(program, torch.Generator().manual_seed(seed))
    for inputs in probes:
        with torch.no_grad():
            result = compiled.runner(**inputs)
        for name, value in zip(
            program.inputs.outputs, result if isinstance(result, tuple) else (result,), strict=True
        ):
            if not bool(torch.isfinite(value).all()):
                raise VerifyError(f"the output {name} is not finite on random inputs", step="load")
    return (
        "files    whole and unaltered",
        f"table    {sum(1 for _ in program.table)} entries hold",
        f"output   finite on {len(probes)} probes, as {compiled.target.name}",
    )


def _calibration(unet: UNet, seed: int, progress: bool) -> Calibration:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", CalibrationWarning
        )  # for checking arithmetic random prompts are as good
        return Calibration.synthesize(
            unet, steps=_STEPS, trajectories=_TRAJECTORIES, seed=seed, progress=progress
        )


def _lowerings() -> list[tuple[str, ...]]:
    """The lists of lowering passes of all targets, without those that another has in a row."""
    every = [target.passes for target in TARGETS]
    return [a for a in every if not any(a != b and _within(a, b) for b in every)]


def _within(some: tuple[str, ...], more: tuple[str, ...]) -> bool:
    return any(more[k : k + len(some)] == some for k in range(len(more)))


def _lowered(program: Program, names: tuple[str, ...], ctx: PassContext) -> tuple[PassRecord, ...]:
    """The log of lowering passes on a finished program."""
    steps = registry.pipeline((name, {}) for name in names)
    done = steps.run(program, replace(ctx, calibration=None), observe=checking())
    return done.log[len(program.log) :]
