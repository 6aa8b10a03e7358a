"""learn-steps: quantization steps and biases, learned for the UNet's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmqfx.graph.facts import CORRECTED, FITTED, QDQ, ROUNDED, STEPPED, Fact
from dmqfx.graph.options import above, at_least, between
from dmqfx.graph.pipeline import Pass, PassContext, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.sites import quantized
from dmqfx.sweep.stepsweep import learn_steps


@dataclass(frozen=True)
class LearnSteps(Pass):
    """Let all steps and biases move at once, for the sake of what the whole network puts out.

    The steps of inputs, one for each timestep group, those of weights, and the biases of layers with codes go
    where the squared error of the UNet's output is less, on inputs and with targets of the float trajectory;
    codes and zero points stay. No step is more than doubled or halved. The error of every group of timesteps
    counts relative to what it was, so that none drowns the others. One in 16 of the samples that were drawn for
    calibration (the rows of a trajectory, or of a guided pair) is not learned from and judges: if no less is left to it
    in the mean over groups, only a half, a quarter or an eighth of the way is gone, and if that is no better, none.

    Units: `rows` of calibration, timesteps in equal shares; `batch` of them in each of the `iterations`;
    `groups` of equal width that the training timesteps are cut into; `rate` and `warmup` are those of Descent.
    Source: learned step sizes, LSQ (arXiv 1902.08153), through the whole network as EfficientQAT's last stage
    (arXiv 2407.11062).
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({ROUNDED, FITTED})
    provides: ClassVar[frozenset[Fact]] = frozenset({STEPPED})
    clears: ClassVar[frozenset[Fact]] = frozenset({CORRECTED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QDQ})
    preserves: ClassVar[Preserves] = Preserves.BITWISE
    longest: ClassVar[float] = 1.0  # with more iterations it learns the calibration prompts by heart
    rows: int = 640
    batch: int = 8
    iterations: int = 200
    groups: int = 20
    rate: float = 0.005
    warmup: float = 0.1

    def __post_init__(self) -> None:
        at_least(self, 1, "rows", "batch", "iterations", "groups")
        above(self, 0, "rate")
        between(self, 0, 1, "warmup")

    @property
    def needs_calibration(self) -> bool:
        """Always."""
        return True

    @property
    def budgeted(self) -> frozenset[str]:
        """The fields that a time budget multiplies."""
        return frozenset({"rows", "iterations"})

    def run(self, program: Program, ctx: PassContext) -> Program:
        """As many steps forward and back as there are iterations, a look at all rows before, and some at the judges.

        Raises: CalibrationError without calibration data, for rows that do not fit, or values that are not
            finite; StoreError for a run directory or a disk.
        """
        if ctx.journal.exhausted or next(quantized(program), None) is None:
            return program
        found = learn_steps(program, self, ctx)
        told, table = f"{found.left:.3g} of the error at the output is left", program.table
        told += " on rows that it did not learn from" if found.unseen else ""
        for site, entry in found.entries.items():
            if not found.left < 1:
                ctx.journal.refuse(site, "steps", f"{told}; what was there is kept")
            elif ctx.journal.apply(site, "steps", told):
                table = table.put(site, entry)
        return program.with_table(table)
