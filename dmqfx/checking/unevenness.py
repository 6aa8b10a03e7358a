"""What SkipConcat entries say of how uneven their channels are, measured again on the calibration rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from dmqfx.calibration.calibration import Calibration
from dmqfx.checking.probes import unobserved
from dmqfx.checking.tablecheck import Broken
from dmqfx.graph.program import Program
from dmqfx.graph.table import SkipConcat

__all__ = ["misjudged"]

_BATCH = 8
_SLACK = 1e-2  # relative


def misjudged(program: Program, calibration: Calibration) -> Iterator[Broken]:
    """Entries whose variances are not those of the calibration rows, or whose verdicts do not fit together."""
    entries = program.table.of(SkipConcat)
    run = _Peaks(program, {site.at for site in entries})
    for batch in calibration.batches(_BATCH, program.inputs, dtype=program.dtype):
        with torch.no_grad():
            run.run(*(batch[i.name].to(program.device) for i in program.inputs.inputs))
    for site, entry in entries.items():
        first = entry.deep if entry.skip_last else entry.skip
        arms = run.peaks[site.at][:first], run.peaks[site.at][first:]
        there = [float(arm.var(correction=0) / arm.mean().square().clamp_min(1e-30)) for arm in arms]
        deep, skip = there if entry.skip_last else there[::-1]
        for name, claimed, real in (("deep", entry.deep_variance, deep), ("skip", entry.skip_variance, skip)):
            if not math.isclose(claimed, real, rel_tol=_SLACK, abs_tol=1e-6):
                yield Broken(
                    site, "SkipConcat", f"the {name} arm's variance is {real:.3g}, not {claimed:.3g}"
                )
    yield from _out_of_order(program)


def _out_of_order(program: Program) -> Iterator[Broken]:
    """Entries called uneven beside more uneven ones that are not."""
    worst = {s: max(e.deep_variance, e.skip_variance) for s, e in program.table.of(SkipConcat).items()}
    uneven = {site for site, entry in program.table.of(SkipConcat).items() if entry.uneven}
    most = max((worst[site] for site in worst if site not in uneven), default=-math.inf)
    for site in uneven:
        if worst[site] < most:
            yield Broken(
                site, "SkipConcat", f"called uneven at {worst[site]:.3g}, another is not at {most:.3g}"
            )


class _Peaks(fx.Interpreter):
    """Runs a program and keeps the greatest magnitude per channel of some operations."""

    def __init__(self, program: Program, wanted: set[object]) -> None:
        super().__init__(unobserved(program))
        self.wanted, self.peaks = wanted, dict[object, Tensor]()

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.meta.get("address") in self.wanted and isinstance(value, Tensor):
            peak = value.abs().amax((0, 2, 3)).double()
            known = self.peaks.get(n.meta["address"], peak)
            self.peaks[n.meta["address"]] = torch.maximum(known, peak)
        return value
