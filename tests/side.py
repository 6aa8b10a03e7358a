"""What several processes do side by side, and how they are started: `python side.py KIND... FOLDER` is one of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from sweeping import SWEEP, VOTED, Stop, chain, context, recorded, swept, tensors
from torch import Tensor

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.errors import DmqfxError
from dmqfx.graph.address import Site
from dmqfx.graph.facts import FLAGGED, PLANNED, Fact
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.table import Entry, Planned, Table
from dmqfx.numbers.quant import RangeMethod
from dmqfx.sweep.sweep import SweepPass
from dmqfx.sweep.turn import Turn

BLOCKS = (
    ("fit-ranges", {}),
    ("round-weights", {"method": "nearest"}),
    ("reconstruct-blocks", {"rows": 8, "batch": 4, "iterations": 40, "rate": 0.1}),
)


@dataclass(frozen=True)
class Break(SweepPass):
    """Fails, or dies, in one turn of process 1."""

    requires: ClassVar[frozenset[Fact]] = frozenset({PLANNED})
    at: str = ""
    how: str = "raise"

    def visit(self, turn: Turn, ctx: PassContext) -> Iterable[tuple[Site, Entry]]:
        if str(turn.site) == self.at and processes.rank() == 1:
            if self.how == "die":
                os._exit(9)
            raise DmqfxError("it broke here")
        return ()


def asked(program: Program, method: RangeMethod) -> Program:
    """The program with another kind of ranges in its plan."""
    table = program.table
    for site, plan in table.of(Planned).items():
        if plan.spec is not None and site.arg == "input":
            table = table.put(site, replace(plan, spec=replace(plan.spec, range=method)))
    return replace(program.with_table(table), facts=program.facts | {FLAGGED})


def work(kind: str, folder: Path) -> Table:
    """One of the calibrations that processes share."""
    data = recorded(chain(), 9, 4)
    ctx = context(data, chunk=2)
    if kind in ("minmax", "mse", "percentile", "ema"):
        return swept(asked(chain(), kind), ctx, VOTED).table  # type: ignore[arg-type]  # looked at above
    if kind == "observed":
        steps = (("insert-observers", {}), ("freeze-observers", {"batch": 2}))
        return swept(chain(), ctx, steps).table
    if kind == "felt":
        return swept(chain(), ctx, (("measure-sensitivity", {"rows": 12, "groups": 4}),)).table
    if kind == "resumed":
        kept = replace(ctx, run_dir=folder / "run")
        Stop.at = "conv4/conv2d:input"
        try:
            swept(chain(), kept, SWEEP, Stop())
        except KeyboardInterrupt:
            Stop.at = ""
        return swept(chain(), kept, SWEEP, Stop()).table
    if kind == "blocks":
        kept = replace(ctx, run_dir=folder / "run")
        return swept(chain(4, residual=True), kept, BLOCKS).table
    if kind == "steps":
        learn = ("learn-steps", {"rows": 12, "batch": 4, "iterations": 8, "groups": 4})
        ctx = replace(ctx, run_dir=folder / "run", calibration=in_samples(data))
        return swept(chain(4, residual=True), ctx, (*SWEEP, learn)).table
    if kind in ("raise", "die"):
        return swept(chain(), ctx, SWEEP, Break("conv4/conv2d:input", kind)).table
    if kind == "few":
        return swept(chain(), replace(ctx, chunk=16, calibration=recorded(chain(), 4)), SWEEP).table
    assert kind == "other"
    processes.same("name", str(processes.rank()))
    return Table()


def in_samples(data: Calibration) -> Calibration:
    """The rows of every shape as those of four samples: one of the eight judges."""
    groups = (replace(group, trajectory=torch.arange(len(group)) % 4) for group in data.groups)
    return replace(data, groups=tuple(groups))


def named(table: Table) -> dict[str, Tensor]:
    """Every tensor of a table."""
    return {
        f"{type(entry).__name__} {site} {name}": value.contiguous().clone()
        for site, entry in table
        for name, value in tensors(entry)
    }


def started(kinds: Sequence[str], folder: Path, count: int = 2) -> list[tuple[int, str]]:
    """Exit code and standard error of so many processes at the same work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alike = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    command = [sys.executable, __file__, *kinds, str(folder)]
    made = [
        subprocess.Popen(command, env={**alike, "RANK": str(k)}, stderr=subprocess.PIPE, text=True)
        for k in range(count)
    ]
    try:
        return [(each.wait(timeout=540), each.stderr.read() if each.stderr else "") for each in made]
    finally:
        for each in made:
            each.kill()


def found(kind: str, folder: Path, rank: int) -> dict[str, Tensor]:
    """What a process ended with."""
    return load_file(folder / f"{kind}-{rank}.safetensors")


def error(kind: str, folder: Path, rank: int) -> str:
    """What a process failed of."""
    return (folder / f"{kind}-{rank}.error").read_text()


def main(kinds: Sequence[str], folder: Path) -> None:
    """Be one of several processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind in kinds:
        end = folder / f"{kind}-{processes.rank()}"
        try:
            save_file(named(work(kind, folder)), end.with_suffix(".safetensors"))
        except DmqfxError as error:
            end.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:-1], Path(sys.argv[-1]))
