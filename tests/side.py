"""What several processes do side by side, and how they are started: `python side.py KIND... FOLDER` forks them.

After a comma among the kinds new processes go on: those before may be dead.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from models import unconditional
from safetensors.torch import load_file, save_file
from sweeping import SWEEP, VOTED, Stop, chain, context, output, recorded, swept, tensors
from torch import Tensor
from toys import SPEC, rows, toy

from dmqfx import processes
from dmqfx.calibration.calibration import Calibration
from dmqfx.errors import DmqfxError
from dmqfx.graph.address import Site
from dmqfx.graph.facts import FLAGGED, PLANNED, Fact
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Program
from dmqfx.graph.registry import pipeline
from dmqfx.graph.table import Entry, Planned, Table
from dmqfx.numbers.equivalent import surrogate
from dmqfx.numbers.quant import RangeMethod
from dmqfx.numbers.speeds import Speeds
from dmqfx.passes import learn_scaling
from dmqfx.policy.policy import Policy
from dmqfx.runtime.targets import lower
from dmqfx.sweep import sensitivitysweep, stepsweep
from dmqfx.sweep.kept import kept
from dmqfx.sweep.sensitivity import Measurement
from dmqfx.sweep.sweep import SweepPass
from dmqfx.sweep.turn import Turn

BLOCKS = (
    ("fit-ranges", {}),
    ("round-weights", {"method": "nearest"}),
    ("reconstruct-blocks", {"rows": 8, "batch": 4, "iterations": 40, "rate": 0.1}),
)
ADAROUND = ("round-weights", {"method": "adaround", "start": "gptq", "rows": 64, "iterations": 20})
LES = {"method": "les", "weighting": "adaptive", "iterations": 10, "rows": 64, "batch": 32}
LEARNING = (("fit-ranges", {}), ADAROUND, ("correct-bias", {}))
FEW = {
    "learn-scaling": {"rows": 64},
    "measure-sensitivity": {"rows": 10},
    "round-weights": {"rows": 64, "iterations": 20},
    "learn-steps": {"rows": 12, "batch": 4, "iterations": 8},
}
"""Options of passes of a policy that make it a matter of seconds."""
FELT = ("measure-sensitivity", {"rows": 12, "groups": 4})
LEARN = ("learn-steps", {"rows": 12, "batch": 4, "iterations": 8, "groups": 4})
DEATHS: tuple[dict[int, int], ...] = ({1: 1}, {0: 4, 1: 5}, {0: 9}, {})
"""After how many looks and iterations each process is killed, in its first life, its second, ... and its last."""


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


def work(kind: str, folder: Path) -> Table | dict[str, Tensor]:
    """One of the calibrations that processes share."""
    data = recorded(chain(), 9, 4)
    ctx = context(data, chunk=2)
    if kind in ("minmax", "mse", "percentile", "ema"):
        return swept(asked(chain(), kind), ctx, VOTED).table  # type: ignore[arg-type]  # looked at above
    if kind == "observed":
        steps = (("insert-observers", {}), ("freeze-observers", {"batch": 2}))
        return swept(chain(), ctx, steps).table
    if kind == "felt":
        return swept(chain(), ctx, (FELT,)).table
    if kind == "alive":
        return felt(data)
    if kind.startswith("mortal"):
        return mortal(int(kind[-1]), data, folder)
    if kind in ("les", "surrogate"):
        scale = LES if kind == "les" else {"method": "surrogate", "rows": 64}
        steps = (("pair-layers", {}), ("learn-scaling", scale), *LEARNING)
        return swept(chain(5, residual=True), ctx, steps).table
    if kind == "whole":
        return whole()
    if kind == "resumed":
        going = replace(ctx, run_dir=folder / "run")
        Stop.at = "conv4/conv2d:input"
        try:
            swept(chain(), going, SWEEP, Stop())
        except KeyboardInterrupt:
            Stop.at = ""
        return swept(chain(), going, SWEEP, Stop()).table
    if kind == "blocks":
        going = replace(ctx, run_dir=folder / "run")
        return swept(chain(4, residual=True), going, BLOCKS).table
    if kind == "steps":
        ctx = replace(ctx, run_dir=folder / "run", calibration=in_samples(data))
        return swept(chain(4, residual=True), ctx, (*SWEEP, LEARN)).table
    if kind == "kept":
        return [made_by_itself(folder / "made", life).columns() for life in (0, 1)][1]
    if kind in ("raise", "die"):
        return swept(chain(), ctx, SWEEP, Break("conv4/conv2d:input", kind)).table
    if kind == "few":
        return swept(chain(), replace(ctx, chunk=16, calibration=recorded(chain(), 4)), SWEEP).table
    assert kind == "other"
    processes.same("name", str(processes.rank()))
    return Table()


def made_by_itself(folder: Path, life: int) -> Calibration:
    """The rows of a small model with the seed 0; they would be others in each life."""
    torch.manual_seed(0)
    unet = unconditional()
    return kept(folder, unet, 0, partial(Calibration.synthesize, unet, steps=2, trajectories=1, seed=life))


def felt(data: Calibration, run: Path | None = None) -> Table:
    """Measured, rounded and learned."""
    ctx = context(in_samples(data), chunk=2, run_dir=run)
    return swept(chain(4, residual=True), ctx, (FELT, *SWEEP, LEARN)).table


def mortal(life: int, data: Calibration, folder: Path) -> Table:
    """The same; all is kept, and who is not in the last life is killed before a look or an iteration."""
    last = DEATHS[life].get(processes.rank())
    file = folder / f"done-{processes.rank()}"

    def counted(honest: Callable[..., object]) -> Callable[..., object]:
        def work(*given: object) -> object:
            if file.exists() and len(file.read_text().splitlines()) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            found = honest(*given)
            with file.open("a") as told:
                told.write(f"{honest.__name__}\n")
            return found

        return work

    with ExitStack() as patches:
        for owner, name in ((Measurement, "look"), (Measurement, "look_again"), (stepsweep, "_slopes")):
            patches.enter_context(patch.object(owner, name, counted(getattr(owner, name))))
        for module in (sensitivitysweep, stepsweep):
            patches.enter_context(patch.object(module, "_OFTEN", -1.0))
        return felt(data, folder / "mortal")


def whole() -> dict[str, Tensor]:
    """What the toy puts out, and what it does after all that w4a6 asks for, done in short."""
    policy, data = Policy.load("w4a6", ("default.input.groups=4",)), in_samples(rows(16))
    asked = [(step.name, {**step.keywords(), **FEW.get(step.name, {})}) for step in policy.pipeline]
    with patch.object(learn_scaling, "surrogate", partial(surrogate, iterations=20)):
        made = lower(pipeline(asked).run(toy(), PassContext(policy, data, chunk=3)), "simulate")
    with torch.no_grad():
        outputs = [[output(each.gm(**batch)) for batch in data.batches(4, SPEC)] for each in (toy(), made)]
    return {"real": torch.cat(outputs[0]), "quantized": torch.cat(outputs[1])}


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


def started(kinds: Sequence[str], folder: Path, count: int = 2) -> tuple[list[list[int]], str]:
    """The exit codes of so many processes at the same work, of each crowd of them; and their standard error."""
    command = [sys.executable, __file__, str(count), *kinds, str(folder)]
    crowd = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = crowd.communicate(timeout=540)
    except BaseException:
        os.killpg(crowd.pid, signal.SIGKILL)
        raise
    assert crowd.returncode == 0, said
    return json.loads((folder / "codes").read_text()), said


def found(kind: str, folder: Path, rank: int) -> dict[str, Tensor]:
    """What a process ended with."""
    return load_file(folder / f"{kind}-{rank}.safetensors")


def error(kind: str, folder: Path, rank: int) -> str:
    """What a process failed of."""
    return (folder / f"{kind}-{rank}.error").read_text()


def be(kinds: Sequence[str], folder: Path) -> None:
    """Be one of several processes."""
    dist.init_process_group("gloo")
    for kind in kinds:
        end = folder / f"{kind}-{processes.rank()}"
        try:
            made = work(kind, folder)
            save_file(named(made) if isinstance(made, Table) else made, end.with_suffix(".safetensors"))
        except DmqfxError as error:
            end.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


def crowd(kinds: Sequence[str], folder: Path, count: int) -> list[int]:
    """The exit codes of forks of this process, which has imported everything."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    children = []
    for rank in range(count):
        if not (child := os.fork()):
            os.environ["RANK"] = str(rank)
            be(kinds, folder)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(count: int, kinds: Sequence[str], folder: Path) -> None:
    """Crowds of processes, one after the other."""
    torch.set_num_threads(1)
    Speeds.seconds = untimed  # type: ignore[method-assign]  # no estimate is looked at
    if "whole" in kinds:
        toy()  # once for all
    crowds = [list(group) for comma, group in groupby(kinds, lambda kind: kind == ",") if not comma]
    codes = [crowd(group, folder, count) for group in crowds]
    (folder / "codes").write_text(json.dumps(codes))


def untimed(*operation: object, **sizes: object) -> float:
    """In place of the seconds that this machine takes."""
    return 1e-3


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:-1], Path(sys.argv[-1]))
